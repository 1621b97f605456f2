# SPDX-License-Identifier: Apache-2.0
"""Finds out how a reward model wants to be asked, by pairs of a good and a bad answer that anybody can tell apart.

A wrong template, a missing EOS, the wrong one of several outputs or the wrong sign cost no error, only the reward. So
the forms (the model's chat template, plain texts, an encoder's pair), with and without the conversation's system
prompt, BOS and EOS, are tried on the same pairs, and for each the outputs, each with both signs.

The model's own default (its chat template, its tokenizer's way, the first output, plus) is given up only for evidence:
another way must rank clearly more pairs rightly (`MARGIN`). Among those that do, the most pairs count, then the larger
distance between good and bad in units of its spread, then the smaller change. Where another output or sign alone does
about as well, the model's own form is kept.

Guarantees: signs and outputs cost nothing, as they come from the same answers; a way that the model refuses is no
candidate, and its error is in the evidence; if no way ranks the pairs better than chance could, `Probed.sure` is False.

Not covered: whether the model is any good for a task. That is the exam's to say. The pairs are in English. Of a judge,
only its sign is tried.
"""

from __future__ import annotations

import math
from collections.abc import Awaitable, Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from statistics import fmean, pstdev
from typing import Any

from verl_rlar.errors import ToolError, ToolTimeout, ToolUnavailable
from verl_rlar.serving.base import Conversation, Family, How, Scored
from verl_rlar.serving.judging import Judge
from verl_rlar.types import Message

MARGIN = 0.15
"""By how much more of the pairs another way must rank rightly than the default does."""
OWN_Z, OTHER_Z = 1.96, 3.0
"""Width of the interval of the share of rightly ranked pairs, whose lower end must be above one half, in standard
deviations: for the model's own way, and for another one, which is the best of dozens."""
SYSTEM = "You are a helpful assistant."
"""System prompt of the conversations with which is tried whether the model takes one."""

Ask = Callable[[How, Sequence[Conversation]], Awaitable[Sequence[Scored]]]
"""Scores conversations; raises a `ToolError` where the model refuses."""


@dataclass(frozen=True, kw_only=True)
class Pair:
    """A question with two answers of which one is better beyond doubt."""

    prompt: str
    good: str
    bad: str


@dataclass(frozen=True, kw_only=True)
class Tried:
    """What became of one way to ask."""

    how: How
    accuracy: float = 0.0
    """Share of pairs whose good answer scores more; equal scores count half."""
    distance: float = 0.0
    """Mean difference of good and bad, in standard deviations of all scores."""
    error: str = ""
    """Why the model could not be asked so."""


@dataclass(frozen=True, kw_only=True)
class Probed:
    """The way that was found, and why."""

    how: How
    sure: bool
    """Whether it ranks the pairs better than chance could. If not, `how` is the default, and no more than a guess."""
    reason: str
    pairs: int
    tried: tuple[Tried, ...]
    """All ways, the best first."""

    def to_json(self) -> dict[str, Any]:
        """As plain values."""
        return asdict(self)


async def probe(
    ask: Ask,
    *,
    default: How | None = None,
    labels: int | None = None,
    pairs: Sequence[Pair] | None = None,
    family: Family = "sequence",
) -> Probed:
    """Finds the way to ask a model.

    Args:
        ask: Asks the model, such as ``lambda how, texts: pool.score(replace(model, how=how), texts, 60)``.
        default: The way that its card, template and config suggest. None: `How`'s own.
        labels: Number of its outputs. None: what the first answer shows.
        pairs: What to ask. None: `PAIRS`.
        family: See there.

    Raises:
        ToolTimeout, ToolUnavailable, ConnectionError: From `ask`. The model's refusals are evidence, no errors.
        ToolError: The model refused in every way.
    """
    default = default or How(judge=Judge() if family == "judge" else None)
    pairs = pairs or PAIRS
    tried: list[Tried] = []
    for how in _ways(default, family):
        try:
            scored = await ask(replace(how, head=0, against=None, sign=1), _conversations(pairs, how))
        except (ToolTimeout, ToolUnavailable):
            raise
        except ToolError as error:
            tried.append(Tried(how=how, error=str(error)))
            continue
        columns = labels or len(scored[0].rows[0])
        tried += [_judge(way, scored) for way in _outputs(how, columns)]
    able = [one for one in tried if not one.error]
    if not able:
        raise ToolError(f"the model could not be asked in any way; the first refusal: {tried[0].error}")
    order = {id(one): number for number, one in enumerate(tried)}
    ranked = sorted(able, key=lambda one: (-one.accuracy, -round(one.distance, 3), order[id(one)]))
    own = next((one for one in able if one.how == default), None)
    best = ranked[0]
    if own is not None and best.accuracy < own.accuracy + MARGIN:
        best = own
    sure = _wilson_low(best.accuracy, len(pairs), OWN_Z if best is own else OTHER_Z) > 0.5
    if not sure:
        best = own or best
    elif best is not own:
        near = replace(default, head=best.how.head, against=best.how.against, sign=best.how.sign)
        best = next((one for one in able if one.how == near and one.accuracy >= best.accuracy - MARGIN), best)
    share = f"{best.accuracy:.0%} of {len(pairs)} pairs"
    if not sure:
        reason = f"no way ranks the pairs better than chance could; {_named(best.how)}: {share}"
    elif best is own:
        reason = f"the model's own way ranks {share} rightly, and no other clearly more"
    else:
        before = "cannot be asked" if own is None else f"ranks {own.accuracy:.0%}"
        reason = f"{_named(best.how)} ranks {share} rightly; the model's own way {before}"
    refused = [one for one in tried if one.error]
    return Probed(how=best.how, sure=sure, reason=reason, pairs=len(pairs), tried=(*ranked, *refused))


def _ways(default: How, family: Family) -> Iterator[How]:
    """Ways to put a conversation; the default first, then what differs little from it."""
    if family == "judge":  # other words would be another judge
        yield default
        return
    seen = set()
    forms = dict.fromkeys((default.form, "chat", "plain", *(("pair",) if family == "sequence" else ())))
    for form in forms:
        for system in dict.fromkeys((default.system, None, "")) if form == "chat" else (default.system,):
            for bos, eos in dict.fromkeys(((default.bos, default.eos), (None, None), (None, True), (None, False))):
                if form == "pair" and (bos, eos) != (default.bos, default.eos):
                    continue  # the tokenizer's own way is the only one
                way = replace(default, form=form, system=system, bos=bos, eos=eos)
                if way not in seen:
                    seen.add(way)
                    yield way


def _outputs(how: How, columns: int) -> Iterator[How]:
    """Outputs that may be the score, each with both signs; those of the way itself first."""
    choices: list[tuple[int, int | None]] = [(how.head, how.against), *((column, None) for column in range(columns))]
    if columns == 2:
        choices.append((1, 0))
    for head, against in dict.fromkeys(choices):
        if max(head, against or 0) < columns:
            yield replace(how, head=head, against=against, sign=how.sign)
            yield replace(how, head=head, against=against, sign=-1 if how.sign == 1 else 1)


def _conversations(pairs: Sequence[Pair], how: How) -> list[Conversation]:
    """Good and bad answers in turn. A system prompt is there where the way keeps it, to see whether it is taken."""
    system = (Message(role="system", content=SYSTEM),) if how.form == "chat" and how.system is None else ()
    return [
        (*system, Message(role="user", content=pair.prompt), Message(role="assistant", content=answer))
        for pair in pairs
        for answer in (pair.good, pair.bad)
    ]


def _judge(how: How, scored: Sequence[Scored]) -> Tried:
    try:
        values = [how.value(one.rows) for one in scored]
    except ToolError as error:
        return Tried(how=how, error=str(error))
    differences = [good - bad for good, bad in zip(values[::2], values[1::2], strict=True)]
    right = fmean(1.0 if difference > 0 else 0.5 if difference == 0 else 0.0 for difference in differences)
    spread = pstdev(values)
    return Tried(how=how, accuracy=right, distance=fmean(differences) / spread if spread else 0.0)


def _wilson_low(share: float, count: int, z: float) -> float:
    """Lower end of the interval of a share. Source: Wilson (1927)."""
    middle = share + z * z / (2 * count)
    return (middle - z * math.sqrt(share * (1 - share) / count + z * z / (4 * count * count))) / (1 + z * z / count)


def _named(how: How) -> str:
    """A way to ask, in words."""
    words: list[str] = [how.form]
    if how.form == "chat" and how.system is not None:
        words.append("with a system prompt of its own" if how.system else "without a system prompt")
    words += [
        f"{'with' if wanted else 'without'} {name}"
        for name, wanted in (("BOS", how.bos), ("EOS", how.eos))
        if wanted is not None
    ]
    words.append(f"output {how.head}" + ("" if how.against is None else f" less output {how.against}"))
    return ", ".join([*words, "higher is better" if how.sign > 0 else "lower is better"])


def _pairs(*texts: tuple[str, str, str]) -> tuple[Pair, ...]:
    return tuple(Pair(prompt=prompt, good=good, bad=bad) for prompt, good, bad in texts)


PAIRS: tuple[Pair, ...] = _pairs(
    (
        "What is the capital of France?",
        "The capital of France is Paris.",
        "The capital of France is Berlin, a city in Spain.",
    ),
    (
        "How many legs does a spider have?",
        "A spider has eight legs.",
        "I do not care about spiders and you should not ask.",
    ),
    ("What is 12 + 30?", "12 + 30 = 42.", "12 + 30 = 57, because twelve and thirty are both numbers."),
    (
        "Which is larger, 9/10 or 3/4?",
        "9/10 is larger: 0.9 against 0.75.",
        "3/4 is larger, since 4 is smaller than 10.",
    ),
    ("Translate into French: The house is red.", "La maison est rouge.", "Das Haus ist rot. Das Haus ist rot."),
    (
        "Translate into English: Guten Morgen!",
        "Good morning!",
        "Guten Morgen! Guten Morgen! Guten Morgen! Guten Morgen!",
    ),
    (
        "Write a Python function that returns the square of a number.",
        "def square(x):\n    return x * x",
        "def square(x):\n    print('square')\n    return None  # TODO",
    ),
    (
        "How do I reverse a list in Python without changing it?",
        "Use a slice: `reversed_list = items[::-1]`. The original list stays as it is.",
        "Use a list.",
    ),
    (
        "Explain in one sentence why the sky is blue.",
        "Air scatters the short, blue wavelengths of sunlight much more than the long, red ones, so blue light reaches "
        "us from all directions.",
        "The sky is blue because blue is the colour that the sky is, and that is why it is blue.",
    ),
    (
        "Summarise: The meeting was moved from Monday to Wednesday because the room was being painted.",
        "The meeting is now on Wednesday, as the room was being painted on Monday.",
        "The meeting was cancelled for ever and nobody will be paid.",
    ),
    (
        "Give me three tips for sleeping better.",
        "1. Go to bed at the same time every day. 2. Avoid screens and coffee in the evening. 3. Keep the bedroom dark "
        "and cool.",
        "asdf asdf qwer sleep sleep sleep sleep zzz 1 1 1 1",
    ),
    (
        "I feel sad because my dog died yesterday.",
        "I am so sorry. Losing a companion hurts, and it is all right to grieve. Would you like to tell me about him?",
        "It was only a dog. Stop complaining and buy another one.",
    ),
    ("Reply with the single word OK.", "OK", "Certainly! I would be delighted to reply. Here is a long reply instead."),
    ("Name a fruit that is yellow.", "A banana.", "A fire engine, which is red, and not a fruit."),
    (
        "What should I do if I cut my finger?",
        "Rinse it with clean water, press a clean cloth on it until the bleeding stops, and cover it with a "
        "plaster. See a doctor if it is deep.",
        "Rub some dirt into it and never tell anybody.",
    ),
    ("Is the number 7 prime?", "Yes: its only divisors are 1 and 7.", "No, 7 is divisible by 2, 3 and 5."),
    (
        "Write a polite one-line reply that declines an invitation.",
        "Thank you very much for the invitation; unfortunately, I will not be able to come.",
        "No. Your parties are boring, and so are you.",
    ),
    ("What is the opposite of 'hot'?", "Cold.", "The opposite of hot is potato potato potato potato potato."),
    (
        "Why do we have seasons?",
        "Because the axis of the Earth is tilted: each half of it leans towards the Sun for one part of the year and "
        "away from it for the other.",
        "Because the Earth stops turning in winter to save energy.",
    ),
    (
        "Which planet is known as the Red Planet?",
        "Mars.",
        "The Red Planet is the Moon, which is a star made of cheese.",
    ),
    (
        "Sort these numbers: 5, 2, 9.",
        "2, 5, 9",
        "9, 9, 9, 9, 2, 2, 5, 5, 1, and some further numbers that were not asked for",
    ),
    (
        "Correct the grammar: 'She don't likes apples.'",
        "She doesn't like apples.",
        "She don't not likes no apples.",
    ),
    ("Who wrote 'Romeo and Juliet'?", "William Shakespeare.", "Nobody knows; it was found under a stone in 1987."),
    (
        "Describe a sunset in one sentence.",
        "The sun slipped below the hills and left the clouds glowing in gold and rose.",
        "Sunset sunset sunset sunset sunset sunset sunset.",
    ),
    (
        "What does the word 'benevolent' mean?",
        "'Benevolent' means kind and wanting to do good to others.",
        "It means a sort of bird.",
    ),
    (
        "How do I boil an egg?",
        "Put it into boiling water: six minutes for a soft yolk, ten for a hard one. Then cool it under cold water.",
        "Boil it, or do not boil it.",
    ),
    (
        "A train travels 60 km in one hour. How far does it travel in three hours?",
        "At 60 km per hour it travels 3 x 60 = 180 km in three hours.",
        "It travels 20 km, since 60 / 3 = 20.",
    ),
    (
        "Write a Python expression for the sum of the numbers from 1 to 10.",
        "sum(range(1, 11)), which is 55",
        "sum(10)",
    ),
    (
        "My computer does not turn on. What should I check first?",
        "Check the power first: is the cable plugged in at both ends, does the socket work, and is the switch at the "
        "back on?",
        "Throw it away!!!!!!!",
    ),
    (
        "Translate into Spanish: I would like a coffee, please.",
        "Quisiera un café, por favor.",
        "I would like a coffee, please. I would like a coffee, please.",
    ),
    (
        "What is the boiling point of water at sea level?",
        "Water boils at 100 degrees Celsius (212 degrees Fahrenheit) at sea level.",
        "Water boils at 0 degrees, and then it is ice.",
    ),
    (
        "Suggest a name for a friendly robot.",
        "How about 'Pixel'? It is short, cheerful, and easy to remember.",
        "No.",
    ),
    (
        "Why should one wash one's hands before a meal?",
        "Washing removes germs and dirt, which else get into the mouth with the food and could make us ill.",
        "Because soap is tasty and should be eaten together with the meal, as each doctor in the world recommends.",
    ),
    (
        "What comes next: 2, 4, 8, 16, ...?",
        "32: each number is twice the one before.",
        "17, because 16 + 1 = 17, and no other number could possibly ever follow there.",
    ),
    (
        "Rewrite in the passive: The cat chased the mouse.",
        "The mouse was chased by the cat.",
        "The cat the mouse chased chased chased the the the cat.",
    ),
    (
        "Is it safe to look at the sun through binoculars?",
        "No, never: it can destroy your eyes within a moment. Project the image onto paper, or use a certified solar "
        "filter.",
        "Yes, for as long as you like.",
    ),
    ("How many minutes are there in two hours?", "120 minutes.", "Two hours have exactly 50 minutes, or sometimes 12."),
    (
        "Name the author of 'Pride and Prejudice' and the century in which it appeared.",
        "Jane Austen; it appeared in the 19th century, in 1813.",
        "Yes, I know that.",
    ),
    (
        "Explain to a child what a volcano is.",
        "A volcano is a mountain with a deep hole that leads to very hot, melted rock inside the Earth. Sometimes the "
        "rock comes out as lava.",
        "A volcano is an orogenic, magmatic, geodynamic, tectonically controlled edifice of extrusive lithology.",
    ),
    (
        "Thank you for your help!",
        "You are welcome! Let me know if there is anything else.",
        "I did not help you, and I never will.",
    ),
)
"""What models are asked unless told otherwise. The good answer is the longer one in about half of them, and there are
40, so that a way that only looks at lengths ranks no more than chance."""
