# SPDX-License-Identifier: Apache-2.0
"""HumanEval and MBPP through real boxes: every reference, and mutants that must fare as they do in a bare run."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import pytest
import pytest_asyncio
from conftest import make_query, make_sample
from mutants import BROKEN, NAMED_CHECK, UNORDERED, bare_runs, mutants, problems, reference

from verl_rlar.config import SandboxConfig
from verl_rlar.sandbox import Sandbox, open_sandbox
from verl_rlar.tools.rules.code import unit_tests, unit_tests_partial
from verl_rlar.types import Verdict

pytestmark = [pytest.mark.docker, pytest.mark.slow, pytest.mark.asyncio(loop_scope="module")]

MUTANTS = {"humaneval": 2, "mbpp": 1}
"""Mutants of each problem; of MBPP, of every third."""
HANG_S = 4.0
"""When a mutant is taken to hang, in seconds."""


@pytest.fixture(scope="module")
def settings(box_image: str, sandbox_config: SandboxConfig) -> SandboxConfig:
    return sandbox_config.model_copy(
        update={"program_boxes": 3, "verifier_boxes": 3, "spare_boxes": 0, "program_timeout_s": 60.0}
    )


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def boxes(settings: SandboxConfig) -> AsyncIterator[Sandbox]:
    async with open_sandbox(settings) as sandbox:
        yield sandbox


async def verdicts(
    programs: list[tuple[str, dict[str, Any]]], boxes: Sandbox, settings: SandboxConfig, *, partial: bool = False
) -> list[Verdict]:
    free = asyncio.Semaphore(3)
    rule = unit_tests_partial if partial else unit_tests

    async def one(response: str, problem: dict[str, Any]) -> Verdict:
        query = make_query(problem["prompt"], None, test=problem["test"], entry_point=problem["entry_point"])
        async with free:
            return await rule(make_sample(response, query), boxes, settings)

    return list(await asyncio.gather(*(one(response, problem) for response, problem in programs)))


@pytest.mark.parametrize("name", ["humaneval", "mbpp"])
async def test_every_reference_that_passes_a_bare_run_passes_in_the_boxes(
    name: str, boxes: Sandbox, settings: SandboxConfig
) -> None:
    found = problems(name)
    got = await verdicts([(p["canonical_solution"], p) for p in found], boxes, settings)
    failed = {p["task_id"]: verdict for p, verdict in zip(found, got, strict=True) if verdict.value != 1}
    assert failed.keys() - UNORDERED == {p["task_id"] for p in found} & BROKEN.keys(), failed
    assert not any(verdict.hacked for verdict in failed.values())


@pytest.mark.parametrize("name", ["humaneval", "mbpp"])
async def test_references_that_fail_a_bare_run_are_those_we_name(name: str) -> None:
    found = problems(name)
    bare = await asyncio.to_thread(bare_runs, [(reference(p), p) for p in found], 60.0)
    failed = {p["task_id"] for p, passes in zip(found, bare, strict=True) if not passes}
    assert failed - UNORDERED == {p["task_id"] for p in found} & (BROKEN.keys() | NAMED_CHECK)


@pytest.mark.parametrize("name", ["humaneval", "mbpp"])
async def test_every_mutant_gets_the_verdict_of_a_bare_run(name: str, boxes: Sandbox, settings: SandboxConfig) -> None:
    known = BROKEN.keys() | NAMED_CHECK | UNORDERED
    found = [p for p in problems(name)[:: 3 if name == "mbpp" else 1] if p["task_id"] not in known]
    named = [(label, program, p) for p in found for label, program in mutants(p, MUTANTS[name])]
    settings = settings.model_copy(update={"program_timeout_s": HANG_S})
    bare = await asyncio.to_thread(bare_runs, [(program, p) for _, program, p in named], HANG_S)
    programs = [(f"Here it is:\n\n```python\n{program}```\n", p) for _, program, p in named]
    got = await verdicts(programs, boxes, settings)
    differ = {
        label: (passes, verdict)
        for (label, _, _), passes, verdict in zip(named, bare, got, strict=True)
        if verdict.value != float(passes)
    }
    assert not differ
    assert 0.05 < sum(bare) / len(bare) < 0.6  # most are caught, and some are none
    assert len(bare) > 250


async def test_share_of_a_reference_is_whole_and_of_most_mutants_is_not(
    boxes: Sandbox, settings: SandboxConfig
) -> None:
    found = problems("humaneval")[::8]
    got = await verdicts([(p["canonical_solution"], p) for p in found], boxes, settings, partial=True)
    assert [verdict.value for verdict in got] == [1.0] * len(found)
    named = [(program, p) for p in found for _, program in mutants(p, 2)]
    settings = settings.model_copy(update={"program_timeout_s": HANG_S})
    shares = await verdicts(named, boxes, settings, partial=True)
    whole = await verdicts(named, boxes, settings)
    assert all((share.value == 1) == (verdict.value == 1) for share, verdict in zip(shares, whole, strict=True))
    assert any(0 < (share.value or 0) < 1 for share in shares)


async def test_references_are_the_whole_program(boxes: Sandbox, settings: SandboxConfig) -> None:
    found = problems("humaneval")[::20]
    got = await verdicts([(reference(p), p) for p in found], boxes, settings)
    assert [verdict.value for verdict in got] == [1.0] * len(found)
