# SPDX-License-Identifier: Apache-2.0
"""The way of a reward model from the hub, or from a folder, to its exam.

    vet      what is at that commit is looked at, and the gate judges it; nothing is downloaded before
    fetch    its files come into the hub's cache
    bring    ... and it is served, asked in many ways, and described as a tool that an exam can be held on

How it is asked is chosen by evidence, the strongest first: a way that gives the scores which its own card prints; the
way that ranks the pairs of `verl_rlar.serving.probe` rightly; or else that ranks right and wrong answers of the user's
own data. Without any of these it is refused, unless the caller wants it so (`unsure`).

The direction is judged twice: by the probe, whose sign is a part of the tool (`How.sign`), and by the exam, whose
calibration learns it from the user's answers. Both stand on the card, and where the probe was sure and the exam learned
the opposite, the exam rejects the tool (`verl_rlar.exam.trial`).

Guarantees: everything is of one commit, which the tool's target names; what the gate refuses is not downloaded; of a
card's text, no more than one line of letters and digits gets into a description, in quotes.

Not covered: whether the model is any good, which is for the exam. A language model is asked as a judge for yes or no,
by the log-odds of the two; a judge with a question or a rating of its own needs a `How` of yours.
"""

from __future__ import annotations

import asyncio
import importlib.util
import re
import threading
import unicodedata
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from verl_rlar.card_examples import Reproduced, examples_of, reproduce
from verl_rlar.config import RlarConfig, ServingConfig
from verl_rlar.errors import ConfigError, HubCutShort, ModelRefused, ToolUnavailable
from verl_rlar.exam.cases import Expect
from verl_rlar.exam.evidence import Evidence
from verl_rlar.exam.subject import Subject
from verl_rlar.gate import Report, Scoring, check
from verl_rlar.hub import Hub, OnProgress
from verl_rlar.repository import GIB, NAME, HubModel
from verl_rlar.serving import GOLDEN_CONVERSATIONS, Golden, How, Pair, Probed, RewardModelPool, ServedModel, probe
from verl_rlar.serving.base import Conversation, Family, Scored
from verl_rlar.serving.judging import Judge
from verl_rlar.snapshots import read_folder
from verl_rlar.tools.reward_model import serving, target
from verl_rlar.types import Kind, Scope, ToolSpec

FAMILIES: Mapping[Scoring, Family] = {
    "one_logit": "sequence",
    "several_logits": "sequence",
    "process": "steps",
    "judge": "judge",
}
"""How a model is served, by how it scores. What is not here is refused before it is downloaded."""
ENCODERS = frozenset({"bert", "roberta", "xlm-roberta", "deberta-v2", "electra", "distilbert", "modernbert"})
"""Models that read pairs of texts, unless they have a chat template."""
OF_THE_HUB = frozenset({"access", "organisation", "licence", "claims", "card"})
"""Checks of the gate that are about strangers: a folder of the user's own needs no licence."""
MOST_TOKENS = 4096
"""Longest sequence that a model is asked with, whatever it could read."""
TIMEOUT_S = 30.0
"""Deadline of a call in training."""
WIDE = 1e6
"""Raw scores are not mapped to [0, 1] by their range, but by what the exam teaches: the range is as wide as any."""
OWN_PAIRS = 40
"""Most pairs that are made out of the user's data."""
TRIED = 12
"""Most ways to ask that are recorded."""
QUOTED = 160
"""Longest piece of a card in a description."""


@dataclass(frozen=True, kw_only=True)
class Vetted:
    """A model that passed the gate."""

    model: HubModel
    report: Report
    family: Family
    target: str
    """``repo@commit``, or ``/folder@hash``."""
    folder: Path | None = None
    """Where it lies, if it is one of the user's own."""


@dataclass(frozen=True, kw_only=True)
class Brought:
    """A model that is served, ready for its exam."""

    subject: Subject
    """The tool, and what is known of how it is asked."""
    served: ServedModel
    report: Report
    probed: Probed
    examples: Reproduced


def is_model(name: str) -> bool:
    """Whether a tool's name on the command line is a repository (``OWNER/NAME[@REVISION]``) or a model's folder."""
    if name.endswith(".py"):
        return False
    return name.startswith(("/", ".", "~")) or bool(NAME.fullmatch(name.partition("@")[0]))


def vet(name: str, hub: Hub) -> Vetted:
    """Looks at a model and lets the gate judge it; nothing but texts and headers is read.

    Args:
        name: ``OWNER/NAME``, ``OWNER/NAME@REVISION``, or a folder that begins with ``/``, ``.`` or ``~``.
        hub: The hub.

    Raises:
        ModelRefused: By the gate, or as nothing here can ask it; with all reasons.
        HubError: It cannot be looked at: gone, gated, offline, ...
        ConfigError: The name is none.
    """
    if not is_model(name):
        raise ConfigError(f"{name!r} is no model: write OWNER/NAME, OWNER/NAME@COMMIT, or ./FOLDER")
    folder: Path | None = None
    if NAME.fullmatch(name.partition("@")[0]):
        repo, _, revision = name.partition("@")
        model = hub.inspect(repo, revision or None)
        named = f"{model.repo}@{model.commit}"
    else:
        folder = Path(name).expanduser().resolve()
        model = read_folder(folder, hub.config)
        named = f"{folder}@{model.commit}"
    report = check(model, hub.config)
    if folder is not None:
        report = replace(report, checks=tuple(one for one in report.checks if one.name not in OF_THE_HUB))
    reasons = report.reasons
    family = FAMILIES.get(report.scoring) if report.scoring else None
    if not reasons and family is None:
        reasons = (
            f"scoring: {report.architecture} answers in words ({report.scoring}), and such models are not asked yet",
        )
    if reasons or family is None:
        raise _refused(named, "is refused, and nothing was downloaded", reasons)
    where = str(folder) if folder else model.repo
    return Vetted(model=model, report=report, family=family, target=target(where, model.commit), folder=folder)


def fetch(vetted: Vetted, hub: Hub, on_progress: OnProgress | None = None) -> Path:
    """Downloads a model that passed the gate, if it is not here.

    Raises:
        HubError: See `Hub.fetch`.
    """
    return vetted.folder or hub.fetch(vetted.model, on_progress)


async def bring(
    name: str,
    hub: Hub,
    pool: RewardModelPool,
    config: RlarConfig,
    *,
    kinds: Collection[Kind] = (Kind.OPEN,),
    pairs: Sequence[Pair] = (),
    taken: Collection[str] = (),
    unsure: bool = False,
    on_progress: OnProgress = lambda *_: None,
) -> Brought:
    """Brings a model to its exam: vets, fetches and serves it, finds out how it is asked, and describes it as a tool.

    Args:
        name: See `vet`.
        hub: Where it comes from.
        pool: Where it is served, beside what is; it stays there for the exam.
        config: The settings.
        kinds: What kinds of query it is for.
        pairs: Right and wrong answers of the user's own (`own_pairs`), asked where the built-in ones tell nothing.
        taken: Names that other tools have.
        unsure: Whether it is wanted also if nothing tells how it is asked.
        on_progress: Called with the stage, how much is done, and of how much.

    Raises:
        ModelRefused: By the gate, or as nothing tells how it is asked.
        HubError: It cannot be looked at or downloaded.
        ToolUnavailable: What serves it is missing, has no room for it, or cannot serve it.
    """
    able(config.serving)
    vetted = await asyncio.to_thread(vet, name, hub)
    folder = await _fetched(vetted, hub, on_progress)
    default = _default(vetted)
    model = ServedModel(
        name=vetted.target,
        revision=vetted.model.commit,
        path=str(folder),
        family=vetted.family,
        how=default,
    )
    on_progress("start", 0, 1)
    if not await pool.prefetch([model]):
        raise ToolUnavailable(
            f"{model.name}: there is no room for it ({vetted.report.weight_bytes / GIB:.2f} GiB) beside what is "
            "served: see rlar.serving.memory_gb, rlar.serving.gpus"
        )
    on_progress("start", 1, 1)
    asked = 0

    async def ask(how: How, conversations: Sequence[Conversation]) -> Sequence[Scored]:
        nonlocal asked
        try:
            scored = await pool.score(replace(model, how=how), conversations, config.serving.start_timeout_s)
        except ConnectionError as error:
            raise ToolUnavailable(f"{model.name}: its server died while it was asked: {error}") from None
        finally:
            asked += 1
            on_progress("probe", asked, None)
        return scored

    async with pool.lease(model):
        probed = await probe(ask, default=default, family=vetted.family)
        of, doubts = "built-in pairs", [f"built-in pairs: {probed.reason}"]
        if not probed.sure and pairs:
            own = await probe(ask, default=default, family=vetted.family, pairs=pairs)
            doubts.append(f"pairs of your own data: {own.reason}")
            if own.sure:
                probed, of = own, "pairs of your own data"
        examples = await reproduce(ask, probed, examples_of(vetted.model.card), vetted.family)
        how, chosen = _chosen(probed, examples)
        if not (probed.sure or examples.telling or unsure):
            raise _refused(
                model.name,
                "is refused: nothing tells how it is asked. Give --data with right and wrong answers (`chosen`, "
                "`rejected`) of what it is for; or --unsure, to have it examined all the same",
                [*doubts, f"its card: {examples.note or 'it shows no example with scores'}"],
            )
        scored = await ask(how, GOLDEN_CONVERSATIONS)
    golden = tuple(
        Golden(conversation=conversation, value=float(f"{one.value:.6g}"))
        for conversation, one in zip(GOLDEN_CONVERSATIONS, scored, strict=True)
    )
    spec = replace(
        draft(kinds),
        name=tool_name(vetted, taken),
        target=vetted.target,
        description=description_of(vetted),
        serving=serving(how, vetted.family, golden),
    )
    known = {
        "target": vetted.target,
        "architecture": vetted.report.architecture,
        "scoring": vetted.report.scoring,
        "outputs": vetted.report.labels,
        "parameters": vetted.report.parameters,
        "weight_bytes": vetted.report.weight_bytes,
        "licence": vetted.report.licence,
        "how": how.to_json(),
        "chosen": chosen,
        "probe": {
            "sure": probed.sure,
            "reason": probed.reason,
            "of": of,
            "pairs": probed.pairs,
            "tried": [one | {"error": one["error"][:200]} for one in probed.to_json()["tried"][:TRIED]],
        },
        "examples": examples.as_dict(),
        "sign": how.sign,
        "sign_is_sure": probed.sure,
    }
    subject = Subject(spec=spec, model=known)
    return Brought(
        subject=subject, served=replace(model, how=how), report=vetted.report, probed=probed, examples=examples
    )


async def _fetched(vetted: Vetted, hub: Hub, on_progress: OnProgress) -> Path:
    """`fetch` in a thread; if this is cancelled, the thread ends with the next piece that comes, which is kept."""
    stopped = threading.Event()

    def tell(_: str, done: int, total: int | None) -> None:
        if stopped.is_set():
            raise HubCutShort(f"{vetted.target}: the download was stopped; the next one goes on from there")
        on_progress("download", done, total)

    try:
        return await asyncio.to_thread(fetch, vetted, hub, tell)
    finally:
        stopped.set()


def able(config: ServingConfig) -> None:
    """Returns if what serves models is installed.

    Raises:
        ToolUnavailable: It is not; the message says what to install.
    """
    needed, extra = ("vllm", "vllm") if config.backend == "vllm" else ("transformers", "cpu")
    if importlib.util.find_spec(needed) is None:
        raise ToolUnavailable(
            f"{needed} is not installed, and rlar.serving.backend={config.backend} needs it to serve reward models: "
            f"pip install 'verl-rlar[{extra}]'"
        )


def draft(kinds: Collection[Kind]) -> ToolSpec:
    """A reward model for some kinds of query, before anything is known about it."""
    return ToolSpec(
        name="reward_model",
        kind="reward_model",
        target="",
        scope=Scope(kinds=frozenset(kinds), needs_reference=False),
        description="",
        low=-WIDE,
        high=WIDE,
        timeout_s=TIMEOUT_S,
        origin="user",
    )


def own_pairs(evidence: Evidence, most: int = OWN_PAIRS) -> tuple[Pair, ...]:
    """A right and a wrong answer to each of the queries that are not sealed, labelled ones first."""
    found: dict[str, dict[Expect, tuple[bool, str, str]]] = {}
    for case in evidence.cases:
        if not case.sealed and case.expect in (Expect.GOOD, Expect.BAD) and case.sort != "attack":
            labelled = case.sort.startswith("labelled")
            kept = found.setdefault(case.query.key, {})
            if case.expect not in kept or (labelled and not kept[case.expect][0]):
                kept[case.expect] = (labelled, case.query.prompt, case.response)
    both = [kept for kept in found.values() if len(kept) == 2]
    both.sort(key=lambda kept: not (kept[Expect.GOOD][0] and kept[Expect.BAD][0]))
    return tuple(
        Pair(prompt=kept[Expect.GOOD][1], good=kept[Expect.GOOD][2], bad=kept[Expect.BAD][2]) for kept in both[:most]
    )


def tool_name(vetted: Vetted, taken: Collection[str] = ()) -> str:
    """A name for the tool, from the repository's, that no other tool has."""
    owner, _, name = vetted.model.repo.partition("/")
    short, long = (re.sub(r"[^a-z0-9]+", "_", text.lower()).strip("_") for text in (name, f"{owner}_{name}"))
    short, long = (text if text[:1].isalpha() else f"model_{text}".rstrip("_") for text in (short, long))
    for candidate in (short, long, f"{long}_{vetted.model.commit[:8]}"):
        if candidate not in taken:
            return candidate
    return f"{long}_{vetted.model.commit}"


# --- how it is asked --------------------------------------------------------------------------------------------------


def _default(vetted: Vetted) -> How:
    """The way that a model's files suggest."""
    model, config = vetted.model, vetted.model.config or {}
    tokenizer = model.tokenizer_config or {}
    template = bool(tokenizer.get("chat_template")) or any(
        file.path in ("chat_template.jinja", "chat_template.json") for file in model.files
    )
    encoder = config.get("model_type") in ENCODERS
    lengths = [config.get(name) for name in ("max_position_embeddings", "n_positions")]
    if config.get("model_type") in ("roberta", "xlm-roberta"):
        lengths = [length - 2 if type(length) is int else None for length in lengths]  # its positions begin at 2
    lengths.append(tokenizer.get("model_max_length"))
    known = [length for length in lengths if type(length) is int and length >= 8]
    two = vetted.report.labels == 2 and _is_a_question(config)
    return How(
        judge=Judge() if vetted.family == "judge" else None,
        form="chat" if template else "pair" if encoder and vetted.family == "sequence" else "plain",
        max_length=min(MOST_TOKENS, *known),
        head=int(two),
        against=0 if two and vetted.family == "sequence" else None,
    )


def _is_a_question(config: Mapping[str, Any]) -> bool:
    """Whether two outputs are the two answers to one question, and not two different rewards."""
    named = config.get("id2label")
    names = sorted(str(name).lower() for name in named.values()) if isinstance(named, dict) else []
    return not names or names == ["label_0", "label_1"] or config.get("problem_type") == "single_label_classification"


def _chosen(probed: Probed, examples: Reproduced) -> tuple[How, str]:
    """The way in which a model is asked, and why."""
    how = probed.how
    if examples.how is None or not examples.telling:
        return how, "by the probe" if probed.sure else "as its files suggest"
    if examples.how == how:
        return how, "by the examples in its card" + (", and by the probe" if probed.sure else "")
    return examples.how, "by the examples in its card"


# --- words ------------------------------------------------------------------------------------------------------------


def description_of(vetted: Vetted) -> str:
    """What it is, by what was measured; what its card says of itself in quotes."""
    report = vetted.report
    count = report.parameters or 0
    size = f"{count / 1e9:.3g} B" if count >= 1e9 else f"{count / 1e6:.3g} M" if count >= 1e6 else f"{count:,}"
    what = {
        "one_logit": "one score per answer",
        "several_logits": f"{report.labels} outputs, one of which counts",
        "process": "a score per step",
    }.get(report.scoring or "", "")
    text = f"Reward model {vetted.model.repo}: {report.architecture}, {size} parameters, {what}."
    quoted = _quoted(vetted.model.card) if vetted.folder is None else ""
    return f'{text} Its card says of itself: "{quoted}"' if quoted else text


def _quoted(card: str) -> str:
    """The first line of prose in a card, as letters, digits and plain punctuation, cut."""
    body = re.sub(r"\A---\n.*?\n---\n", "", card, count=1, flags=re.DOTALL)
    for line in body.splitlines()[:80]:
        if line.lstrip()[:1] in ("", "#", "<", "|", "!", "`", "~", ">", "-", "*", "["):
            continue
        line = unicodedata.normalize("NFKC", line)[: 4 * QUOTED]
        line = re.sub(r"\(?https?://\S+", "", line)
        line = " ".join("".join(c if c.isalnum() or c in " .,:;()%+-/" else " " for c in line).split())
        if len(line) >= 20:
            return line if len(line) <= QUOTED else line[:QUOTED].rsplit(" ", 1)[0] + " ..."
    return ""


def _refused(name: str, what: str, reasons: Iterable[str]) -> ModelRefused:
    reasons = tuple(reasons)
    error = ModelRefused(f"{name} {what}. {'; '.join(reasons)}")
    error.reasons = reasons
    return error


def taken_names(tools: Iterable[ToolSpec], name: str) -> frozenset[str]:
    """Names of tools that are not versions of this model."""
    repo = name.partition("@")[0]
    return frozenset(tool.name for tool in tools if tool.target.rpartition("@")[0].lower() != repo.lower())
