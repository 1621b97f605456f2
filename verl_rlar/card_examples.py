# SPDX-License-Identifier: Apache-2.0
"""Examples in a model's card: conversations, and the scores that its author got for them; and whether they come out.

Many cards show a few lines of Python with a prompt, some responses, and the printed scores in comments or in a block of
output below. A way of asking that gives the same numbers is the author's own: no other evidence tells template, BOS and
EOS apart as well. What is read: conversations as lists of ``role`` and ``content``; pairs of texts (rerankers); a text
called ``prompt`` (or ``question``, ...) with others called ``response1``, ``answer``, ...; and numbers in comments.

Guarantees: a card is text that anybody may have written: it is parsed and never run; only literals, their
concatenation and names given to them are understood; sizes, depths and times are bounded, whatever it holds; nothing is
raised. Scores are taken only where they are as many as the conversations, or several times as many (*runs*: the same
examples by several models of a family).

Not covered: prose, tables, scores in f-strings, scores per step.
"""

from __future__ import annotations

import ast
import io
import math
import re
import tokenize
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from verl_rlar.errors import ToolError, ToolTimeout, ToolUnavailable
from verl_rlar.serving.base import Family, How
from verl_rlar.serving.probe import MARGIN, Ask, Probed, Tried
from verl_rlar.types import Message

BLOCKS, BLOCK_CHARS = 12, 16_384
"""Most blocks of code that are looked at, and the longest."""
CONVERSATIONS, RUNS = 8, 6
"""Most conversations of an example, and most runs."""
WEIGHT, DEPTH = 400, 6
"""Most parts of a value, and its greatest depth."""
TEXT = 20_000
"""Longest text."""

CLOSE, CLOSE_SHARE = 0.03, 0.01
"""How near a score must come to the printed one: in shares of it (at least of 1), as cards are printed in bfloat16; and
for printed probabilities."""
CLEARLY = 4.0
"""How many times nearer another way must come than the probed one does, where both are near enough."""


ROLES = ("system", "user", "assistant")
FENCE = re.compile(r" {0,3}(`{3,9}|~{3,9})[ \t]*([\w+-]{0,20})")
CODE, OUTPUT = ("", "python", "py", "python3"), ("", "text", "txt", "console", "output", "plaintext", "bash", "shell")
PROMPT = re.compile(r"_?(?:user_?)?(?:prompt|question|query|instruction|source)(?:_?text)?", re.IGNORECASE)
RESPONSE = re.compile(
    r"(?:good|bad|chosen|rejected|best|worst|candidate|model)?_?(?:response|answer|reply|completion|chosen|rejected"
    r"|translation|passage|document)s?_?[a-z0-9]?",
    re.IGNORECASE,
)
NUMBER = r"[-−]?\d{1,6}(?:\.\d{1,18})?(?:[eE][-+]?\d{1,2})?"
NAMED = re.compile(
    rf"(?:score|reward|logit|output|rating|value|result)[^:=\n]{{0,60}}[:=]\s*(?:tensor)?[\[( ]*({NUMBER})[\])\s]*$",
    re.IGNORECASE,
)
"""``Score for response 1: 23.0``"""
BARE = re.compile(
    rf"(?:(?:>+|=>|->|→|tensor|\[|\(|\s|array)*)({NUMBER}(?:[\s,;\]\[]+{NUMBER})*)[\])\s]*", re.IGNORECASE
)
"""``[-8.19, 5.26]``, ``tensor([[23.0]])``"""


@dataclass(frozen=True, kw_only=True)
class Printed:
    """A number as it is printed."""

    value: float
    step: float
    """The smallest difference that it can show: 0.01 for ``3.14``."""


@dataclass(frozen=True, kw_only=True)
class Example:
    """Conversations, and what a model is said to give for them."""

    conversations: tuple[tuple[Message, ...], ...]
    """Each ends with the response. Foreign text."""
    runs: tuple[tuple[Printed, ...], ...]
    """In each run, a score for each of them."""


@dataclass(frozen=True, kw_only=True)
class Reproduced:
    """What became of the examples in a model's card."""

    found: int = 0
    """Examples in the card."""
    values: int = 0
    """Printed scores in them."""
    reproduced: int = 0
    """Examples whose scores came out within tolerance."""
    worst: float | None = None
    """Largest distance of these scores, in tolerances (`CLOSE`); None: none came out."""
    how: How | None = None
    """The way in which they came out; None: in no way."""
    telling: bool = False
    """Whether it takes the right way to hit them: two scores at least, and far from each other."""
    note: str = ""

    def as_dict(self) -> dict[str, Any]:
        return asdict(self) | {"how": self.how.to_json() if self.how else None}


def examples_of(card: str) -> tuple[Example, ...]:
    """The examples in a model's card, in its order; see the module."""
    blocks = list(_blocks(card))
    found: list[Example] = []
    for place, (language, code) in enumerate(blocks):
        if language not in CODE:
            continue
        if not (conversations := _conversations(code)):
            continue
        numbers = _in_comments(code)
        if not numbers and place + 1 < len(blocks) and blocks[place + 1][0] in OUTPUT:
            numbers = _numbers(blocks[place + 1][1].splitlines())
        count = len(conversations)
        runs = [tuple(numbers[begin : begin + count]) for begin in range(0, len(numbers), count)]
        if numbers and len(numbers) % count == 0 and len(runs) <= RUNS:
            example = Example(conversations=conversations, runs=tuple(runs))
            if example not in found:
                found.append(example)
    return tuple(found)


def _blocks(card: str) -> Iterator[tuple[str, str]]:
    """Language and text of the first blocks of code that are not too long."""
    fence, language, count = "", "", 0
    lines: list[str] = []
    for line in card.splitlines():
        match = FENCE.match(line)
        if not fence and match:
            fence, language, lines = match[1], match[2].lower(), []
        elif fence and match and match[1].startswith(fence) and not line.strip().strip(fence[0]):
            fence, count = "", count + 1
            text = "\n".join(lines) + "\n"
            if len(text) <= BLOCK_CHARS:
                yield language, text
            if count == BLOCKS:
                return
        elif fence:
            lines.append(line)


# --- conversations ----------------------------------------------------------------------------------------------------


def _conversations(code: str) -> tuple[tuple[Message, ...], ...]:
    """The conversations in a piece of Python; none if it is no Python."""
    try:
        tree = ast.parse(re.sub(r"^(?:>>> ?|\.\.\. ?)", "", code, flags=re.MULTILINE))
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return ()
    names: dict[str, Any] = {}
    found: dict[tuple[Message, ...], None] = {}
    for node in _statements(tree):
        if isinstance(node, ast.Assign) and len(node.targets) == 1 and isinstance(node.targets[0], ast.Name):
            value = _value(node.value, names)
            if value is not None and len(names) < 200:
                names[node.targets[0].id] = value
        for part in _literals(node):
            talks = dict.fromkeys(_talks(_value(part, names)))
            if not talks and _has_turns(part):
                return ()  # one whose texts are not known: which score is whose could not be told
            found |= talks
    if not found:
        found = dict.fromkeys(_prompted(names))
    return tuple(found)[: CONVERSATIONS + 1] if len(found) <= CONVERSATIONS else ()


def _statements(tree: ast.Module) -> Iterator[ast.stmt]:
    """Statements in their order, also those under ``with``, ``if`` and ``for``."""
    waiting: list[ast.stmt] = tree.body[::-1]
    while waiting:
        node = waiting.pop()
        yield node
        if not isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
            waiting += getattr(node, "body", [])[::-1]


def _literals(node: ast.stmt) -> Iterator[ast.expr]:
    """Lists in a statement's expression, also among the arguments of calls in it; not those in other lists."""
    waiting: list[Any] = [getattr(node, "value", None)]
    while waiting:
        value = waiting.pop()
        if isinstance(value, ast.List):
            yield value
        elif isinstance(value, ast.Call):
            waiting += [*(keyword.value for keyword in value.keywords), *value.args[::-1], value.func]
        elif isinstance(value, (ast.Attribute, ast.Subscript, ast.Await)):
            waiting.append(value.value)


def _has_turns(node: ast.expr) -> bool:
    """Whether a list is one of turns, or of such lists."""
    items = node.elts[:CONVERSATIONS] if isinstance(node, ast.List) else []
    items = [inner for item in items for inner in (item.elts[:1] if isinstance(item, ast.List) else [item])]
    keys = [key for item in items if isinstance(item, ast.Dict) for key in item.keys]
    return any(isinstance(key, ast.Constant) and key.value == "content" for key in keys)


def _value(node: ast.expr, names: Mapping[str, Any], depth: int = 0) -> Any:
    """A text, or a list or mapping of such; None for everything else, and for what is too large."""
    if depth > DEPTH:
        return None
    if isinstance(node, ast.Constant):
        return node.value if isinstance(node.value, str) and len(node.value) <= TEXT else None
    if isinstance(node, ast.Name):
        return names.get(node.id)
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add):
        left, right = _value(node.left, names, depth + 1), _value(node.right, names, depth + 1)
        joined = left + right if isinstance(left, str) and isinstance(right, str) else None
        return joined if joined is not None and len(joined) <= TEXT else None
    if isinstance(node, (ast.List, ast.Tuple)) and len(node.elts) <= WEIGHT:
        items = [_value(item, names, depth + 1) for item in node.elts]
        return None if None in items or _weight(items) > WEIGHT else items
    if isinstance(node, ast.Dict) and len(node.keys) <= DEPTH:
        keys = [None if key is None else _value(key, names, depth + 1) for key in node.keys]
        values = [_value(item, names, depth + 1) for item in node.values]
        if all(isinstance(part, str) for part in (*keys, *values)):
            return dict(zip(keys, values, strict=True))
    return None


def _weight(value: Any) -> int:
    return 1 + sum(map(_weight, value)) if isinstance(value, list) else 1


def _talks(value: Any, depth: int = 0) -> Iterator[tuple[Message, ...]]:
    """The conversations that a list is, or holds."""
    if not isinstance(value, list) or not value or depth > 2:
        return
    if all(isinstance(turn, dict) for turn in value):
        turns = tuple(Message(role=turn.get("role", ""), content=turn.get("content", "")) for turn in value)
        roles = [turn.role for turn in turns]
        if len(turns) > 1 and roles[-1] == "assistant" and all(role in ROLES for role in roles):
            yield turns
    elif all(
        isinstance(pair, list) and len(pair) == 2 and all(isinstance(text, str) for text in pair) for pair in value
    ):
        for first, second in value:
            yield _talk(first, second)
    else:
        for part in value:
            yield from _talks(part, depth + 1)


def _prompted(names: Mapping[str, Any]) -> Iterator[tuple[Message, ...]]:
    """Conversations of a prompt and responses that are only known by their names."""
    prompts = [value for name, value in names.items() if PROMPT.fullmatch(name) and isinstance(value, str)]
    if len(prompts) != 1:
        return
    for name, value in names.items():
        if RESPONSE.fullmatch(name):
            for text in [value] if isinstance(value, str) else value:
                if isinstance(text, str):
                    yield _talk(prompts[0], text)


def _talk(prompt: str, response: str) -> tuple[Message, ...]:
    return Message(role="user", content=prompt), Message(role="assistant", content=response)


# --- scores -----------------------------------------------------------------------------------------------------------


def _in_comments(code: str) -> list[Printed]:
    """Numbers in the comments of a piece of Python."""
    comments = []
    try:
        for token in tokenize.generate_tokens(io.StringIO(code).readline):
            if token.type == tokenize.COMMENT:
                comments.append(token.string.lstrip("# "))
    except (tokenize.TokenError, SyntaxError, ValueError, RecursionError):
        pass  # what came before is as good as it was
    return _numbers(comments)


def _numbers(lines: Sequence[str]) -> list[Printed]:
    found: list[Printed] = []
    for line in lines:
        line = line.strip()[:400]
        if named := NAMED.search(line):
            texts = [named[1]]
        elif (bare := BARE.fullmatch(line)) and "." in bare[1]:
            texts = re.findall(NUMBER, bare[1])
        else:
            continue
        found += [printed for text in texts if (printed := _printed(text)) is not None]
    return found[: CONVERSATIONS * RUNS + 1]


def _printed(text: str) -> Printed | None:
    text = text.replace("−", "-")
    mantissa, _, exponent = text.lower().partition("e")
    decimals = len(mantissa.partition(".")[2]) - int(exponent or 0)
    return Printed(value=float(text), step=10.0**-decimals)


# --- what comes out -----------------------------------------------------------------------------------------------


async def reproduce(ask: Ask, probed: Probed, examples: Sequence[Example], family: Family) -> Reproduced:
    """Asks a model what its card shows, in every way that it takes, and compares.

    Args:
        ask: Asks the model; see `verl_rlar.serving.probe.Ask`.
        probed: The ways, and which one was found to be right.
        examples: Out of the card.
        family: For families with a score per step nothing is compared.
    """
    values = sum(len(example.conversations) for example in examples)
    if not examples or family != "sequence":
        note = "the examples in its card are not compared, as it scores by steps" if examples else ""
        return Reproduced(found=len(examples), values=values, note=note)
    conversations = [conversation for example in examples for conversation in example.conversations]
    best: dict[How, tuple[int, float, int, int | None]] = {}
    """By way, without its output: examples that came out, largest distance, and the output."""
    for way in dict.fromkeys(_input(one.how) for one in (*_first(probed), *probed.tried) if not one.error):
        try:
            scored = await ask(way, conversations)
        except (ToolTimeout, ToolUnavailable):
            raise
        except ToolError:
            continue  # it does not take these conversations so
        found = _compared(examples, [one.rows[0] for one in scored])
        if found is not None:
            best[way] = found
    nothing = Reproduced(found=len(examples), values=values)
    if not best:
        return replace(nothing, note="no way to ask it gives the scores that its card prints")
    order = {way: place for place, way in enumerate(best)}
    way = min(best, key=lambda way: (-best[way][0], best[way][1], order[way]))
    own = _input(probed.how)
    if own in best and best[own][0] == best[way][0] and (best[own][1] <= CLEARLY * best[way][1] or best[own][1] < 0.02):
        way = own
    count, worst, head, against = best[way]
    how = _output(probed, way, head, against)
    note = f"{count} of {len(examples)} examples in its card come out, {values} scores in all"
    if own not in best:
        note += "; not as the probe would ask it"
    return replace(nothing, reproduced=count, worst=round(worst, 4), how=how, telling=_telling(examples), note=note)


def _first(probed: Probed) -> list[Tried]:
    return [one for one in probed.tried if one.how == probed.how]


def _input(how: How) -> How:
    """A way to ask without the output that counts."""
    return replace(how, head=0, against=None, sign=1)


def _output(probed: Probed, way: How, head: int, against: int | None) -> How:
    """A way to ask with the output that the card prints, if the probe has nothing against it, and with the sign that
    the probe finds."""
    ways = [one for one in probed.tried if not one.error and _input(one.how) == way]
    printed = [one for one in ways if (one.how.head, one.how.against) == (head, against)]
    best = max(printed, key=lambda one: one.accuracy, default=None)
    better = max(ways, key=lambda one: one.accuracy, default=None)
    if best is None or better is None:
        return replace(way, head=head, against=against)
    if probed.sure and better.accuracy > best.accuracy + MARGIN:
        return better.how
    return best.how if probed.sure else replace(best.how, sign=1)


def _compared(
    examples: Sequence[Example], rows: Sequence[Sequence[float]]
) -> tuple[int, float, int, int | None] | None:
    """How many examples come out by the best of a model's outputs, the largest distance in them, and the output."""
    columns = len(rows[0])
    outputs: list[tuple[int, int | None]] = [(column, None) for column in range(columns)]
    if columns == 2:
        outputs.append((1, 0))
    results = []
    for head, against in outputs:
        raw = [row[head] - (0.0 if against is None else row[against]) for row in rows]
        near, begin = [], 0
        for example in examples:
            end = begin + len(example.conversations)
            near.append(min(_distance(raw[begin:end], run) for run in example.runs))
            begin = end
        hit = [distance for distance in near if distance <= 1.0]
        if hit:
            results.append((len(hit), max(hit), head, against))
    return min(results, key=lambda result: (-result[0], result[1])) if results else None


def _distance(raw: Sequence[float], run: Sequence[Printed]) -> float:
    """Largest distance of scores from printed ones, in tolerances: as they are, or as chances."""
    plain = max(abs(one - two.value) / _tolerance(two) for one, two in zip(raw, run, strict=True))
    if all(0.0 <= two.value <= 1.0 for two in run):
        chances = [1.0 / (1.0 + math.exp(-max(-500.0, min(500.0, one)))) for one in raw]
        return min(
            plain,
            max(abs(one - two.value) / (CLOSE_SHARE + two.step / 2) for one, two in zip(chances, run, strict=True)),
        )
    return plain


def _tolerance(printed: Printed) -> float:
    return CLOSE * max(1.0, abs(printed.value)) + printed.step / 2


def _telling(examples: Sequence[Example]) -> bool:
    """Whether printed scores are far enough from each other that another way would hardly hit them."""
    for example in examples:
        for run in example.runs:
            spread = max(one.value for one in run) - min(one.value for one in run)
            if len(run) >= 2 and spread > 4 * max(map(_tolerance, run)):
                return True
    return False
