# SPDX-License-Identifier: Apache-2.0
"""Which language a text is written in, as far as can be told.

What: one question, `written_in`, asked by the rules `instruction_constraints` and `translation`. Non-Latin languages
are first told by their script, which no statistics can get wrong; then py3langid (naive Bayes over byte n-grams, 140
languages, bundled in its wheel) decides.

Guarantees: deterministic; no downloads; linear time (long texts are read in part); the model is loaded once per
process and only read afterwards, so threads may share it.

Not covered: texts under `SHORT` letters are refuted by their script only, and lists of names are guessed at; code and
URLs count as text; two languages mixed within one line are taken for the stronger one; close relatives (Danish and
Norwegian, Croatian and Serbian, Indonesian and Malay, ...) count as each other.
"""

from __future__ import annotations

import re
from functools import cache, lru_cache
from typing import Any

SHORT = 20
"""Letters under which statistics are not trusted: on TED, py3langid is right for 70 % of German and English texts of
10-19 characters, for 99.9 % of longer ones."""

READ = 20_000
"""Characters of a text that are read."""

_CODES = {
    "iw": "he", "in": "id", "ji": "yi", "nb": "no", "nn": "no", "fil": "tl", "cmn": "zh", "yue": "zh", "bs": "hr",
    "pcm": "en",
}  # fmt: skip
"""Other codes of a language (and of languages that count as it) -> the code used here."""

_SCRIPTS: dict[str, str] = {
    "Arab": "\u0600-\u06ff\u0750-\u077f\u08a0-\u08ff\ufb50-\ufdff\ufe70-\ufeff",
    "Armn": "\u0530-\u058f",
    "Beng": "\u0980-\u09ff",
    "Cyrl": "\u0400-\u052f",
    "Deva": "\u0900-\u097f",
    "Ethi": "\u1200-\u139f",
    "Geor": "\u10a0-\u10ff",
    "Grek": "\u0370-\u03ff\u1f00-\u1fff",
    "Gujr": "\u0a80-\u0aff",
    "Guru": "\u0a00-\u0a7f",
    "Hang": "\u1100-\u11ff\u3130-\u318f\uac00-\ud7af",
    "Hani": "\u3400-\u4dbf\u4e00-\u9fff",
    "Hebr": "\u0590-\u05ff",
    "Jpan": "\u3040-\u30ff\u31f0-\u31ff\u4e00-\u9fff",
    "Khmr": "\u1780-\u17ff",
    "Knda": "\u0c80-\u0cff",
    "Laoo": "\u0e80-\u0eff",
    "Latn": "A-Za-z\u00aa\u00ba\u00c0-\u024f\u1e00-\u1eff",
    "Mlym": "\u0d00-\u0d7f",
    "Mymr": "\u1000-\u109f",
    "Orya": "\u0b00-\u0b7f",
    "Sinh": "\u0d80-\u0dff",
    "Taml": "\u0b80-\u0bff",
    "Telu": "\u0c00-\u0c7f",
    "Thai": "\u0e00-\u0e7f",
}
_KANA = re.compile("[\u3040-\u30ff]")
_ALONE = {
    "am": "Ethi", "bn": "Beng", "el": "Grek", "gu": "Gujr", "he": "Hebr", "hy": "Armn", "ja": "Jpan", "ka": "Geor",
    "km": "Khmr", "kn": "Knda", "ko": "Hang", "lo": "Laoo", "ml": "Mlym", "my": "Mymr", "or": "Orya", "pa": "Guru",
    "si": "Sinh", "ta": "Taml", "te": "Telu", "th": "Thai", "zh": "Hani",
}  # fmt: skip
"""Languages that (nearly) own their script: the script decides."""
_SHARED = {
    "ar": "Arab", "be": "Cyrl", "bg": "Cyrl", "fa": "Arab", "hi": "Deva", "mk": "Cyrl", "mr": "Deva", "ne": "Deva",
    "ps": "Arab", "ru": "Cyrl", "uk": "Cyrl", "ur": "Arab",
}  # fmt: skip
"""Languages of one script that others share: the script can only refute."""
_ANY = {"az", "kk", "ku", "ky", "mn", "sr", "tg", "tt", "ug", "uz", "yi"}
"""Languages written in several scripts: the script says nothing. Every other language is written in Latin letters."""
_ALIKE = ({"da", "no"}, {"hr", "sr", "sl"}, {"id", "ms", "jv"}, {"cs", "sk"}, {"pt", "gl"}, {"nl", "af"}, {"hi", "ne"})
"""Close relatives, told apart too unreliably to punish anyone."""


@lru_cache(maxsize=1024)
def code_of(language: str) -> str:
    """The primary subtag of a language code, lower case, synonyms merged: ``pt-BR`` -> ``pt``, ``iw`` -> ``he``."""
    primary = re.split("[-_]", language.strip().lower(), maxsplit=1)[0]
    return _CODES.get(primary, primary)


def is_known(language: str) -> bool:
    """Whether texts can be told to be in this language at all."""
    return code_of(language) in _ALONE or code_of(language) in _labels()


def written_in(text: str, language: str) -> bool | None:
    """Whether a text is in a language.

    Args:
        text: Any text; the first `READ` characters count.
        language: ISO 639-1 code, with or without a region.

    Returns:
        True or False, or None where it cannot be told: no letters, too short, no language stands out, or a language
        that the model does not know.
    """
    language, text = code_of(language), text[:READ]
    letters = sum(map(str.isalpha, text))
    if not letters:
        return None
    script = _ALONE.get(language) or _SHARED.get(language) or (None if language in _ANY else "Latn")
    if script:
        share = sum(map(str.isalpha, _pattern(script).findall(text))) / letters
        if share < 0.5:
            return False
        if language in _ALONE:
            kana = len(_KANA.findall(text)) / letters
            return share >= 0.7 and not (language == "zh" and kana > 0.1) and not (language == "ja" and kana < 0.05)
    if not is_known(language):
        return None
    likely: dict[str, float] = {}
    for label, probability in _model().rank(text):
        likely[code_of(label)] = likely.get(code_of(label), 0.0) + float(probability)
    best = max(likely, key=lambda label: likely[label])
    if best == language or any({best, language} <= group for group in _ALIKE):
        return True
    if likely[language] >= 0.8 * likely[best]:
        return True
    return False if likely[best] >= 0.5 and letters >= SHORT else None


@cache
def _pattern(script: str) -> re.Pattern[str]:
    return re.compile(f"[{_SCRIPTS[script]}]")


@lru_cache(maxsize=1)
def _labels() -> frozenset[str]:
    return frozenset(map(code_of, _model().labels))


@lru_cache(maxsize=1)
def _model() -> Any:
    from py3langid.langid import MODEL_FILE, LanguageIdentifier

    return LanguageIdentifier.from_model_file(MODEL_FILE, norm_probs=True)
