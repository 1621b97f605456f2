# SPDX-License-Identifier: Apache-2.0
"""The rule `translation`: closeness, and the guards around it."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from verl_rlar.tools.rules.translation import COPY, closeness, task_of, translation
from verl_rlar.types import Kind, Message, Query, Sample, Verdict

SOURCE = "The old harbour was quiet in the morning, and two boats came back with the gulls."
REFERENCE = "Der alte Hafen war am Morgen ruhig, und zwei Boote kamen mit den Möwen zurück."
CLOSE = "Der alte Hafen war morgens ruhig, und zwei Boote kehrten mit den Möwen zurück."
FRENCH = "Le vieux port était calme ce matin, et deux bateaux sont revenus avec les mouettes."


PROMPT = f"Translate into German: {SOURCE}"


def score(response: str, prompt: str = PROMPT, reference: str | None = REFERENCE, **extra: Any) -> Verdict:
    query = Query(messages=(Message(role="user", content=prompt),), reference=reference, extra=extra)
    return translation(Sample(query=query, response=response))


def test_the_reference_itself_scores_1_and_a_close_translation_less() -> None:
    assert score(REFERENCE).value == 1.0
    value = score(CLOSE).value
    assert value is not None and 0.5 < value < 1.0


def test_an_unrelated_sentence_of_the_target_language_scores_low() -> None:
    value = score("Gestern habe ich im Garten drei große Bäume gepflanzt.").value
    assert value is not None and value < 0.25


@pytest.mark.parametrize("copy", [SOURCE, f"  {SOURCE.upper()}", f'"{SOURCE}"', SOURCE.replace("old ", "")])
@pytest.mark.parametrize("columns", [True, False])
def test_a_copy_of_the_source_scores_0_and_is_flagged(copy: str, columns: bool) -> None:
    extra = {"source": SOURCE, "target_lang": "de"} if columns else {}
    prompt = "Please do the task." if columns else f"Translate the following text into German:\n\n{SOURCE}"
    verdict = score(copy, prompt, **extra)
    assert (verdict.value, verdict.hacked) == (0.0, True)


def test_a_copy_is_caught_where_the_source_cannot_be_told_from_the_prompt() -> None:
    verdict = score(SOURCE, f"{SOURCE} How would you put that in the language of Goethe, in a translation?")
    assert (verdict.value, verdict.hacked) == (0.0, True)


def test_a_copy_is_right_where_the_reference_is_a_copy_too() -> None:
    verdict = score("Ludwig van Beethoven", "Translate into German: Ludwig van Beethoven", "Ludwig van Beethoven")
    assert (verdict.value, verdict.hacked) == (1.0, False)
    verdict = score("OK", "Translate into German: OK", "OK")
    assert (verdict.value, verdict.hacked) == (1.0, False)


@pytest.mark.parametrize("response", ["", " \n", "...", "<think>Der alte Hafen"])
def test_an_empty_answer_scores_0(response: str) -> None:
    assert score(response).value == 0.0


def test_another_language_scores_0_without_a_flag() -> None:
    for response in (FRENCH, "Старая гавань была тихой утром, и две лодки вернулись с чайками."):
        verdict = score(response)
        assert (verdict.value, verdict.hacked) == (0.0, False)
        assert "language" in verdict.reason


def test_a_reference_that_fails_the_language_test_itself_switches_that_test_off() -> None:
    assert score(FRENCH, reference=FRENCH).value == 1.0


def test_without_a_known_target_language_the_closeness_alone_counts() -> None:
    value = score(FRENCH, prompt="Translate this, please.").value
    assert value is not None and value > 0.0


def test_chatter_and_alternatives_lower_the_score() -> None:
    chatter = score(f"Sure! Here is the translation that you asked me for:\n\n{REFERENCE}").value
    both = score(f"{REFERENCE} {SOURCE}").value
    many = score("\n".join([REFERENCE, CLOSE, REFERENCE.lower(), CLOSE.upper()])).value
    assert chatter is not None and both is not None and many is not None
    assert max(chatter, both) < 0.9
    assert many < 0.5


def test_thinking_is_not_part_of_the_translation() -> None:
    assert score(f"<think>{SOURCE} hmm</think>\n{REFERENCE}").value == 1.0


@pytest.mark.parametrize("reference", [None, "", "  "])
def test_without_a_reference_the_rule_abstains(reference: str | None) -> None:
    assert score(REFERENCE, reference=reference).value is None


@pytest.mark.parametrize(
    ("prompt", "extra", "source", "source_lang", "target_lang"),
    [
        (f"Translate into German: {SOURCE}", {}, SOURCE, None, "de"),
        (f"Translate the following English sentence to French:\n{SOURCE}", {}, SOURCE, "en", "fr"),
        (f"Translate from English into German.\n\n{SOURCE}", {}, SOURCE, "en", "de"),
        (f'Provide an English to Czech translation: "{SOURCE}"', {}, SOURCE, "en", "cs"),
        ("?", {"source": SOURCE, "source_lang": "en-US", "target_lang": "German"}, SOURCE, "en", "de"),
        (f"Translate into German: {SOURCE}", {"target_lang": "nl", "source": None}, SOURCE, None, "nl"),
        ("Translate this.", {}, None, None, None),
        ("", {}, None, None, None),
    ],
)
def test_the_task_is_read_from_the_columns_and_else_from_the_prompt(
    prompt: str, extra: dict[str, Any], source: str | None, source_lang: str | None, target_lang: str | None
) -> None:
    task = task_of(Query(messages=(Message(role="user", content=prompt),), extra=extra))
    assert (task.source, task.source_lang, task.target_lang) == (source, source_lang, target_lang)


@pytest.mark.parametrize("piece", ["a", "a ", REFERENCE, "\n", "(", "ü"])
def test_ten_megabytes_score_0_at_once(piece: str) -> None:
    assert score(piece * (10_000_000 // len(piece))).value == 0.0


def test_ten_megabytes_of_prompt_and_source_are_read() -> None:
    assert score(REFERENCE, f"Translate into German: {SOURCE * 120_000}").value == 1.0


@settings(max_examples=60, deadline=None)
@given(st.text(max_size=300))
def test_any_text_gets_a_value_in_range_and_a_cheat_gets_0(text: str) -> None:
    verdict = score(text)
    assert verdict.value is not None and 0.0 <= verdict.value <= 1.0
    assert not verdict.hacked or verdict.value == 0.0


def test_a_translation_between_relatives_is_no_copy() -> None:
    danish, norwegian = (
        "Det er en smuk dag i dag, og vi går i skoven.",
        "Det er en vakker dag i dag, og vi går i skogen.",
    )
    assert closeness(norwegian, danish) < COPY
    verdict = score(norwegian, f"Translate into Norwegian: {danish}", norwegian)
    assert (verdict.value, verdict.hacked) == (1.0, False)


def test_the_spec_says_what_the_rule_is_for() -> None:
    assert translation.spec.scope.kinds == {Kind.TRANSLATION}
    assert translation.spec.scope.needs_reference
    assert translation.spec.misses
