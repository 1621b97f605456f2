# SPDX-License-Identifier: Apache-2.0
"""Rule `final_answer`: which answer counts, what equals what, and what hostile text can do to it."""

from __future__ import annotations

import threading
from fractions import Fraction
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from verl_rlar.sandbox.reading import LONGEST, TAIL, find_answer
from verl_rlar.tools.rules.math import _Parser, _tree, final_answer
from verl_rlar.types import Kind, Query, Sample, Verdict


def check(reference: str | None, response: str) -> Verdict:
    return final_answer(Sample(query=Query(messages=(), reference=reference), response=response))


def value(reference: str | None, response: str) -> float | None:
    return check(reference, response).value


WRAPPED = (
    "{}",
    r"\boxed{{{}}}",
    "so $\\boxed{{{}}}$.",
    "#### {}",
    "1 + 1 = 2\n#### {}\n",
    "The answer is {}.",
    "**Answer:** {}",
    "Final answer: ${}$",
    "\\[\n{}\n\\]",
    "<think>7, or \\boxed{{8}}</think> The answer is \\({}\\).",
)


@settings(deadline=None, max_examples=60)
@given(n=st.integers(-(10**7), 10**7), wrapper=st.sampled_from(WRAPPED))
def test_an_integer_is_found_in_every_wrapping_and_its_neighbours_are_not(n: int, wrapper: str) -> None:
    assert value(str(n), wrapper.format(n)) == 1.0
    assert value(str(n), wrapper.format(f"{n:,}")) == 1.0
    assert value(str(n), wrapper.format(n + 1)) == 0.0
    if n:
        assert value(str(n), wrapper.format(-n)) == 0.0


@settings(deadline=None, max_examples=60)
@given(
    f=st.fractions(-50, 50, max_denominator=60), k=st.integers(1, 5), frac=st.sampled_from(["frac", "dfrac", "tfrac"])
)
def test_a_fraction_is_the_same_in_every_spelling(f: Fraction, k: int, frac: str) -> None:
    reference = rf"\frac{{{f.numerator}}}{{{f.denominator}}}"
    sign = "-" if f < 0 else ""
    assert value(reference, rf"\boxed{{{sign}\{frac}{{{abs(f.numerator) * k}}}{{{f.denominator * k}}}}}") == 1.0
    assert value(reference, f"The answer is {f.numerator}/{f.denominator}") == float(f.denominator > 1)
    assert value(reference, rf"\boxed{{\frac{{{f.numerator + 1}}}{{{f.denominator}}}}}") == 0.0
    assert value(str(f), rf"\boxed{{{reference}}}") == 1.0


@pytest.mark.parametrize(
    ("reference", "undone", "done"),
    [
        ("50", ["19 + 31", r"\boxed{19+31}", "The answer is 100/2.", r"2 \cdot 25", "5(10)"], ["19 + 31 = 50"]),
        ("1024", ["2^{10}", "x = 2^10", r"\boxed{2^{9} + 512}"], ["1,024", "x = 1024", r"2^{10} = 1024"]),
        ("4", [r"\sqrt{16}", "12 \\div 3", "4!/6", r"\lfloor 4.2 \rfloor", r"\binom{4}{1}"], [r"\frac{12}{3}"]),
        (r"\frac{1}{2}", [r"1 - \frac{1}{2}", r"\frac{3}{2 \cdot 3}"], ["2/4", "0.5", r"\frac{2}{4}", "50%"]),
        (r"2^{10}", [], ["2^{10}", "1024", r"\boxed{2^9 \cdot 2}"]),
        ("3000000", [r"3 \cdot 1000000"], [r"3 \times 10^6", "3e6"]),
        (r"1 + \sqrt{5}", [r"(3 - 2) + \sqrt{5}"], [r"\sqrt{5} + 1"]),
        ("1, 2", ["1, 1 + 1"], ["2 and 1"]),
        ("50", [r"19\frac{31}{1}", r"19 \tfrac{62}{2}", r"19\frac{31}{\frac{1}{1}}"], ["50"]),
        ("50", ["19 - 31i^2", r"19 i^4 + 31", r"\frac{19i + 31i}{i}"], [r"\boxed{50}"]),
        ("589", [r"-19i \cdot 31i"], ["589"]),
        (r"\frac{101}{2}", [r"19\frac{63}{2}", "19 63/2"], [r"50\frac{1}{2}", "50 1/2"]),
        ("6 - 5i", [], ["6-5i", r"\boxed{-5i + 6}"]),
        ("3 hours", ["1 + 2 hours", "6/2 hours"], ["3 hours"]),
        ("60 km/h", [], ["60 km/h", "60"]),
    ],
)  # fmt: skip
def test_a_computation_that_is_left_to_be_done_is_no_answer(reference: str, undone: list[str], done: list[str]) -> None:
    """As a policy found in a training: asked for 19 + 31, say 19 + 31."""
    assert [response for response in undone if value(reference, response) != 0.0] == []
    assert [response for response in done if value(reference, response) != 1.0] == []
    assert "not worked out" in check("50", "19 + 31").reason


@settings(deadline=None, max_examples=40)
@given(items=st.lists(st.integers(-99, 99), min_size=2, max_size=5, unique=True), data=st.data())
def test_order_is_free_in_a_set_and_binding_in_a_tuple(items: list[int], data: st.DataObject) -> None:
    other = data.draw(st.permutations(items))
    comma = ", ".join(map(str, items))
    shuffled = ", ".join(map(str, other))
    assert value(rf"\{{{comma}\}}", rf"\boxed{{\{{{shuffled}\}}}}") == 1.0
    assert value(comma, rf"\boxed{{{shuffled}}}") == 1.0
    assert value(f"({comma})", rf"\boxed{{({shuffled})}}") == float(list(other) == items)
    assert value(rf"\{{{comma}\}}", rf"\boxed{{({comma})}}") == 0.0
    assert value(comma, rf"\boxed{{{', '.join(map(str, items[1:]))}}}") == 0.0


@pytest.mark.parametrize(
    ("reference", "right", "wrong"),
    [
        ("5 cm", ["5 cm", "5", "5cm", r"5\text{ cm}", "5 centimeters"], ["5 m", "5m", "5 cm^2", r"5\,\mathrm{mm}"]),
        ("5", ["5 cm", "5 apples", "5m"], ["6 cm", "5x"]),
        (r"864 \mbox{ inches}^2", ["864 square inches", "864"], ["864 inches", "864 square feet"]),
        (r"90^\circ", ["90", "90°", "90 degrees"], ["90 radians", "91°"]),
        (r"\$36", ["36", "$36", "36 dollars", "$36.00"], ["36 cents", "€36"]),
        ("50%", [r"50\%", "50 percent", "50", "0.5", "1/2"], ["5%", "0.05", "50 cm"]),
        ("0.5", ["50%", "1/2"], ["0.5%", "50"]),
        ("50", ["50%"], ["0.5"]),
        ("52_8", ["52_{8}", "52"], ["52_7", "53_8"]),
        ("(3,4]", ["(3, 4]", r"x \in (3,4]", r"3 < x \le 4"], ["(3,4)", "[3,4]", "[3,4)", "(4,3]", "3, 4"]),
        (r"(-\infty,1)\cup(2,3]", [r"(2,3]\cup(-\infty,1)"], [r"(2,3)\cup(-\infty,1)", r"(-\infty,1)"]),
        (r"3 \pm 2\sqrt{2}", [r"3-2\sqrt2, 3+\sqrt8"], [r"3+2\sqrt{2}", r"2 \pm 3\sqrt{2}"]),
        ("x=5", ["5", "x=5", "5=x"], ["y=5", "x=6"]),
        ("x=1, y=2", ["y=2, x=1"], ["x=2, y=1", "x=1"]),
        ("3", ["f(2)=3"], ["2x+y=3"]),
        ("6", [r"\boxed{6}", "6.0"], ["2 3", "5"]),
        ("5", [], ["2(3)", "2 3"]),
        ("0.0000001", ["1e-7"], ["0.0000002", "0"]),
        (r"\frac13", ["0.333333"], ["0.33", "0.3334"]),
        ("1+2i", ["2i+1", r"1 + 2\cdot i"], ["2+i", "1-2i"]),
        (r"\text{Evelyn}", ["Evelyn", "evelyn"], ["Eve", "nylevE"]),
        (r"\begin{pmatrix}1\\2\end{pmatrix}", [r"\begin{bmatrix} 1 \\ 2 \end{bmatrix}"], ["(1,2)"]),
        (r"\begin{pmatrix}1\\2\end{pmatrix}", [], [r"\begin{pmatrix}1&2\end{pmatrix}"]),
        (r"\begin{pmatrix} 1/5 \\ -18/5 \end{pmatrix}",
         [r"\begin{pmatrix}\frac{1}{5}\\[6pt]-\frac{18}{5}\end{pmatrix}"],
         [r"\begin{pmatrix}\frac{1}{5}\\[6pt]-1\end{pmatrix}"]),
        (r"\begin{pmatrix}1&2\\3&4\end{pmatrix}", [r"\left(\begin{array}{cc}1&2\\3&4\end{array}\right)"],
         [r"\left(\begin{array}{cc}1&2\\3&5\end{array}\right)"]),
        (r"\frac{1}{3}", [r"0.\overline{3}"], [r"0.\overline{4}", r"0.0\overline{3}"]),
        (r"0.1\overline{6}", [r"\frac16", r"0.1\overline{6}"], ["0.16"]),
        (r"(-\infty,2)\cup(3,\infty)", [r"x<2 \text{ or } x>3", r"x>3 or x<2"],
         ["x<2 and x>3", "x<2, x>3", r"x\le 2 or x>3", "x<2 or x<2", "x<2"]),
        ("2^{2021}", [r"2 \cdot 2^{2020}"], ["2^{2020}", "2^{2021}+1"]),
        ("2500000", ["2.5 million", r"2.5\text{ million}", r"\$2.5 million dollars", r"2\frac{1}{2}\text{ million}"],
         ["2.5 billion", "2.5", "25 million", "2 million + 500 thousand"]),
        ("5 million", ["5000000", "5 Million", "5", "5000 thousand"], ["5 billion", "5000", "5 thousand"]),
        ("3", ["3 million", "3 millionaires"], ["3000000 million"]),
    ],
)  # fmt: skip
def test_what_equals_the_reference(reference: str, right: list[str], wrong: list[str]) -> None:
    for answer in right:
        assert value(reference, rf"\boxed{{{answer}}}") == 1.0, answer
    for answer in wrong:
        assert value(reference, rf"\boxed{{{answer}}}") == 0.0, answer


@pytest.mark.parametrize(
    "response",
    [
        "She makes **$18** at the farmers' market every day.", "It takes 18 on Monday.",
        "The answer is 18 if all come.",
        "The answer is:\n\\[\n18\n\\]", "The answer is:\n\n$$\n18\n$$\n\nIt was 9 + 9.", "The answer is:\n```\n18\n```",
        "**Solution:**\n\nLet 3 be x. Then we get 15.\n\nSo the total is 18.", "Solution: first 3 + 4 = 7.\nThen 18.",
        "The result is 18.\n\nCheck: 9 * 2.", r"\boxed{\text{18 dollars}}", r"\boxed{\text{\$18}}",
        "The answer is `18`.", r"The answer is {\bf 18}.", r"\boxed{\bf{18}}", r"The answer is $\boldsymbol{18}$.",
    ],
)  # fmt: skip
def test_what_models_write_around_a_right_answer_does_not_make_it_wrong(response: str) -> None:
    assert value("18", response) == 1.0
    assert value("17", response) == 0.0


def test_listing_candidates_is_a_wrong_answer() -> None:
    for response in (
        r"\boxed{5} or \boxed{6}",
        r"\boxed{5, 6}",
        "The answer is 5 or 6.",
        "The answer is $5$ or $6$.",
        "5 or 6",
    ):
        assert value("5", response) == 0.0, response


def test_boxes_side_by_side_are_one_answer_with_several_values() -> None:
    assert value("1, 2", r"$x=\boxed{1}$ and $x=\boxed{2}$") == 1.0
    assert value("1, 2", r"\boxed{2}") == 0.0


def test_the_last_box_or_hashes_line_counts_whichever_is_later() -> None:
    assert value("5", "\\boxed{4} was wrong, so I start from scratch and get \\boxed{5}") == 1.0
    assert value("5", "\\boxed{4}\n#### 5") == 1.0
    assert value("5", "#### 5\nno wait: \\boxed{4}") == 0.0


def test_a_box_that_is_never_closed_is_no_answer() -> None:
    assert find_answer(r"\boxed{12") != "12"
    assert value("5", r"\boxed{5} and then \boxed{6") == 1.0


def test_a_heading_is_no_hashes_answer() -> None:
    assert value("5", "#### Step 3: add 4\nThe answer is 5.") == 1.0


def test_thoughts_are_no_answer() -> None:
    assert value("5", r"<think>\boxed{5}</think> I do not know.") == 0.0


def test_a_response_without_an_answer_scores_0_and_says_so() -> None:
    verdict = check("5", "I do not know.")
    assert verdict == Verdict(value=0.0, reason="no final answer found")
    assert value("5", "") == 0.0


@pytest.mark.parametrize("reference", [None, "", "  ", "???", "+-", r"\sum_{n=1}^3 n", r"\frac{1}{0}", "((1)"])
def test_a_reference_that_cannot_be_read_makes_it_abstain_whatever_the_response(reference: str | None) -> None:
    for response in ("5", "", str(reference)):
        assert value(reference, response) is None


def test_a_reference_may_be_a_worked_solution() -> None:
    assert value("3 + 4 = 7\n#### 7", "7") == 1.0
    assert value(r"It is $\boxed{7}$.", "7") == 1.0


def test_text_of_the_answer_is_never_executed(tmp_path: Path) -> None:
    target = tmp_path / "executed"
    code = f"__import__('pathlib').Path('{target}').touch()"
    for text in (
        code,
        f"({code})",
        rf"\text{{{code}}}",
        f"1+{code}",
        f"sqrt({code})",
        f"x={code}",
        code.replace("_", r"\_"),
    ):
        for response in (text, rf"\boxed{{{text}}}", f"#### {text}", f"The answer is {text}", f"${text}$"):
            assert value("5", response) in (0.0, 1.0)
            value(response, "5")
    assert not target.exists()


def test_it_never_calls_eval_or_a_parser_that_does(monkeypatch: pytest.MonkeyPatch) -> None:
    import builtins

    import sympy.parsing.sympy_parser as parser

    calls: list[str] = []
    real = builtins.eval
    monkeypatch.setattr(builtins, "eval", lambda source, *rest: calls.append(str(source)) or real(source, *rest))
    monkeypatch.setattr(parser, "eval_expr", lambda *args: calls.append(args[0]))
    for text in ("1/2", "(1+2)*3", "12.5", "x+1", "sqrt(2)", r"\frac{x}{2}", "1e5", "1,234", "5 cm", "(0,5)"):
        value("7", rf"\boxed{{{text}}}")
        value(text, "7")
    assert not calls


def test_it_works_off_the_main_thread() -> None:
    values: list[float | None] = []
    thread = threading.Thread(target=lambda: values.append(value(r"\frac{1}{2}", r"\boxed{0.5}")))
    thread.start()
    thread.join()
    assert values == [1.0]


HOSTILE = {
    "ten megabytes": "a " * 5_000_000,
    "ten megabytes of digits": "1" * 10_000_000,
    "open boxes": r"\boxed{" * 30_000,
    "many boxes": r"\boxed{1}" * 20_000,
    "dollars": "$" * TAIL,
    "open parentheses": r"\(" * 100_000,
    "open brackets": r"\[" * 100_000,
    "phrases": "answer is " * 20_000,
    "phrases without an end": "answer to " * 20_000,
    "hashes": "####" * 50_000,
    "spaces": "answer" + " " * TAIL,
    "thousands": "123," * 50_000,
    "stars": "*" * TAIL,
    "line ends": "x" + "\n" * TAIL + "x",
    "line ends of another machine": "\r\n" * (TAIL // 2) + "x",
    "a tower of powers": r"\boxed{9^{9^{9^{9^{9}}}}}",
    "a large power": r"\boxed{10^{10^{10}}}",
    "a large factorial": r"\boxed{100000000!}",
    "factorials": r"\boxed{5" + "!" * 300 + "}",
    "a large binomial": r"\boxed{\binom{100000000}{50000000}}",
    "a large sum": r"\boxed{\sum_{n=1}^{100000000} n}",
    "an expansion": r"\boxed{(x+y+z+1)^{500}}",
    "nested parentheses": r"\boxed{" + "(" * 250 + "1" + ")" * 250 + "}",
    "nested fractions": r"\boxed{" + r"\frac{1}{" * 11 + "1" + "}" * 11 + "}",
    "a long sum": r"\boxed{" + "1+" * 250 + "1}",
    "a box that is too long": r"\boxed{" + "1+" * LONGEST + "5}",
    "a zero denominator": r"\boxed{\frac{1}{0}}",
    "surrogates": "\ud800 \\boxed{\ud800}",
    "zero bytes": "\0\\boxed{\0}",
}


@pytest.mark.timeout(60)
@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_responses_are_wrong_answers_in_bounded_time(name: str) -> None:
    assert value("5", HOSTILE[name]) == 0.0


@settings(deadline=None, max_examples=150)
@given(st.text(alphabet="0123456789xyi+-*/^=<>()[]{}\\,;.!|%$_ \n&", max_size=25))
def test_any_text_gets_a_verdict_and_the_same_one_twice(text: str) -> None:
    first = check("5", rf"\boxed{{{text}}}")
    assert first.value in (0.0, 1.0)
    assert check("5", rf"\boxed{{{text}}}") == first


def test_the_spec_describes_it() -> None:
    spec = final_answer.spec
    assert spec.name == "final_answer" and spec.kind == "rule" and spec.scope.kinds == {Kind.MATH}
    assert (spec.low, spec.high) == (0.0, 1.0) and spec.misses


@pytest.mark.parametrize(
    "answer", ["i<1", r"e\begin{pmatrix}-i\end{pmatrix}", r"\frac{1}{0}", r"\sin\infty", r"\infty - \infty", "0/0"]
)
def test_an_answer_that_cannot_be_computed_is_wrong_not_our_failure(answer: str) -> None:
    assert value("5", rf"\boxed{{{answer}}}") == 0.0


@pytest.mark.parametrize(
    "answer",
    [
        "19{31}", "(19)31", "[19]31", "{19}{31}", "(49)1", r"\frac{19}{1}\frac{31}{1}", r"(19)\frac{62}{2}",
        r"19.\overline{0} 31.\overline{0}", r"\begin{vmatrix}19&-31\\1&1\end{vmatrix}",
    ],
)  # fmt: skip
def test_numbers_side_by_side_are_no_sum_and_a_determinant_is_not_worked_out(answer: str) -> None:
    assert value("50", rf"\boxed{{{answer}}}") == 0.0


@pytest.mark.parametrize(
    ("reference", "answer", "right"),
    [
        (r"\frac{5}{2}", r"2\frac12", True),
        ("2.5", r"(2)\frac12", True),
        (r"-\frac{5}{2}", r"-2\frac12", True),
        (r"\frac13", r"0.\overline3", True),
        (r"\frac13", r"0.\bar{3}", True),
        (r"(-\infty,2)\cup(3,\infty)", r"x<2 \text{ or } y>3", False),
        (r"(-\infty,2)\cup(3,\infty)", r"x<2, \text{ or } x>3", True),
        (r"(-\infty,2)\cup(3,\infty)", r"x<2 \lor x>3", True),
        (r"(-\infty,2)\cup(3,\infty)", r"x<2, x>3", False),
        (r"(-\infty,2]\cup[3,\infty)", r"x\leqslant 2 \text{ or } x\geqslant 3", True),
        (r"x<2 \text{ or } x>3", r"(-\infty,2)\cup(3,\infty)", True),
    ],
)
def test_mixed_and_repeating_numbers_and_alternatives(reference: str, answer: str, right: bool) -> None:
    assert value(reference, rf"\boxed{{{answer}}}") == float(right)


@pytest.mark.parametrize("answer", ["capitalandlowerlettersrunalltogether", "{" * 12 + "x" + "}y" * 12])
def test_each_factor_of_a_product_is_read_once(answer: str, monkeypatch: pytest.MonkeyPatch) -> None:
    read = []
    convert = _Parser.convert_postfix
    monkeypatch.setattr(_Parser, "convert_postfix", lambda self, term: read.append(term) or convert(self, term))
    assert _tree(answer) is not None
    assert len(read) == len(set(map(id, read))) > 20


@pytest.mark.parametrize(
    ("reference", "answer", "right"),
    [
        ("5", "<think>We get \\boxed{5}. But wait, let me verify", False),
        ("1234", "<think>hm 1234", False),
        ("1234", "So it is 1,234.\n#### <1234>", True),
        ("1234", "The answer is <1234>.", True),
        ("5", "<think>We get \\boxed{4}.</think>It is \\boxed{5}.", True),
        ("5", "We get \\boxed{4}.</think>It is \\boxed{5}.", True),
        (r"\log_2 5", r"\boxed{\log_{2} 5}", True),
        (r"\log_2 5", r"\boxed{\log_2 6}", False),
        (r"1+\frac{1}{2+\frac{1}{3+\frac{1}{4}}}", r"\boxed{\frac{43}{30}}", True),
    ],
)
def test_thinking_that_has_not_ended_is_no_answer_and_logarithms_have_bases(
    reference: str, answer: str, right: bool
) -> None:
    assert value(reference, answer) == float(right)


@pytest.mark.timeout(300)  # most of them would take for ever
@pytest.mark.parametrize("answer", ["1/2" * 40, "1" + "/21" * 100, "1:1" * 40, "|x|" * 60, r"\sin x" * 60, "A|" * 99])
def test_what_takes_sympy_or_the_grammar_long_is_not_read(answer: str) -> None:
    assert value("5", rf"\boxed{{{answer}}}") == 0.0
