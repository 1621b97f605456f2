# SPDX-License-Identifier: Apache-2.0
"""Runs for the tests of the report, written by the real ledger and the real library."""

from __future__ import annotations

import hashlib
import json
import random
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from verl_rlar.advice import FILE_NAME as ADVICE_FILE
from verl_rlar.advice import Advice, Ruling
from verl_rlar.agents import session as agents_session
from verl_rlar.calibration import fit
from verl_rlar.clusters import FILE_NAME as CLUSTERS_FILE
from verl_rlar.clusters import Clusters
from verl_rlar.config import AgentsConfig
from verl_rlar.exam.card import Card, Failing, Figure
from verl_rlar.ledger import FILE_NAME, CanaryRow, Ledger, Row, ShadowRow
from verl_rlar.library import FOLDER_NAME, Library, Trusted
from verl_rlar.purse import Purse
from verl_rlar.tools.rubric import Check, Rubric
from verl_rlar.types import (
    Kind,
    Message,
    Outcome,
    Query,
    Route,
    RoutePart,
    Sample,
    Scope,
    Score,
    Snapshot,
    ToolScore,
    ToolSpec,
)

Words = Callable[[str], str]
"""What stands at a place, by the place's name."""
STEPS, PROMPTS, RESPONSES = 12, 6, 4


def sha(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def tools(words: Words) -> tuple[Trusted, ToolSpec, ToolSpec, str]:
    """A rule that is trusted, a reward model, a verifier, and the verifier's code."""
    code = words("source")
    rule = ToolSpec(
        name="final_answer",
        kind="rule",
        target="package:final_answer",
        scope=Scope(kinds=frozenset({Kind.MATH})),
        description=words("description"),
        misses=(words("misses"),),
        source_sha256=sha(code),
    )
    answers = [(number / 4 - 6, number % 7 < number // 8) for number in range(64)]
    model = ToolSpec(
        name=words("model"),
        kind="reward_model",
        target=words("target"),
        scope=Scope(kinds=frozenset({Kind.OPEN}), needs_reference=False),
        description=words("description of a model"),
        origin=words("origin"),
        low=-6.0,
        high=10.0,
        calibration=fit(answers),
    )
    checker = replace(
        rule, name="checker", kind="verifier", target="score", boxed=True, description="Checks the number."
    )
    return Trusted(spec=rule, source=code, by="builtin"), model, checker, code


def card(spec: ToolSpec, words: Words) -> Card:
    failing = tuple(
        Failing(
            id=f"case-{number}",
            sort=words("sort"),
            origin=words("origin of a case"),
            expect="bad",
            outcome="scored",
            value=1.0,
            wanted=words("wanted"),
            prompt=words("prompt of a case"),
            response=words("response of a case"),
            reference=words("reference of a case"),
            reason=words("reason of a case"),
        )
        for number in range(3)
    )
    return Card(
        tool=spec.name,
        digest=spec.digest,
        kind=spec.kind,
        verdict="admitted",
        reasons=(words("reason of a card"),),
        admitted_for=("math",),
        figures={
            "all": {"errors": Figure(value=0.0, limit=0.0, least=False, cases=120)},
            "math": {
                "gold": Figure(value=0.98, limit=0.95, cases=80),
                "false_accept": Figure(value=0.07, limit=0.02, least=False, cases=240, note=words("note")),
            },
        },
        sorts={words("sort"): {"cases": 12, "right": 9}},
        failing=failing,
        failed_cases=17,
        cases=320,
        sealed=64,
        calibration=spec.calibration.as_dict() if spec.calibration else None,
    )


def make_run(folder: Path, words: Words | None = None, *, store_texts: bool = True, steps: int = STEPS) -> Path:
    """A run of two tasks, validation, a tool in the shadow that is rolled back later, and all outcomes.

    Args:
        folder: Where ``ledger.sqlite`` and ``library`` go.
        words: Says what stands at each place where foreign text can; None: the name of the place.
    """
    words = words or str
    dice = random.Random(7)
    trusted, model, checker, code = tools(words)
    rule = trusted.spec
    with (
        Library(folder / FOLDER_NAME) as library,
        Ledger(folder / FILE_NAME, token="run", store_texts=store_texts) as ledger,
    ):
        library.begin([trusted], "run")
        for spec, source in ((model, None), (checker, code)):
            made = card(spec, words)
            library.propose(spec, source, by=words("by"), why=words("why proposed"))
            library.put_exam(
                spec.digest,
                card=made.as_dict(),
                text=made.markdown(),
                transcript=[],
                passed=True,
                by="exam",
                why=words("why examined"),
                canaries=[{"id": "known", "value": 1.0}],
            )
        library.append("shadow", model.digest, by="exam", why=words("why in the shadow"), step=2)
        for step in range(1, steps + 1):
            if step == 5:
                library.append("live", model.digest, by="life", why=words("why live"), step=5)
            if step == 10:
                library.append("rolled_back", model.digest, by="life", why=words("why rolled back"), step=10)
            snapshot = library.snapshot(step)
            ledger.add_tools(snapshot)
            for prompt in range(PROMPTS):
                _group(ledger, dice, words, step, prompt, snapshot, rule, model)
            canary = ToolScore(tool=rule.name, digest=rule.digest, outcome=Outcome.SCORED, raw=1.0, value=1.0)
            flipped = replace(canary, value=0.0 if step > 8 else 1.0, reason=words("reason of a canary"))
            ledger.add_canaries(
                [
                    CanaryRow(canary="known", step=step, score=canary),
                    CanaryRow(canary=words("canary"), step=step, score=flipped),
                ]
            )
    return folder


def _group(
    ledger: Ledger,
    dice: random.Random,
    words: Words,
    step: int,
    prompt: int,
    snapshot: Snapshot,
    rule: ToolSpec,
    model: ToolSpec,
) -> None:
    is_math = prompt % 2 == 0
    split = "val" if prompt == 5 else "train"
    query = Query(
        messages=(
            Message(role="system", content=words("system")),
            Message(role="user", content=f"{words('prompt')} {prompt}" + f" of step {step}" * (prompt == 0)),
        ),
        reference=words("reference") if is_math else None,
        data_source=words("math") if is_math else words("chat"),
        extra={words("column"): words("cell")},
    )
    live = {tool.digest for tool in snapshot.tools}
    specs = [rule] if is_math else [model] if model.digest in live else []
    if is_math and model.digest in live:
        specs.append(model)
    route = Route(
        parts=tuple(RoutePart(tool=spec.name, digest=spec.digest) for spec in specs),
        reason=words("why routed"),
        kind=Kind.MATH if is_math else Kind.OPEN,
        covered=bool(specs),
        snapshot=snapshot.version,
    )
    ledger.add_route(query, route, split)
    uid = f"{words('uid')}-{step}-{prompt}"
    rows, shadows = [], []
    for session in range(1 if split == "val" else RESPONSES):
        outcome = dice.choices(tuple(Outcome), (80, 8, 6, 6))[0] if specs else Outcome.ABSTAINED
        if prompt == 2 and specs:
            outcome = Outcome.SCORED
        value = {Outcome.SCORED: float(dice.random() < 0.2 + step / 20), Outcome.HACKED: 0.0}.get(outcome)
        if prompt == 2:
            value = 1.0
        said = [] if value is None else [value, 1.0 - value][: len(specs)]
        parts = tuple(
            ToolScore(
                tool=spec.name,
                digest=spec.digest,
                outcome=outcome,
                raw=said[at] * 12 - 4 if said and spec is model else said[at] if said else None,
                value=said[at] if said else None,
                reason=words("reason"),
                seconds=dice.random() / 50,
                details={words("detail"): 0.5},
            )
            for at, spec in enumerate(specs)
        )
        text = words("response") * (1 + int(8 * (value or 0)) + dice.randrange(3))
        rows.append(
            Row(
                sample=Sample(
                    query=query,
                    response="The answer is 42." if prompt == 0 and value == 1.0 else text + str(dice.random()),
                    step=step,
                    uid=uid,
                    session=session,
                    group_size=RESPONSES,
                    split=split,
                ),
                route=route,
                score=Score(value=value, outcome=outcome, reason=words("reason of a score"), parts=parts),
                sent=0.5 if value is None else value,
                sent_as="value" if value is not None else "neutral",
                received=1.7e9 + step,
                seconds=0.01,
            )
        )
        if model in snapshot.shadows and split == "train":
            shadow = ToolScore(
                tool=model.name,
                digest=model.digest,
                outcome=Outcome.SCORED,
                raw=3.0,
                value=dice.random(),
                reason=words("reason in the shadow"),
                seconds=0.02,
            )
            shadows.append(ShadowRow(uid=uid, session=session, step=step, score=shadow))
    ledger.add(rows)
    if shadows:
        ledger.add_shadows(shadows)


def add_agents(folder: Path, words: Words | None = None) -> ToolSpec:
    """One more step of `make_run`, in which a rubric judges; what was raised before it, what an LLM advised, what
    agents did, and what all of them spent. Returns the rubric."""
    words, step = words or str, STEPS + 1
    rubric = Rubric(
        checks=(Check(question=words("question one"), weight=2.0), Check(question=words("question two"))),
        description=words("description of a rubric"),
    ).spec(name="rubric", kinds=[Kind.OPEN], model=words("judge"), timeout_s=5.0, origin="coder")
    query = Query(messages=(Message(role="user", content="Tell me of the sea."),), data_source=words("chat"))
    clusters = Clusters(folder / FOLDER_NAME / CLUSTERS_FILE)
    cluster = clusters.of(query)
    clusters.rename(cluster, words("sea tales"))
    with Library(folder / FOLDER_NAME) as library, Ledger(folder / FILE_NAME, token="run") as ledger:
        trusted, *_ = tools(words)
        library.begin([trusted], "run")
        library.propose(rubric, None, by="coder", why=words("why proposed"))
        made = Card(
            tool="rubric", digest=rubric.digest, kind="rubric", verdict="admitted", reasons=(), figures={}, cases=9
        )
        library.put_exam(
            rubric.digest,
            card=made.as_dict(),
            text="",
            transcript=[],
            passed=True,
            by="exam",
            why=words("why examined"),
        )
        library.append("live", rubric.digest, by="exam", why=words("why live"), step=step)
        snapshot = library.snapshot(step)
        ledger.add_tools(snapshot)
        route = Route(
            parts=(RoutePart(tool="rubric", digest=rubric.digest),),
            reason=words("why routed"),
            kind=Kind.OPEN,
            covered=True,
            snapshot=snapshot.version,
            cluster=cluster,
        )
        ledger.add_route(query, route)
        rows = []
        for number in range(RESPONSES):
            details = {"check_1": 1.0, "check_2": float(number == 0), "tokens_read": 200.0, "tokens_written": 20.0}
            part = ToolScore(
                tool="rubric",
                digest=rubric.digest,
                outcome=Outcome.SCORED,
                raw=0.7,
                value=0.7 + number / 10,
                reason=words("reason of a rubric"),
                seconds=0.5,
                details=details | {"dollars": 0.001},
            )
            sample = Sample(
                query=query, response=words("tale"), step=step, uid="sea", session=number, group_size=RESPONSES
            )
            score = Score(value=part.value, outcome=Outcome.SCORED, reason=words("reason of a score"), parts=(part,))
            rows.append(
                Row(sample=sample, route=route, score=score, sent=0.7, sent_as="value", received=1.8e9, seconds=0.6)
            )
        ledger.add(rows)
        for raised in (9, step):
            seen = (
                words("what was seen"),
                json.dumps({"correlation": 0.81, words("figure"): 40.0}),
                json.dumps(["sea"]),
            )
            ledger.add_alarms([(raised, "length", rubric.digest, cluster, "rubric", "log", *seen)])
    advised = Ruling(cluster=cluster, tool=rubric.digest, why=words("why advised"), by=words("llm"), question="0" * 16)
    Advice(folder / FOLDER_NAME / ADVICE_FILE).add([advised], step)
    config = AgentsConfig(dollars_read=5.0)
    for task in ("rubrics", "advice", "a4deadf7417d", words("task")):
        purse = Purse(folder / "agents", task, config)
        purse.take(100)
        purse.settle(200, 20)
    tool = {"name": words("acquired"), "digest": rubric.digest}
    ended = agents_session.run(
        "agents_at_work:repeats",
        {"event": {"event": "acquired", "cluster": cluster, "tool": tool, "why": words("why acquired")}},
        folder=folder / "agents",
        name="acquire-open",
        wall_s=60,
        secrets=[],
        on_event=lambda event: None,
    )
    assert ended.how == "done", ended
    return rubric
