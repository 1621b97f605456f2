# SPDX-License-Identifier: Apache-2.0
"""Examples are found in model cards as people write them, and nothing in a card is run, raised or waited for."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from verl_rlar.card_examples import (
    BLOCK_CHARS,
    CONVERSATIONS,
    Example,
    Printed,
    Reproduced,
    examples_of,
    reproduce,
)
from verl_rlar.errors import ToolError
from verl_rlar.serving import Conversation, How, Probed, Scored
from verl_rlar.serving.probe import Tried
from verl_rlar.types import Message

TALK = (Message(role="user", content="Two plus two?"), Message(role="assistant", content="It is 4."))
OTHER = (TALK[0], Message(role="assistant", content="It is 5."))

CONVERSATION_LISTS = """
model = load("somebody/reward")  # 8 B parameters
question = "Two plus two?"
right = "It is 4."
wrong = "It is " + "5."
first = [{"role": "user", "content": question}, {"role": "assistant", "content": right}]
second = [{"role": "user", "content": question}, {"role": "assistant", "content": wrong}]
inputs = tokenizer.apply_chat_template(first, tokenize=False)
with torch.no_grad():
    print(model(inputs).logits)
# Score for response 1: 3.25
# Score for response 2: -1.5
"""
PAIRS = """
scores = ranker.predict([("Two plus two?", "It is 4."), ["Two plus two?", "It is 5."]])
print(scores)  # [3.25, -1.5]
"""
IN_A_CALL = """
print(score([{"role": "user", "content": "Two plus two?"}, {"role": "assistant", "content": "It is 4."}]))
# tensor([[3.25]])
print(score([{"role": "user", "content": "Two plus two?"}, {"role": "assistant", "content": "It is 5."}]))
# tensor([[-1.5]])
"""
NAMES = """
>>> prompt = "Two plus two?"
>>> responses = ["It is 4.", "It is 5."]
>>> for response in responses:
...     print(reward(prompt, response))
# >>> 3.25
# >>> -1.5
"""


def card(code: str, after: str = "") -> str:
    return f"---\nlicense: mit\n---\n# A model\n\nWords.\n\n```python{code}```\n{after}\nMore words: 12.5.\n"


@pytest.mark.parametrize("code", [CONVERSATION_LISTS, PAIRS, IN_A_CALL, NAMES])
def test_examples_are_found_as_people_write_them(code: str) -> None:
    [example] = examples_of(card(code))
    assert example.conversations == (TALK, OTHER)
    assert [[printed.value for printed in run] for run in example.runs] == [[3.25, -1.5]]
    assert [printed.step for printed in example.runs[0]] == [0.01, 0.1]


def test_printed_scores_may_stand_in_a_block_below() -> None:
    bare = CONVERSATION_LISTS.partition("# Score")[0]
    [example] = examples_of(
        card(bare, "This prints\n\n```\nreward of the first: 3.25\nreward of the second: −1.5\n```\n")
    )
    assert [printed.value for printed in example.runs[0]] == [3.25, -1.5]
    assert examples_of(card(bare, "```python\nprint(1)\n# 3.25\n# -1.5\n```\n")) == ()


def test_scores_of_several_models_are_several_runs() -> None:
    more = CONVERSATION_LISTS + "# and the large one:\n# Score for response 1: 7.5\n# Score for response 2: -9e-1\n"
    [example] = examples_of(card(more))
    assert [[printed.value for printed in run] for run in example.runs] == [[3.25, -1.5], [7.5, -0.9]]
    assert example.runs[1][1].step == pytest.approx(0.1)


@pytest.mark.parametrize(
    "code",
    [
        CONVERSATION_LISTS.replace("# Score for response 2: -1.5\n", ""),  # a score is missing
        CONVERSATION_LISTS.replace('"content": wrong', '"content": generate(question)'),  # a text is not known
        CONVERSATION_LISTS.replace("model = load", "model = = load"),  # no Python
        "\nprint('no example')\n# 1.0\n",
        '\ntalk = [{"role": "user", "content": "a"}, {"role": "user", "content": "b"}]\n# 1.0\n',
        "\ntalks = ["
        + '["a", "b"], ' * 0
        + ", ".join(f'["a", "{n}"]' for n in range(CONVERSATIONS + 1))
        + "]\n# 1.0\n",
    ],
)
def test_what_cannot_be_told_for_sure_is_no_example(code: str) -> None:
    assert examples_of(card(code)) == ()


def test_nothing_in_a_card_is_run() -> None:
    code = (
        '\nprompt = __import__("os").abort() or "a"\nresponse = exec("raise SystemExit")\n'
        'talk = [{"role": "user", "content": (lambda: 1/0)()}, {"role": "assistant", "content": "b"}]\n# 1.0\n'
    )
    assert examples_of(card(code)) == ()


HOSTILE = {
    "signs": "-" * BLOCK_CHARS + "1",
    "brackets": "x = " + "[" * 8000,
    "calls": "x = " + "f(" * 8000,
    "dots": "a." * 8000 + "b",
    "a list of lists of lists": "\n".join(["a = ['x']"] + ["a = [a, a]"] * 500),
    "a text that doubles": "\n".join(["a = 'x'"] + ["a = a + a"] * 500),
    "a long sum": "a = " + " + ".join(["'x'"] * 3000),
    "a comment of numbers": "# " + "1.0 " * 4000,
    "a comment of brackets": "# score: " + "[(" * 8000,
    "an open string": "a = '''",
    "NUL": "a = '\0'",
}


@pytest.mark.timeout(60)
@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_card_costs_little_and_raises_nothing(name: str) -> None:
    for text in (card(f"\n{HOSTILE[name]}\n"), HOSTILE[name] * 4, "```\n" * 9000, "```" * 20000, "~~~\n```\n" * 9000):
        assert examples_of(text) == ()


@settings(deadline=None, max_examples=200)
@given(st.text(alphabet="`~\n#-[](){}'\":=+ .,0123456789apromptresponse", max_size=400))
def test_any_text_is_read(text: str) -> None:
    for found in (examples_of(text), examples_of(card(f"\n{text}\n"))):
        assert all(isinstance(example, Example) for example in found)


# --- what comes out ---------------------------------------------------------------------------------------------------

CHAT, PLAIN = How(), How(form="plain")


class Model:
    """A model whose outputs depend on how it is asked, as real ones' do."""

    def __init__(self, columns: int = 1) -> None:
        self.columns = columns

    def rows(self, how: How, texts: Conversation) -> tuple[float, ...]:
        shift = {"chat": 0.0, "plain": 2.0, "pair": -3.0}[how.form] + (1.0 if how.eos else 0.0)
        quality = 4.0 if "4" in texts[-1].content else -4.0
        return tuple(quality * (1 + column) + shift + 10 * column for column in range(self.columns))

    async def ask(self, how: How, conversations: Sequence[Conversation]) -> list[Scored]:
        if how.form == "pair":
            raise ToolError("no pairs")
        return [Scored(value=0.0, rows=(self.rows(how, one),)) for one in conversations]


def probed(how: How, *others: How, sure: bool = True) -> Probed:
    """What a probe may have found: this way, and others beside it."""
    tried = (Tried(how=how, accuracy=0.9), *(Tried(how=one, accuracy=0.88) for one in others))
    turned = tuple(replace(one, how=replace(one.how, sign=-1), accuracy=1 - one.accuracy) for one in tried)
    return Probed(
        how=how, sure=sure, reason="", pairs=40, tried=(*tried, *turned, Tried(how=How(form="pair"), error="no"))
    )


def example(*values: float, step: float = 1e-6) -> Example:
    return Example(conversations=(TALK, OTHER), runs=(tuple(Printed(value=value, step=step) for value in values),))


async def test_scores_of_a_card_that_come_out_as_the_probe_asks_speak_for_it() -> None:
    found = await reproduce(Model().ask, probed(CHAT, PLAIN, replace(CHAT, eos=True)), [example(4.0, -4.0)], "sequence")
    assert found.how == CHAT and found.telling
    assert (found.found, found.values, found.reproduced) == (1, 2, 1) and found.worst == 0.0


async def test_another_way_that_gives_the_scores_of_the_card_is_preferred_to_the_probed_one() -> None:
    found = await reproduce(Model().ask, probed(CHAT, PLAIN), [example(6.0, -2.0)], "sequence")
    assert found.how == PLAIN and found.telling and "not as the probe would ask it" in found.note
    close = replace(CHAT, eos=True)  # within the tolerance of scores in bfloat16, and yet not the right one
    large = [example(105.0, 97.0)]

    class Large(Model):
        def rows(self, how: How, texts: Conversation) -> tuple[float, ...]:
            return (super().rows(how, texts)[0] + 100,)

    found = await reproduce(Large().ask, probed(CHAT, close), large, "sequence")
    assert found.how == close and found.worst == 0.0


async def test_scores_that_come_out_in_no_way_are_said_to() -> None:
    found = await reproduce(Model().ask, probed(CHAT, PLAIN), [example(9.0, 9.5)], "sequence")
    assert found.how is None and found.reproduced == 0 and "no way to ask it" in found.note and not found.telling


async def test_one_of_several_runs_is_enough_and_so_are_chances() -> None:
    runs = (*example(20.0, 1.0).runs, *example(4.0, -4.0).runs)
    found = await reproduce(
        Model().ask, probed(CHAT, PLAIN), [Example(conversations=(TALK, OTHER), runs=runs)], "sequence"
    )
    assert found.how == CHAT
    chances = example(0.982, 0.018, step=0.001)
    found = await reproduce(Model().ask, probed(CHAT, PLAIN), [chances], "sequence")
    assert found.how == CHAT and found.reproduced == 1


async def test_the_printed_output_is_taken_where_the_probe_does_not_mind() -> None:
    first, second = How(head=0), How(head=1)
    model = Model(columns=3)
    printed = [example(*(model.rows(CHAT, talk)[1] for talk in (TALK, OTHER)))]
    found = await reproduce(model.ask, probed(first, second, How(head=2)), printed, "sequence")
    assert found.how == second
    other = Probed(
        how=first,
        sure=True,
        reason="",
        pairs=40,
        tried=(Tried(how=first, accuracy=0.9), Tried(how=second, accuracy=0.5)),
    )
    found = await reproduce(model.ask, other, printed, "sequence")
    assert found.how == first, "the probe is sure that the printed output says nothing"


async def test_one_score_or_alike_ones_tell_nothing_about_the_way() -> None:
    single = Example(conversations=(TALK,), runs=((Printed(value=4.0, step=0.1),),))
    found = await reproduce(Model().ask, probed(CHAT), [single], "sequence")
    assert found.reproduced == 1 and not found.telling


async def test_what_scores_by_steps_is_not_compared() -> None:
    found = await reproduce(Model().ask, probed(CHAT), [example(4.0, -4.0)], "steps")
    assert found.how is None and "steps" in found.note
    assert await reproduce(Model().ask, probed(CHAT), [], "sequence") == Reproduced()
