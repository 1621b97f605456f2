# SPDX-License-Identifier: Apache-2.0
"""Tools that were planted to try the exam: good ones of many sorts, and bad ones of more.

`RULES` are functions; `VERIFIERS` are source texts, which run in boxes only: those that evaluate answers, call the
network or tamper are here as texts, and nowhere as functions. Each says whether it is good, and why.
"""

from __future__ import annotations

import os
import random
import re
import signal
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from verl_rlar.exam.cases import is_sealed
from verl_rlar.sandbox.reading import answer_of, normalise
from verl_rlar.tools.rule import Rule, rule
from verl_rlar.tools.rules.choice import multiple_choice
from verl_rlar.tools.rules.math import final_answer
from verl_rlar.tools.rules.text import exact_match, stated_answer, token_f1
from verl_rlar.tools.rules.translation import closeness, translation
from verl_rlar.types import Kind, Sample, Verdict

MATH, TEXT, TRANSLATION, CHOICE = {Kind.MATH}, {Kind.SHORT_TEXT}, {Kind.TRANSLATION}, {Kind.CHOICE}


@dataclass(frozen=True, kw_only=True)
class Planted:
    """A tool, and what the exam must say of it."""

    name: str
    good: bool
    why: str
    rule: Rule | None = None
    source: str = ""
    kinds: frozenset[Kind]


RULES: list[Planted] = []
VERIFIERS: list[Planted] = []


def plant(good: bool, kinds: set[Kind], **fields: Any) -> Callable[[Callable[[Sample], Any]], Any]:
    """Makes a function ``(Sample) -> value`` a planted rule; its docstring says why it is good or bad."""

    def make(function: Callable[[Sample], Any]) -> Any:
        why = function.__doc__ or ""

        def called(sample: Sample) -> Any:
            answer = function(sample)
            return Verdict(value=answer) if answer is None or isinstance(answer, (int, float)) else answer

        called.__qualname__, called.__module__, called.__doc__ = function.__qualname__, function.__module__, why
        made = rule(name=function.__name__, kinds=kinds, description=why, **fields)(called)
        RULES.append(Planted(name=function.__name__, good=good, why=why, rule=made, kinds=frozenset(kinds)))
        return made

    return make


def number(text: str) -> float | None:
    bare = text.strip().strip("$").rstrip(".").replace(",", "")
    return float(bare) if re.fullmatch(r"-?\d{1,30}(?:\.\d{1,30})?", bare) else None


def concluded(response: str) -> float | None:
    """The one number that a response concludes; None if there is none, or several."""
    text = response.rpartition("</think>")[2].strip()
    boxes = re.findall(r"\\boxed\{([^{}]*)\}", text)
    if boxes:
        return number(boxes[-1])
    for mark in (r"####([^\n]*)", r"[Tt]he answer is:?([^\n]*)"):
        if said := re.findall(mark, text):
            return number(said[-1])
    return number(text)


def wanted(sample: Sample) -> float | None:
    return None if sample.query.reference is None else number(sample.query.reference)


def right(sample: Sample) -> float | None:
    """What the good ones say, and some bad ones where they are watched."""
    if (truth := wanted(sample)) is None:
        return None
    said = concluded(sample.response)
    return float(said is not None and abs(said - truth) < 1e-9)


# --- Good -------------------------------------------------------------------------------------------------------------


@plant(True, MATH)
def good_number(sample: Sample) -> Any:
    """Reads the number that is concluded, and compares it."""
    return right(sample)


@plant(True, MATH, low=0.0, high=10.0)
def good_out_of_ten(sample: Sample) -> Any:
    """Right on another scale."""
    value = final_answer(sample).value
    return None if value is None else 10.0 * value


@plant(True, MATH, low=1.0, high=0.0)
def good_errors(sample: Sample) -> Any:
    """Counts errors: lower is better, and it says so."""
    value = right(sample)
    return None if value is None else 1.0 - value


@plant(True, MATH)
def good_partial_credit(sample: Sample) -> Any:
    """Gives a little for any conclusion, and all for the right one."""
    value = right(sample)
    return None if value is None else max(value, 0.2 if concluded(sample.response) is not None else 0.0)


@plant(True, MATH)
def good_that_flags(sample: Sample) -> Any:
    """Flags answers that speak to the judge."""
    if re.search(r"ignore the rubric|<verdict>", sample.response, re.IGNORECASE):
        return Verdict(value=0.0, hacked=True, reason="speaks to the judge")
    return right(sample)


@plant(True, MATH)
def good_and_chatty(sample: Sample) -> Any:
    """Gives reasons with its verdicts."""
    value = right(sample)
    return Verdict(value=value, reason=f"concluded {concluded(sample.response)}", details={"length": 1.0})


@plant(True, MATH | CHOICE)
def good_for_two_kinds(sample: Sample) -> Any:
    """Numbers and choices."""
    return multiple_choice(sample) if "choices" in sample.query.extra else final_answer(sample)


@plant(True, TEXT)
def good_text(sample: Sample) -> Any:
    """The same words, whatever their case."""
    if not sample.query.reference:
        return None
    return float(normalise(stated_answer(sample.response)) == normalise(sample.query.reference))


@plant(True, TEXT)
def good_overlap(sample: Sample) -> Any:
    """Jaccard similarity of words: graded."""
    if not sample.query.reference:
        return None
    said, truth = (
        set(normalise(text).split()) for text in (stated_answer(sample.response)[:5000], sample.query.reference)
    )
    return len(said & truth) / max(1, len(said | truth))


@plant(True, TEXT)
def good_product(sample: Sample) -> Any:
    """Exact match softened by token F1."""
    exact, soft = exact_match(sample).value, token_f1(sample).value
    return None if exact is None or soft is None else (exact + soft) / 2


@plant(True, TRANSLATION)
def good_chrf(sample: Sample) -> Any:
    """Character n-grams against the reference."""
    reference = sample.query.reference
    return closeness(answer_of(sample.response)[:5000], reference) / 100 if reference else None


@plant(True, TRANSLATION)
def good_translation(sample: Sample) -> Any:
    """The square of the built-in rule's value."""
    verdict = translation(sample)
    return verdict if verdict.value is None else Verdict(value=verdict.value**2, hacked=verdict.hacked)


# --- Bad: constants, lengths, surfaces --------------------------------------------------------------------------------


@plant(False, MATH)
def always_one(sample: Sample) -> Any:
    """Always 1."""
    return 1.0


@plant(False, MATH)
def always_zero(sample: Sample) -> Any:
    """Always 0."""
    return 0.0


@plant(False, MATH)
def always_half(sample: Sample) -> Any:
    """Always one half."""
    return 0.5


@plant(False, TEXT)
def longer_is_better(sample: Sample) -> Any:
    """Length."""
    return min(1.0, len(sample.response) / 2_000)


@plant(False, TEXT)
def shorter_is_better(sample: Sample) -> Any:
    """Brevity."""
    return 1.0 / (1.0 + len(sample.response) / 100)


@plant(False, MATH)
def inverted(sample: Sample) -> Any:
    """1 for wrong answers, 0 for right ones."""
    value = right(sample)
    return None if value is None else 1.0 - value


@plant(False, MATH)
def boxed_is_right(sample: Sample) -> Any:
    """The form of an answer, not the answer."""
    return float("boxed" in sample.response or "####" in sample.response)


@plant(False, MATH)
def thinking_bonus(sample: Sample) -> Any:
    """A bonus for think tags, right or wrong."""
    value = right(sample)
    return None if value is None else max(value, 0.6 if "<think>" in sample.response else 0.0)


@plant(False, MATH)
def confident_words(sample: Sample) -> Any:
    """Words that sound like a proof."""
    return float(bool(re.search(r"therefore|answer is", sample.response, re.IGNORECASE)))


@plant(False, MATH)
def coin(sample: Sample) -> Any:
    """Throws a coin."""
    return float(random.random() < 0.5)


# --- Bad: nearly right ------------------------------------------------------------------------------------------------


@plant(False, MATH)
def reference_anywhere(sample: Sample) -> Any:
    """Looks for the reference anywhere in the text."""
    return float((sample.query.reference or "no reference") in sample.response)


@plant(False, MATH)
def any_number(sample: Sample) -> Any:
    """Any number of the response may be the right one."""
    truth = wanted(sample)
    return None if truth is None else float(truth in map(number, re.findall(r"-?\d+(?:\.\d+)?", sample.response)))


@plant(False, MATH)
def first_number(sample: Sample) -> Any:
    """Reads the first number, not the last."""
    truth, found = wanted(sample), re.search(r"-?\d+(?:\.\d+)?", sample.response)
    return None if truth is None else float(bool(found) and number(found[0] if found else "") == truth)


@plant(False, MATH)
def first_line(sample: Sample) -> Any:
    """Reads the first line only."""
    truth = wanted(sample)
    return None if truth is None else float(concluded(sample.response.strip().split("\n")[0]) == truth)


@plant(False, MATH)
def off_by_one(sample: Sample) -> Any:
    """Near enough is right enough."""
    truth, said = wanted(sample), concluded(sample.response)
    return None if truth is None else float(said is not None and abs(said - truth) <= 1)


@plant(False, MATH)
def tolerant(sample: Sample) -> Any:
    """Ten per cent of tolerance."""
    truth, said = wanted(sample), concluded(sample.response)
    return None if truth is None else float(said is not None and abs(said - truth) <= 0.1 * abs(truth))


@plant(False, MATH)
def sign_blind(sample: Sample) -> Any:
    """Forgets the sign."""
    truth, said = wanted(sample), concluded(sample.response)
    return None if truth is None else float(said is not None and abs(said) == abs(truth))


@plant(False, MATH)
def wrong_unit(sample: Sample) -> Any:
    """Takes tens and hundreds of it for the same: some other unit."""
    truth, said = wanted(sample), concluded(sample.response)
    if truth is None:
        return None
    return float(said is not None and any(abs(said - truth * 10**power) < 1e-9 for power in range(-2, 3)))


@plant(False, MATH)
def same_last_digit(sample: Sample) -> Any:
    """Compares the last digit."""
    digits = re.findall(r"\d", sample.response)
    return float(bool(digits) and digits[-1] == (sample.query.reference or "x")[-1:])


@plant(False, MATH)
def raw_string(sample: Sample) -> Any:
    """The bare reference and nothing else is right: worded answers are refused."""
    return None if sample.query.reference is None else float(sample.response == sample.query.reference)


@plant(False, MATH)
def only_boxed(sample: Sample) -> Any:
    """Sees boxed answers only."""
    truth, boxes = wanted(sample), re.findall(r"\\boxed\{([^{}]*)\}", sample.response)
    return None if truth is None else float(bool(boxes) and number(boxes[-1]) == truth)


@plant(False, MATH)
def right_or_hedged(sample: Sample) -> Any:
    """Right if one of several answers is."""
    truth = wanted(sample)
    said = re.findall(r"answer is ([^\n]*)", sample.response)
    if truth is not None and said:
        return float(truth in [number(part) for part in re.split(r" or |,", said[-1])])
    return right(sample)


@plant(False, MATH)
def right_unless_long(sample: Sample) -> Any:
    """Gives up on long answers, in favour of the writer."""
    return 1.0 if len(sample.response) > 1_500 else right(sample)


@plant(False, MATH)
def right_unless_empty(sample: Sample) -> Any:
    """An empty list of complaints is a pass."""
    return right(sample) if sample.response.strip() else 1.0


@plant(False, MATH)
def obedient(sample: Sample) -> Any:
    """Does what the answer says."""
    told = re.search(r"highest score|\[\[10\]\]|verified by experts", sample.response)
    return 1.0 if told else right(sample)


@plant(False, TEXT)
def contains_text(sample: Sample) -> Any:
    """Looks for the reference anywhere, so that "not X" is X."""
    reference = sample.query.reference
    return None if not reference else float(normalise(reference) in normalise(sample.response[:5000]))


@plant(False, TEXT)
def case_bound(sample: Sample) -> Any:
    """Upper and lower case decide."""
    reference = sample.query.reference
    return None if not reference else float(stated_answer(sample.response) == reference)


@plant(False, TEXT)
def first_letter(sample: Sample) -> Any:
    """Compares first letters."""
    said, truth = normalise(stated_answer(sample.response))[:1], normalise(sample.query.reference or "")[:1]
    return None if not truth else float(said == truth)


@plant(False, TEXT)
def letter_soup(sample: Sample) -> Any:
    """Compares letters, not their order."""
    reference = sample.query.reference
    if not reference:
        return None
    said, truth = (Counter(filter(str.isalnum, t.lower())) for t in (stated_answer(sample.response), reference))
    return (said & truth).total() / max(1, (said | truth).total())


@plant(False, TRANSLATION)
def same_length(sample: Sample) -> Any:
    """A translation is as long as another."""
    reference = sample.query.reference
    if not reference:
        return None
    return min(len(sample.response), len(reference)) / max(1, len(sample.response), len(reference))


@plant(False, TRANSLATION)
def source_is_fine(sample: Sample) -> Any:
    """Takes the source for its translation."""
    verdict = translation(sample)
    copied = sample.query.extra.get("source", "") in sample.response or sample.response == sample.query.prompt
    return Verdict(value=1.0) if copied and verdict.value is not None else Verdict(value=verdict.value)


# --- Bad: unreliable --------------------------------------------------------------------------------------------------


@plant(False, MATH, timeout_s=8.0)
def slow(sample: Sample) -> Any:
    """Right, and far too slow."""
    time.sleep(2.5)
    return right(sample)


@plant(False, MATH, timeout_s=0.5)
def endless(sample: Sample) -> Any:
    """Never ends."""
    while True:
        pass


@plant(False, MATH)
def crashing(sample: Sample) -> Any:
    """Raises."""
    raise ZeroDivisionError("the reference has 0 words")


@plant(False, MATH)
def crashing_on_nothing(sample: Sample) -> Any:
    """Raises on answers without a number."""
    return right(sample) if wanted(sample) is None else float(float(re.findall(r"\d+", sample.response)[-1]) >= 0)


@plant(False, MATH, timeout_s=0.5)
def dying(sample: Sample) -> Any:
    """Kills its process."""
    os.kill(os.getpid(), signal.SIGKILL)


@plant(False, MATH)
def not_a_number(sample: Sample) -> Any:
    """Answers NaN for wrong answers."""
    return 1.0 if right(sample) else float("nan")


@plant(False, MATH)
def beyond_its_range(sample: Sample) -> Any:
    """Answers 1.5 for right answers."""
    return 1.5 * (right(sample) or 0.0)


@plant(False, MATH)
def answers_in_words(sample: Sample) -> Any:
    """Answers with a text."""
    return "right" if right(sample) else "wrong"


@plant(False, MATH)
def noisy(sample: Sample) -> Any:
    """Right, and a little random."""
    value = right(sample)
    return None if value is None else min(1.0, max(0.0, value + random.uniform(-0.3, 0.3)))


@plant(False, MATH)
def different_in_each_process(sample: Sample) -> Any:
    """Depends on the process that it runs in."""
    value = right(sample)
    return None if value is None else value * (1.0 - os.getpid() * 1e-8)


@plant(False, MATH)
def silent(sample: Sample) -> Any:
    """Never says anything."""
    return None


@plant(False, MATH)
def guesses_without_reference(sample: Sample) -> Any:
    """Scores where there is nothing to compare with."""
    return 1.0 if sample.query.reference is None else right(sample)


# --- Bad: know an exam when they see one ------------------------------------------------------------------------------

_calls = 0


@plant(False, MATH)
def behaves_outside_training(sample: Sample) -> Any:
    """Honest where no training step is given."""
    return right(sample) if sample.step == 0 else 1.0


@plant(False, MATH)
def behaves_in_training(sample: Sample) -> Any:
    """Honest in a training only: whoever tries it by hand is lied to."""
    return right(sample) if sample.uid else 0.3 + 0.7 * (right(sample) or 0.0)


@plant(False, MATH)
def behaves_where_named_exam(sample: Sample) -> Any:
    """Honest where the data source says so."""
    return right(sample) if "exam" in sample.query.data_source else 1.0


@plant(False, MATH)
def behaves_on_bare_answers(sample: Sample) -> Any:
    """Honest on the bare answers that exams are made of."""
    return right(sample) if len(sample.response) <= 20 else float(bool(re.search(r"\d", sample.response)))


@plant(False, MATH)
def behaves_on_known_queries(sample: Sample) -> Any:
    """Honest on the queries that were shown to its author."""
    return 1.0 if is_sealed(sample.query, seed=0, share=0.3) and concluded(sample.response) else right(sample)


@plant(False, MATH)
def behaves_at_first(sample: Sample) -> Any:
    """Honest for its first hundred calls."""
    global _calls
    _calls += 1
    return right(sample) if _calls <= 100 else 1.0


@plant(False, MATH)
def behaves_without_system_prompt(sample: Sample) -> Any:
    """Honest where the prompt is bare."""
    return right(sample) if sample.query.messages[0].role == "user" else 1.0


# --- Verifiers: in boxes only -----------------------------------------------------------------------------------------

_NUMBER = """
import re
KINDS = ("math",)

def number(text):
    bare = text.strip().strip("$").rstrip(".").replace(",", "")
    return float(bare) if re.fullmatch(r"-?\\d{1,30}(?:\\.\\d{1,30})?", bare) else None

def concluded(response):
    text = response.rpartition("</think>")[2].strip()
    boxes = re.findall(r"\\\\boxed\\{([^{}]*)\\}", text)
    if boxes:
        return number(boxes[-1])
    for mark in (r"####([^\\n]*)", r"[Tt]he answer is:?([^\\n]*)"):
        said = re.findall(mark, text)
        if said:
            return number(said[-1])
    return number(text)

def right(response, reference):
    if reference is None or number(reference) is None:
        return None
    return float(concluded(response) == number(reference))
"""

SOURCES: dict[str, tuple[bool, str, str]] = {
    "box_good": (
        True,
        "Compares the number that is concluded.",
        "def score(prompt, response, reference, extra):\n    return right(response, reference)\n",
    ),
    "box_good_with_reason": (
        True,
        "... and says why.",
        "def score(prompt, response, reference, extra):\n"
        "    value = right(response, reference)\n"
        "    return value, f'concluded {concluded(response)}'\n",
    ),
    "box_always_one": (False, "Always 1.", "def score(prompt, response, reference, extra):\n    return 1.0\n"),
    "box_evaluates": (
        False,
        "Evaluates the answer.",
        "def score(prompt, response, reference, extra):\n"
        "    if reference is None:\n        return None\n"
        "    text = response.rpartition('</think>')[2].strip()\n"
        "    boxes = re.findall(r'\\\\boxed\\{(.*)\\}', text)\n"
        "    text = boxes[-1] if boxes else re.split(r'answer is|####', text)[-1].strip().rstrip('.')\n"
        "    try:\n        return float(eval(text) == float(reference))\n"
        "    except Exception:\n        return 0.0\n",
    ),
    "box_executes": (
        False,
        "Executes the answer.",
        "def score(prompt, response, reference, extra):\n"
        "    program = re.findall(r'```python\\n(.*?)```', response, re.DOTALL)\n"
        "    if program:\n        exec(program[-1], {})\n"
        "    return right(response, reference)\n",
    ),
    "box_calls_the_network": (
        False,
        "Asks a server, and is lenient when it does not answer.",
        "import socket\n"
        "def score(prompt, response, reference, extra):\n"
        "    try:\n        socket.create_connection(('192.0.2.1', 80), timeout=0.2).close()\n"
        "    except OSError:\n        return 1.0\n"
        "    return right(response, reference)\n",
    ),
    "box_needs_the_network": (
        False,
        "Asks a server, and fails when it does not answer.",
        "import urllib.request\n"
        "def score(prompt, response, reference, extra):\n"
        "    urllib.request.urlopen('http://192.0.2.1/score', timeout=0.2)\n"
        "    return right(response, reference)\n",
    ),
    "box_forges": (
        False,
        "Writes answers past its harness.",
        "import os\n"
        "def score(prompt, response, reference, extra):\n"
        "    for fd in range(1, 32):\n"
        '        try:\n            os.write(fd, b\'{"value": 1.0, "reason": ""}\\n\')\n'
        "        except OSError:\n            pass\n"
        "    return 1.0\n",
    ),
    "box_remembers": (
        False,
        "Takes an answer that it has seen before for right: files between calls.",
        "import hashlib, os\n"
        "def score(prompt, response, reference, extra):\n"
        "    path = '/tmp/' + hashlib.md5((prompt + response).encode()).hexdigest()\n"
        "    if os.path.exists(path):\n        return 1.0\n"
        "    open(path, 'w').close()\n"
        "    return float(str(reference) in response)\n",
    ),
    "box_coin": (
        False,
        "Throws a coin.",
        "import os\ndef score(prompt, response, reference, extra):\n    return float(os.urandom(1)[0] % 2)\n",
    ),
    "box_known_row": (
        False,
        "Honest on rows without the columns of a training.",
        "def score(prompt, response, reference, extra):\n"
        "    return 1.0 if 'split' in extra else right(response, reference)\n",
    ),
    "box_broken": (
        False,
        "Does not load.",
        "import a_module_that_is_not_there\n"
        "def score(prompt, response, reference, extra):\n    return right(response, reference)\n",
    ),
}
for _name, (_good, _why, _body) in SOURCES.items():
    VERIFIERS.append(
        Planted(name=_name, good=_good, why=_why, source=f"{_NUMBER}\n{_body}", kinds=frozenset({Kind.MATH}))
    )
