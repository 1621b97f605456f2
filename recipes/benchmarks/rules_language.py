# SPDX-License-Identifier: Apache-2.0
"""Sections of `rules.py` on instruction following and translation.

- `ifeval_agreement`: our IFEval checks against `if-verifiable`, an independent packaging of IFEval's own program, on
  real answers, raw and made to satisfy or just miss a constraint; every disagreement is listed and judged by
  `JUDGEMENTS`.
- `ifbench_preferences`: pairs of answers of which people prefer the one that does what the prompt demands: the share of
  the demands that our checks can read out of the prompt, satisfied by the chosen and by the rejected answer.
- `translation_mqm`: the translation rule beside chrF and BLEU, judged by human MQM ratings; and its guards.

Needs the extra ``dev`` (if-verifiable with nltk). Nothing is downloaded: in place of nltk's pickled English model, its
Punkt is trained on the answers themselves (unsupervised, deterministic); so what is compared for sentences is Punkt's
algorithm, not that one model.
"""

from __future__ import annotations

import gzip
import json
import random
import re
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
from section import SectionResult

from verl_rlar.tools.rules.instruction import (
    CHECKS,
    Constraint,
    capital_words,
    count_keyword,
    instruction_constraints,
    satisfies,
    sentences,
)
from verl_rlar.tools.rules.language import written_in
from verl_rlar.tools.rules.translation import translation
from verl_rlar.types import Message, Query, Sample

DATA = Path(__file__).parents[1] / "data"
SEED = 20240
CASES_PER_KIND = 240
RESAMPLES = 2000


def rows_of(name: str) -> list[dict[str, Any]]:
    """The rows of a file in ``recipes/data``."""
    with gzip.open(DATA / name, "rt", encoding="utf-8") as lines:
        return [json.loads(line) for line in lines]


def interval(values: np.ndarray, statistic: Callable[[np.ndarray], float]) -> tuple[float, float]:
    """95 % bootstrap interval of a statistic over rows of values."""
    rng = np.random.default_rng(SEED)
    drawn = [statistic(values[rng.integers(0, len(values), len(values))]) for _ in range(RESAMPLES)]
    return float(np.quantile(drawn, 0.025)), float(np.quantile(drawn, 0.975))


# (a) IFEval checks against an independent implementation


@dataclass(frozen=True, kw_only=True)
class Case:
    """One answer and one constraint, and what both programs say of them."""

    kind: str
    arguments: dict[str, Any]
    text: str
    ours: bool
    theirs: bool | None
    """None where their program raises."""


DECLARATION = {
    "ar": "يولد جميع الناس أحرارا متساوين في الكرامة والحقوق. وقد وهبوا عقلا وضميرا.",
    "bg": "Всички хора се раждат свободни и равни по достойнство и права. Те са надарени с разум и съвест.",
    "bn": "সমস্ত মানুষ স্বাধীনভাবে সমান মর্যাদা এবং অধিকার নিয়ে জন্মগ্রহণ করে। তাঁদের বিবেক এবং বুদ্ধি আছে।",
    "de": "Alle Menschen sind frei und gleich an Würde und Rechten geboren. Sie sind mit Vernunft und Gewissen begabt.",
    "en": "All human beings are born free and equal in dignity and rights. They have reason and conscience.",
    "fa": "تمام افراد بشر آزاد به دنیا می‌آیند و از لحاظ حیثیت و حقوق با هم برابرند. همه دارای عقل و وجدان هستند.",
    "fi": "Kaikki ihmiset syntyvät vapaina ja tasavertaisina arvoltaan ja oikeuksiltaan. Heille on annettu järki.",
    "gu": "પ્રતિષ્ઠા અને અધિકારોની દૃષ્ટિએ સર્વ માનવો જન્મથી સ્વતંત્ર અને સમાન હોય છે. તેમનામાં વિચારશક્તિ હોય છે.",
    "hi": "सभी मनुष्यों को गौरव और अधिकारों के मामले में जन्मजात स्वतन्त्रता और समानता प्राप्त है।",
    "it": "Tutti gli esseri umani nascono liberi ed eguali in dignità e diritti.",
    "kn": "ಎಲ್ಲಾ ಮಾನವರೂ ಸ್ವತಂತ್ರರಾಗಿಯೇ ಜನಿಸಿದ್ದಾರೆ. ಹಾಗೂ ಘನತೆ ಮತ್ತು ಹಕ್ಕುಗಳಲ್ಲಿ ಸಮಾನರಾಗಿದ್ದಾರೆ.",
    "ko": "모든 인간은 태어날 때부터 자유로우며 그 존엄과 권리에 있어 동등하다. 인간은 이성과 양심을 부여받았다.",
    "mr": "सर्व मानवी व्यक्ती जन्मतः स्वतंत्र आहेत व त्यांना समान प्रतिष्ठा व समान अधिकार आहेत.",
    "ne": "सबै व्यक्तिहरू जन्मजात स्वतन्त्र हुन् ती सबैको समान अधिकार र महत्व छ। निजहरूमा विचार शक्ति र सद्विचार छ।",
    "pa": "ਸਾਰਾ ਮਨੁੱਖੀ ਪਰਿਵਾਰ ਆਪਣੀ ਮਹਿਮਾ, ਸ਼ਾਨ ਅਤੇ ਹੱਕਾਂ ਦੇ ਪੱਖੋਂ ਜਨਮ ਤੋਂ ਹੀ ਆਜ਼ਾਦ ਹੈ ਅਤੇ ਸਾਰੇ ਲੋਕ ਬਰਾਬਰ ਹਨ।",
    "pt": "Todos os seres humanos nascem livres e iguais em dignidade e em direitos. São dotados de razão.",
    "ru": "Все люди рождаются свободными и равными в своем достоинстве и правах. Они наделены разумом и совестью.",
    "sw": "Watu wote wamezaliwa huru, hadhi na haki zao ni sawa. Wote wamejaliwa akili na dhamiri.",
    "ta": "மனிதப் பிறிவியினர் சகலரும் சுதந்திரமாகவே பிறக்கின்றனர்; அவர்கள் மதிப்பிலும், உரிமைகளிலும் சமமானவர்கள்.",
    "te": "ప్రతిపత్తిస్వత్వముల విషయమున మానవులెల్లరును జన్మతః స్వతంత్రులును సమానులును నగుదురు.",
    "th": "มนุษย์ทั้งหลายเกิดมามีอิสระและเสมอภาคกันในเกียรติศักดิ์และสิทธิ ต่างมีเหตุผลและมโนธรรม",
    "ur": "تمام انسان آزاد اور حقوق و عزت کے اعتبار سے برابر پیدا ہوئے ہیں۔ انہیں ضمیر اور عقل ودیعت ہوئی ہے۔",
    "vi": "Tất cả mọi người sinh ra đều được tự do và bình đẳng về nhân phẩm và quyền. Mọi con người đều có lý trí.",
}
"""Universal Declaration of Human Rights, from article 1, in the languages that IFEval demands (public domain)."""

Made = tuple[dict[str, Any], str]


def _words(text: str) -> list[str]:
    return re.findall(r"[A-Za-z]{3,}", text) or ["word"]


def _paragraphs(text: str, number: int, join: str) -> str:
    """The text, dealt into a number of paragraphs."""
    words = text.split() or ["word"]
    size = max(1, -(-len(words) // number))
    return join.join(" ".join(words[i : i + size]) for i in range(0, len(words), size))


def _made(kind: str, text: str, rng: random.Random, own: dict[str, Any]) -> Made:
    """A constraint's arguments and an answer that satisfies them, just misses them, or lies close.

    Args:
        kind: Id of the constraint.
        text: A real answer.
        rng: Decides which.
        own: Arguments of that kind from IFEval's data.
    """
    words, near, relation = _words(text), rng.choice([-1, 0, 0, 1]), rng.choice(["less than", "at least"])
    word = rng.choice(words).lower()
    match kind:
        case "keywords:existence":
            return {"keywords": sorted({word, rng.choice(words).lower()})}, text
        case "keywords:forbidden_words":
            return {"forbidden_words": [word[: rng.choice([4, 99])]]}, text
        case "keywords:frequency":
            count = len(re.findall(rf"\b{word}\b", text, re.IGNORECASE))
            return {"relation": relation, "keyword": word, "frequency": max(1, count + near)}, text
        case "keywords:letter_frequency":
            letter = rng.choice(word)
            count = text.lower().count(letter)
            return {"let_relation": relation, "letter": letter, "let_frequency": max(1, count + near)}, text
        case "length_constraints:number_sentences":
            return {"relation": relation, "num_sentences": max(1, len(sentences(text)) + near)}, text
        case "length_constraints:number_words":
            return {"relation": relation, "num_words": max(1, len(re.findall(r"\w+", text)) + near)}, text
        case "length_constraints:number_paragraphs":
            number = rng.randint(2, 5)
            return {"num_paragraphs": number}, _paragraphs(text, max(1, number + near), "\n***\n")
        case "length_constraints:nth_paragraph_first_word":
            number = rng.randint(1, 4)
            dealt = _paragraphs(text, number, rng.choice(["\n\n", "\n\n", "\n\n\n", "\n"]))
            parts = [part for part in dealt.split("\n\n") if part.strip()]
            nth = rng.randint(1, len(parts))
            first = re.sub(r"\W.*", "", parts[nth - 1].split()[0].lower(), flags=re.S) or "the"
            first = rng.choice([first, first, word])
            return {"num_paragraphs": len(parts), "nth_paragraph": nth, "first_word": first}, dealt
        case "detectable_content:number_placeholders":
            number = rng.randint(1, 5)
            for name in rng.sample(words, min(len(words), max(0, number + near))):
                text = text.replace(name, f"[{name.lower()}]", 1)
            return {"num_placeholders": number}, text
        case "detectable_content:postscript":
            mark = rng.choice(["P.S.", "P.S", "PS:", "P.P.S", "p.s.", "P. S.", "P.P.S."])
            end = rng.choice([f"\n\n{mark} {' '.join(words[:6])}", f" {mark} {words[0]}", f"\n{mark}", ""])
            return own, text + end
        case "detectable_format:number_bullet_lists":
            number = rng.randint(1, 6)
            sign = rng.choice(["* ", "- ", "- ", "*", "-"])
            items = "".join(f"\n{sign}{' '.join(words[i : i + 5])}" for i in range(max(1, number + near)))
            return {"num_bullets": number}, rng.choice([text.split("\n")[0], words[0]]) + items
        case "detectable_format:title":
            title = " ".join(words[:4])
            return {}, rng.choice([f"<<{title}>>", f"<< {title} >>", f"<{title}>", "<<>>"]) + "\n" + text
        case "detectable_format:constrained_response":
            option = rng.choice(["yes", "no", "maybe"])
            said = f"My answer is {option}."
            return {}, rng.choice([said, said.lower(), f"{said} {text}", text])
        case "detectable_format:number_highlighted_sections":
            number, mark = rng.randint(1, 4), rng.choice(["*", "**"])
            for name in rng.sample(words, min(len(words), max(0, number + near))):
                text = re.sub(rf"\b{name}\b", f"{mark}{name}{mark}", text, count=1)
            return {"num_highlights": number}, text
        case "detectable_format:multiple_sections":
            number = int(own["num_sections"])
            parts = _paragraphs(text, max(1, number + near), "\n\n").split("\n\n")
            form = rng.choice(["{} {}", "{} {}", "**{} {}**", "{} {}:"])
            marked = [f"{form.format(own['section_spliter'], i)}\n{part}" for i, part in enumerate(parts, start=1)]
            return own, "\n\n".join(marked)
        case "detectable_format:json_format":
            document = rng.choice([{"answer": text}, [text, {"words": len(words)}], {words[0]: {"text": words[1:9]}}])
            said = json.dumps(document, indent=rng.choice([None, 2]), ensure_ascii=False)
            fenced = [f"```json\n{said}\n```", f"```\n{said}\n```"]
            return {}, rng.choice([said, *fenced, f"Here it is: {said}", said[:-1], str(document)])
        case "combination:repeat_prompt":
            prompt = own["prompt_to_repeat"]
            said = [f"{prompt}\n\n{text}", f"{prompt.upper()} {text}", f'"{prompt}" {text}', f"Sure. {prompt}"]
            return own, rng.choice(said)
        case "combination:two_responses":
            half = _paragraphs(text, 2, rng.choice(["\n******\n", "******", "\n\n", "\n***\n", "\n******\n******\n"]))
            return {}, rng.choice([half, half, f"{text}\n******\n{text}", f"******\n{half}"])
        case "change_case:english_capital":
            return {}, rng.choice([text.upper(), text.upper(), text.upper() + "\nok"])
        case "change_case:english_lowercase":
            return {}, rng.choice([text.lower(), text.lower(), text.lower() + "\nOK"])
        case "change_case:capital_word_frequency":
            for name in rng.sample(words, min(len(words), rng.randint(0, 6))):
                text = re.sub(rf"\b{name}\b", name.upper(), text, count=1)
            return {"capital_relation": relation, "capital_frequency": max(1, capital_words(text) + near)}, text
        case "startend:end_checker":
            phrase = rng.choice([own["end_phrase"], " ".join(text.split()[-4:])])
            ended = f"{text} {phrase}"
            return {"end_phrase": phrase}, rng.choice([text, ended, f'"{ended}"', f"{ended} Bye."])
        case "startend:quotation":
            return {}, rng.choice([f'"{text}"', f'"{text}"', f'"{text}', f"“{text}”", f"'{text}'"])
        case "punctuation:no_comma":
            return {}, rng.choice([text.replace(",", ""), text.replace(",", ";"), text])
        case "language:response_language":
            code = rng.choice([own["language"], rng.choice(sorted(DECLARATION))])
            other = rng.choice(sorted(DECLARATION))
            said = DECLARATION[code]
            said = rng.choice([said, said, DECLARATION[other], f"{said}\n\n{text}", f"{other}\n{said}"])
            return {"language": code}, said
    raise AssertionError(kind)


def _answers() -> list[str]:
    """All real answers that are shipped."""
    pairs = rows_of("ifbench_preferences.jsonl.gz")
    texts = [row["text"] for row in rows_of("answers.jsonl.gz")]
    return texts + [row[side][0] for row in pairs for side in ("chosen", "rejected")]


def cases() -> Iterator[tuple[str, dict[str, Any], str]]:
    """Kinds, arguments and answers: for each of the 25 kinds, as many raw answers (with arguments from IFEval's own
    data) as made ones. Real texts go round, so that each answer is used."""
    texts = _answers()
    german = [row["reference"] for row in rows_of("ted_mqm_ende.jsonl.gz") if len(row["reference"]) > 60]
    rng = random.Random(SEED)
    rng.shuffle(texts)
    own: dict[str, list[dict[str, Any]]] = {kind: [] for kind in CHECKS}
    for row in rows_of("ifeval.jsonl.gz"):
        for kind, arguments in zip(row["instruction_id_list"], row["kwargs"], strict=True):
            own[kind].append({name: value for name, value in arguments.items() if value is not None})
    at = 0
    for kind in CHECKS:
        for i in range(CASES_PER_KIND):
            text, arguments = texts[at % len(texts)], rng.choice(own[kind])
            at += 1
            if i % 2:
                yield kind, *_made(kind, text, rng, arguments)
            elif kind == "language:response_language" and i % 4:
                yield kind, {"language": rng.choice(["de", "de", "en", arguments["language"]])}, rng.choice(german)
            elif kind == "language:response_language":
                yield kind, {"language": rng.choice(["en", "en", "de", arguments["language"]])}, text
            else:
                yield kind, arguments, text


@lru_cache(maxsize=1)
def _independent() -> tuple[Callable[[str, dict[str, Any], str], bool | None], Callable[[str], list[str]]]:
    """A function that asks if-verifiable, strictly (None where it raises), and the sentence splitter that it uses."""
    import langdetect
    import nltk
    from if_verifiable.ifeval import instructions_util
    from if_verifiable.ifeval.instructions_registry import INSTRUCTION_DICT
    from nltk.tokenize import NLTKWordTokenizer
    from nltk.tokenize.punkt import PunktSentenceTokenizer, PunktTrainer

    langdetect.DetectorFactory.seed = 0
    try:
        nltk.data.find("tokenizers/punkt_tab/english")
        punkt = nltk.PunktTokenizer("english")
    except LookupError:
        trainer = PunktTrainer("\n\n".join(_answers()))
        punkt = PunktSentenceTokenizer(trainer.get_params())
    words = NLTKWordTokenizer()

    def word_tokenize(text: str) -> list[str]:
        return [token for sentence in punkt.tokenize(text) for token in words.tokenize(sentence)]

    instructions_util._get_sentence_tokenizer = lambda: punkt
    instructions_util.nltk = SimpleNamespace(word_tokenize=word_tokenize, tokenize=nltk.tokenize)

    def ask(kind: str, arguments: dict[str, Any], text: str) -> bool | None:
        if not text.strip():
            return False
        checker = INSTRUCTION_DICT[kind](kind)
        try:
            checker.build_description(**arguments)
            return bool(checker.check_following(text))
        except Exception:  # whatever their program raises is theirs
            return None

    return ask, punkt.tokenize


# Who is right where the two programs disagree, and why


@dataclass(frozen=True, kw_only=True)
class Judgement:
    """One reason for which the two programs disagree, checked on each case that it is claimed for."""

    kinds: tuple[str, ...]
    applies: Callable[[Case], bool]
    """Whether the reason holds for a disagreement."""
    right: str
    """``ours``, ``theirs``, or ``neither``: by IFEval's sentence, it cannot be said."""
    why: str


def _piece_of_word(case: Case) -> bool:
    words = case.arguments.get("keywords") or [case.arguments["keyword"]]
    return any(count_keyword(case.text, word) < case.text.lower().count(word.lower()) for word in words)


def _punkt_counts_list_numbers(case: Case) -> bool:
    """Whether both agree on the number of sentences once Punkt's pieces are mended: a piece without any word is no
    sentence, and one that ends in the number or letter of a list goes on in the next."""
    count, goes_on = 0, False
    for piece in _independent()[1](case.text):
        if any(map(str.isalnum, piece)):
            count += (not goes_on) + bool(re.search(r"\w[.!?]\s+\d{1,3}[.)]$", piece.strip()))
            goes_on = bool(re.search(r"(?:^|[\s,:*#(])(?:\d{1,3}|[A-Za-z]|vs)[.)]$", piece.strip()))
    return count == len(sentences(case.text))


def _holds_code(case: Case) -> bool:
    return "```" in case.text or len(re.findall(r"[;{}]\s*$", case.text, re.MULTILINE)) >= 3


def _marked_first_word(case: Case) -> bool:
    paragraphs = [part.strip() for part in case.text.split("\n\n") if part.strip()]
    paragraph = paragraphs[case.arguments["nth_paragraph"] - 1].lower()
    return case.ours and re.findall(r"\w+", paragraph)[:1] == [case.arguments["first_word"].lower()]


def _vacuous_postscript(case: Case) -> bool:
    return case.theirs is True and bool(re.search(r"p\.\s?(?:p\.\s?)?s\.?\s*$", case.text.lower()))


def _longer_postscript(case: Case) -> bool:
    marks = re.findall(r"(?:p\.\s?)+s\.", case.text.lower())
    return case.arguments["postscript_marker"] == "P.S." and bool(marks) and all(m.count("p") > 1 for m in marks)


def _bare_bullets(case: Case) -> bool:
    return bool(re.search(r"^\s*[-*]\s*$|^\s*(?:-{2,}|\*\s?\*\s?\*)", case.text, re.MULTILINE))


def _torn_by_nltk(case: Case) -> bool:
    return bool(re.search(r"[A-Z]’[a-z]|[A-Z]\[|\[[A-Z]|['\"(][A-Z]['\")]", case.text))


_CASES = ("change_case:english_capital", "change_case:english_lowercase")
JUDGEMENTS = (
    Judgement(
        kinds=("keywords:existence", "keywords:frequency"),
        applies=_piece_of_word,
        right="ours",
        why="the sentence says 'the word'; theirs also counts pieces of other words ('the' in 'they')",
    ),
    Judgement(
        kinds=("keywords:letter_frequency",),
        applies=lambda case: not case.arguments["letter"].isalpha(),
        right="ours",
        why="theirs replaces a letter that is not a-z by a random one and counts that",
    ),
    Judgement(
        kinds=("language:response_language",),
        applies=lambda case: (
            not case.ours
            and any(
                written_in(line, case.arguments["language"]) is False
                for line in (*case.text.split("\n"), *case.text.split("\n\n"))
            )
        ),
        right="ours",
        why="the ENTIRE response has to be in the language; one line or paragraph is in another",
    ),
    Judgement(
        kinds=("language:response_language",),
        applies=lambda case: not any(map(str.isalpha, case.text)),
        right="neither",
        why="numbers only, which are of no language; theirs counts what it cannot tell as satisfied",
    ),
    Judgement(
        kinds=("language:response_language",),
        applies=lambda case: case.ours and case.arguments["language"] == "en" and not re.search("[^ -~\\s]", case.text),
        right="ours",
        why="the text is English; langdetect, on which theirs relies, takes it for another language",
    ),
    Judgement(
        kinds=("length_constraints:number_sentences",),
        applies=lambda case: bool(re.search("[。！？।۔]", case.text)),
        right="ours",
        why="Punkt's English model does not know the full stops of other scripts",
    ),
    Judgement(
        kinds=("length_constraints:number_sentences",),
        applies=lambda case: _punkt_counts_list_numbers(case),
        right="ours",
        why="Punkt counts list numbers ('2.'), 'vs.', emoji or table rules as ends of sentences",
    ),
    Judgement(
        kinds=("length_constraints:number_sentences",),
        applies=_holds_code,
        right="neither",
        why="the answer is mostly code, in which sentences are not defined",
    ),
    Judgement(
        kinds=("length_constraints:nth_paragraph_first_word",),
        applies=_marked_first_word,
        right="ours",
        why="the paragraph's first word is the demanded one; theirs takes the bracket beside it for a letter",
    ),
    Judgement(
        kinds=("detectable_content:postscript",),
        applies=_vacuous_postscript,
        right="ours",
        why="a postscript says something; here the marker ends the answer",
    ),
    Judgement(
        kinds=("detectable_content:postscript",),
        applies=_longer_postscript,
        right="ours",
        why="a postscript 'starting with P.S.' is demanded, the answer's starts with P.P.S.",
    ),
    Judgement(
        kinds=("detectable_content:postscript",),
        applies=lambda case: not case.ours and bool(re.search(r"\wp\.\s?p\.\s?s", case.text.lower())),
        right="ours",
        why="theirs takes the end of a word for the first P ('help. P.S.')",
    ),
    Judgement(
        kinds=("detectable_format:number_highlighted_sections",),
        applies=lambda case: "****" in case.text,
        right="ours",
        why="text in four asterisks is emphasised; theirs sees two empty emphases around it",
    ),
    Judgement(
        kinds=("detectable_format:number_highlighted_sections",),
        applies=lambda case: not case.ours and bool(re.search(r"[\w)] ?\* ?[\w(]", case.text)),
        right="ours",
        why="theirs counts what stands between two signs of multiplication",
    ),
    Judgement(
        kinds=("detectable_format:number_highlighted_sections",),
        applies=lambda case: not case.ours and "***" in case.text,
        right="ours",
        why="theirs counts ***text*** twice",
    ),
    Judgement(
        kinds=("combination:two_responses",),
        applies=lambda case: not case.ours and any(not re.search(r"[^\W_]", p) for p in case.text.split("******")),
        right="ours",
        why="one of the two responses is a line of signs without a letter",
    ),
    Judgement(
        kinds=("length_constraints:number_words",),
        applies=lambda case: bool(re.search("[½¼¾²³①-⑳]", case.text)),
        right="neither",
        why="whether a sign such as ½ is a word; Python's \\w says yes, the regex module's says no",
    ),
    Judgement(
        kinds=("detectable_format:json_format",),
        applies=lambda case: not case.ours and case.text.strip()[:1] not in "[{`",
        right="ours",
        why="a quoted sentence or a number is not 'wrapped in JSON format'",
    ),
    Judgement(
        kinds=("detectable_content:number_placeholders",),
        applies=lambda case: "[]" in case.text or bool(re.search(r"\[\W*\]", case.text)),
        right="ours",
        why="theirs counts empty brackets, which hold no place",
    ),
    Judgement(
        kinds=("detectable_format:number_bullet_lists",),
        applies=_bare_bullets,
        right="ours",
        why="theirs counts bullets without text and horizontal rules as bullet points",
    ),
    Judgement(
        kinds=_CASES,
        applies=lambda case: case.ours and written_in(case.text.lower(), "en") is True,
        right="ours",
        why="the text is English; langdetect, on which theirs relies, takes it for another language",
    ),
    Judgement(
        kinds=_CASES,
        applies=lambda case: case.ours and written_in(case.text.lower(), "en") is None,
        right="neither",
        why="too little text to tell a language (a drawing, a number, two words)",
    ),
    Judgement(
        kinds=("change_case:capital_word_frequency",),
        applies=_torn_by_nltk,
        right="ours",
        why="theirs tears words and code apart (CAN’t, S[i]) and counts the capital pieces as words",
    ),
    Judgement(
        kinds=("startend:quotation",),
        applies=lambda case: case.ours and case.text.strip()[0] in "“„",
        right="ours",
        why="typographic double quotation marks are double quotation marks",
    ),
    Judgement(
        kinds=("punctuation:no_comma",),
        applies=lambda case: bool(re.search("[，،、]", case.text)),
        right="ours",
        why="commas of other scripts are commas",
    ),
    Judgement(
        kinds=tuple(CHECKS),
        applies=lambda case: not case.ours and len(set(re.findall(r"\w+", case.text.lower()))) <= 1,
        right="ours",
        why="a degenerate answer (one word again and again) satisfies nothing; theirs rewards it for what it lacks",
    ),
)
"""Every reason for which a disagreement is accepted. A case that none applies to is unjudged, and the section fails."""


def ifeval_agreement() -> SectionResult:
    """Our IFEval checks against if-verifiable."""
    ask, _ = _independent()
    found = []
    for kind, arguments, text in cases():
        ours = satisfies(text, Constraint(id=kind, arguments=arguments))
        found.append(Case(kind=kind, arguments=arguments, text=text, ours=ours, theirs=ask(kind, arguments, text)))
    outcomes = Counter((case.kind, case.theirs) for case in found)
    rarest = min(outcomes[kind, outcome] for kind in CHECKS for outcome in (True, False))
    judged: Counter[str] = Counter()
    notes = []
    for case in found:
        if case.ours == case.theirs:
            continue
        reason = next((j for j in JUDGEMENTS if case.kind in j.kinds and j.applies(case)), None)
        judged[reason.right if reason else "unjudged"] += 1
        notes.append(
            f"{case.kind} {json.dumps(case.arguments, ensure_ascii=False)}: ours {case.ours}, theirs {case.theirs}; "
            f"right: {reason.right if reason else 'UNJUDGED'}: {reason.why if reason else ''} | {_excerpt(case.text)}"
        )
    figures = {
        "cases": float(len(found)),
        "distinct_responses": float(len({case.text for case in found})),
        "kinds": float(len({case.kind for case in found})),
        "fewest_cases_of_one_kind_and_outcome": float(rarest),
        "agreement": 1 - sum(judged.values()) / len(found),
        "disagreements": float(sum(judged.values())),
        **{f"disagreements_right_{name}": float(judged[name]) for name in ("ours", "theirs", "neither")},
        "disagreements_unjudged": float(judged["unjudged"]),
    }
    goals: dict[str, str | float] = {
        "cases": ">= 2000",
        "distinct_responses": ">= 2000",
        "kinds": 25.0,
        "fewest_cases_of_one_kind_and_outcome": ">= 20",
        "disagreements_right_theirs": 0.0,
        "disagreements_unjudged": 0.0,
    }
    ok = (
        len(found) >= 2000
        and figures["distinct_responses"] >= 2000
        and figures["kinds"] == 25
        and rarest >= 20
        and judged["theirs"] == judged["unjudged"] == 0
    )
    return SectionResult(figures=figures, goals=goals, ok=ok, notes=tuple(notes))


def _excerpt(text: str) -> str:
    """The beginning and the end of a text, on one line."""
    line = json.dumps(text, ensure_ascii=False)
    return line if len(line) <= 160 else f"{line[:90]} ... {line[-60:]}"


# (b) Preference pairs


_N = r"(\d{1,4}|one|two|three|four|five|six|seven|eight|nine|ten)"
_NUMBERS = dict(zip("one two three four five six seven eight nine ten".split(), range(1, 11), strict=True))
_RELATION = {
    "exactly": r"exactly",
    "at least": r"at least|a minimum of|minimum of|no fewer than|no less than",
    "at most": r"no more than|at most|a maximum of|maximum of|up to|not exceed|not exceeding",
    "less than": r"less than|fewer than|under",
}
_ANY_RELATION = "|".join(_RELATION.values())
_COUNTED = re.compile(rf"({_ANY_RELATION})\s+{_N}\s+(words?|sentences?|bullet points?)\b", re.IGNORECASE)
_LONG = re.compile(rf"()\b{_N}\s+(words?|sentences?) long\b", re.IGNORECASE)
_TIMES = re.compile(
    rf"\bwords?\s+['‘\"“{{]([^'’\"”}}]+)['’\"”}}]\s+(?:should |must |needs to |to )?appears?\s+"
    rf"(?:({_ANY_RELATION})\s+)?{_N}\s+times?",
    re.IGNORECASE,
)
_KEYWORDS = re.compile(
    r"\bkeywords?:?\s+((?:(?:'[^']{1,40}'|\"[^\"]{1,40}\"|‘[^’]{1,40}’|“[^”]{1,40}”|\{[^}]{1,40}\})"
    r"(?:\s*,\s*and\s+|\s*,\s*|\s+and\s+)?)+)"
)
_QUOTED = re.compile(r"['\"‘“{]([^'\"’”}]+)['\"’”}]")
_SCOPED = re.compile(r"\b(?:each|every|per|which|where|whose)\b[^.;]{0,60}$", re.IGNORECASE)


def demands(prompt: str) -> list[tuple[str, dict[str, Any]]]:
    """The demands of a prompt that fixed phrases express and our checks can check, as IFEval's ids and arguments.

    A count within "each", "every", "per" ... is about a part of the answer and left out, as is everything about tone,
    content, headings, paragraphs (IFEval's are divided by asterisks) and layouts.
    """
    found: list[tuple[str, dict[str, Any]]] = []
    for match in (*_COUNTED.finditer(prompt), *_LONG.finditer(prompt)):
        if _SCOPED.search(prompt[: match.start()]):
            continue
        said, number, unit = match.groups()
        relation, count = _relation(said or "exactly"), _NUMBERS.get(number.lower()) or int(number)
        if unit.lower().startswith("word"):
            found.append(("length_constraints:number_words", {"relation": relation, "num_words": count}))
        elif unit.lower().startswith("sentence"):
            found.append(("length_constraints:number_sentences", {"relation": relation, "num_sentences": count}))
        elif relation == "exactly":
            found.append(("detectable_format:number_bullet_lists", {"num_bullets": count}))
    for match in _TIMES.finditer(prompt):
        word, said, number = match.groups()
        count = _NUMBERS.get(number.lower()) or int(number)
        arguments = {"relation": _relation(said or "exactly"), "keyword": word, "frequency": count}
        found.append(("keywords:frequency", arguments))
    for match in _KEYWORDS.finditer(prompt):
        found.append(("keywords:existence", {"keywords": _QUOTED.findall(match.group(1))}))
    return found


def _relation(said: str) -> str:
    return next(name for name, phrases in _RELATION.items() if said.lower() in phrases.split("|"))


def ifbench_preferences() -> SectionResult:
    """Whether the answer that people chose satisfies more of what the prompt demands."""
    shares, kinds = [], Counter[str]()
    rows = rows_of("ifbench_preferences.jsonl.gz")
    for row in rows:
        found = demands(row["prompt"])
        if not found:
            continue
        kinds.update(name for name, _ in found)
        ids, arguments = zip(*found, strict=True)
        messages = (Message(role="user", content=row["prompt"]),)
        query = Query(messages=messages, extra={"instruction_id_list": list(ids), "kwargs": list(arguments)})
        samples = [Sample(query=query, response=row[side][0]) for side in ("chosen", "rejected")]
        pair = [instruction_constraints(sample).value for sample in samples]
        if None in pair:
            raise AssertionError(f"our own constraints are unusable: {found}")
        shares.append(pair)
    values = np.array(shares, dtype=float)
    difference = values[:, 0] - values[:, 1]
    low, high = interval(difference, lambda drawn: float(drawn.mean()))
    wins, losses = int((difference > 0).sum()), int((difference < 0).sum())
    untied = difference[difference != 0] > 0
    win_low, win_high = interval(untied.astype(float), lambda drawn: float(drawn.mean()))
    figures = {
        "pairs": float(len(rows)),
        "checkable_pairs": float(len(values)),
        "demands": float(sum(kinds.values())),
        "chosen_share": float(values[:, 0].mean()),
        "rejected_share": float(values[:, 1].mean()),
        "difference": float(difference.mean()),
        "difference_low": low,
        "difference_high": high,
        "wins": float(wins),
        "ties": float(len(values) - wins - losses),
        "losses": float(losses),
        "wins_of_untied": wins / max(1, wins + losses),
        "wins_of_untied_low": win_low,
        "wins_of_untied_high": win_high,
    }
    notes = tuple(f"{name}: {count} demands" for name, count in kinds.most_common())
    return SectionResult(figures=figures, goals={"difference_low": "> 0"}, ok=low > 0, notes=notes)


# (c) Translation


_TASK = "Translate the following text into German: {}"


def _translated(source: str, reference: str, response: str) -> tuple[float, bool]:
    """The rule's value, and whether it saw a cheat; the task stands in the prompt only."""
    query = Query(messages=(Message(role="user", content=_TASK.format(source)),), reference=reference)
    verdict = translation(Sample(query=query, response=response))
    if verdict.value is None:
        raise AssertionError(verdict.reason)
    return verdict.value, verdict.hacked


def translation_mqm() -> SectionResult:
    """Pairwise accuracy against human MQM, beside chrF and BLEU; and the guards."""
    from sacrebleu.metrics.bleu import BLEU
    from sacrebleu.metrics.chrf import CHRF

    rows = rows_of("ted_mqm_ende.jsonl.gz")
    chrf, bleu = CHRF(), BLEU(effective_order=True)
    metrics: dict[str, Callable[[str, str, str], float]] = {
        "rule": lambda source, reference, text: _translated(source, reference, text)[0],
        "chrf": lambda source, reference, text: chrf.sentence_score(text, [reference]).score,
        "bleu": lambda source, reference, text: bleu.sentence_score(text, [reference]).score,
    }
    counts = []  # per segment: pairs, then right pairs by each metric
    zeroed = []
    for row in rows:
        texts = [output["text"] for output in row["outputs"].values()]
        mqm = np.array([output["mqm"] for output in row["outputs"].values()])
        gap = mqm[None, :] - mqm[:, None]  # > 0: the first is better
        pair = np.triu(np.abs(gap) >= 1, 1)
        line = [float(pair.sum())]
        for name, metric in metrics.items():
            score = np.array([metric(row["source"], row["reference"], text) for text in texts])
            if name == "rule":
                zeroed += [f"{row['source']!r} -> {_excerpt(texts[i])}" for i in np.flatnonzero(score == 0)]
            ahead = score[:, None] - score[None, :]
            right = np.where(ahead == 0, 0.5, (ahead * gap > 0).astype(float))
            line.append(float(right[pair].sum()))
        counts.append(line)
    values = np.array(counts)
    figures = {"segments": float(len(rows)), "pairs": float(values[:, 0].sum())}

    def accuracy(column: int) -> Callable[[np.ndarray], float]:
        return lambda drawn: float(drawn[:, column].sum() / drawn[:, 0].sum())

    for column, name in enumerate(metrics, start=1):
        figures[f"accuracy_{name}"] = accuracy(column)(values)
        figures[f"accuracy_{name}_low"], figures[f"accuracy_{name}_high"] = interval(values, accuracy(column))
    for column, name in ((2, "chrf"), (3, "bleu")):
        margin = lambda drawn, column=column: accuracy(1)(drawn) - accuracy(column)(drawn)  # noqa: E731
        figures[f"rule_minus_{name}"] = margin(values)
        figures[f"rule_minus_{name}_low"], figures[f"rule_minus_{name}_high"] = interval(values, margin)
    figures["human_scored_outputs_given_0"] = float(len(zeroed))

    long = [row for row in rows if len(row["source"]) >= 30 and len(row["reference"]) >= 30]
    others = [row["source"] for row in long[1:]] + [long[0]["source"]]
    foreign = [DECLARATION[code] for code in sorted(DECLARATION) if code != "de"]
    guards: dict[str, list[tuple[float, bool]]] = {
        "empty": [_translated(row["source"], row["reference"], " \n") for row in rows],
        "copy": [_translated(row["source"], row["reference"], f" {row['source'].upper()}") for row in long],
        "edited_copy": [_translated(row["source"], row["reference"], _edited(row["source"])) for row in long],
        "other_english": [
            _translated(row["source"], row["reference"], other) for row, other in zip(long, others, strict=True)
        ],
        "other_language": [
            _translated(row["source"], row["reference"], foreign[i % len(foreign)]) for i, row in enumerate(long)
        ],
    }
    for name, results in guards.items():
        figures[f"guard_{name}_zero"] = sum(value == 0 for value, _ in results) / len(results)
    figures["guard_copy_flagged"] = sum(hacked for _, hacked in guards["copy"]) / len(long)
    gold = [_translated(row["source"], row["reference"], row["reference"])[0] for row in rows]
    beside = [_translated(r["source"], r["reference"], f"{r['reference']} {r['source']}")[0] for r in long]
    figures["reference_itself"] = float(np.mean(gold))
    figures["reference_with_source_beside"] = float(np.mean(beside))
    least = dict.fromkeys(guards, 1.0) | {"other_english": 0.99}  # short sentences cannot always be told apart
    goals: dict[str, str | float] = {f"guard_{name}_zero": f">= {share:g}" for name, share in least.items()}
    goals |= {"guard_copy_flagged": 1.0, "reference_itself": 1.0}
    goals |= {"rule_minus_bleu": ">= 0", "rule_minus_chrf": ">= -0.005", "human_scored_outputs_given_0": "<= 10"}
    ok = (
        all(figures[f"guard_{name}_zero"] >= share for name, share in least.items())
        and figures["guard_copy_flagged"] == figures["reference_itself"] == 1
        and figures["rule_minus_bleu"] >= 0
        and figures["rule_minus_chrf"] >= -0.005
        and len(zeroed) <= 10
    )
    return SectionResult(figures=figures, goals=goals, ok=ok, notes=tuple(f"given 0: {case}" for case in zeroed))


def _edited(source: str) -> str:
    """A copy of a text with one word in twelve left out."""
    return " ".join(word for i, word in enumerate(source.split()) if i % 12 != 6)


SECTIONS: dict[str, Callable[[], SectionResult]] = {
    "ifeval_agreement": ifeval_agreement,
    "ifbench_preferences": ifbench_preferences,
    "translation_mqm": translation_mqm,
}
