# SPDX-License-Identifier: Apache-2.0
"""Which reward models are served when: ahead of their step, at it, and not at all."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from verl_rlar.config import parse
from verl_rlar.errors import ToolUnavailable
from verl_rlar.fleet import Fleet
from verl_rlar.inbox import Exam, Submission, hand_in, take_in
from verl_rlar.library import Library, spec_to_json
from verl_rlar.serving import How
from verl_rlar.tools.reward_model import serving, target
from verl_rlar.types import Kind, Scope, ToolSpec


def make_model(name: str, version: int = 1) -> ToolSpec:
    return ToolSpec(
        name=name,
        kind="reward_model",
        target=target(f"org/{name}", f"{version:040x}"),
        scope=Scope(kinds=frozenset({Kind.OPEN}), needs_reference=False),
        description="a model",
        low=-10,
        high=10,
        serving=serving(How()),
    )


class Servers:
    """Serves at most `room` models; starts wait until they are let go, if `held`."""

    def __init__(self, room: int = 9, broken: Sequence[str] = (), held: bool = False) -> None:
        self.room = room
        self.broken = set(broken)
        self.go = asyncio.Event()
        if not held:
            self.go.set()
        self.served: dict[str, ToolSpec] = {}
        self.calls: list[tuple[str, list[str]]] = []

    async def ensure(self, specs: Sequence[ToolSpec]) -> dict[str, str]:
        self.calls.append(("ensure", [spec.name for spec in specs]))
        kept: dict[str, ToolSpec] = {}
        refused: dict[str, str] = {}
        for spec in sorted(specs, key=lambda spec: spec.digest not in self.served):
            if spec.name in self.broken:
                refused[spec.digest] = "its weights are broken"
            elif len(kept) == self.room:
                refused[spec.digest] = "no room"
            else:
                kept[spec.digest] = spec
        self.served = kept
        return refused

    async def prefetch(self, spec: ToolSpec) -> bool:
        self.calls.append(("prefetch", [spec.name]))
        await self.go.wait()
        if spec.name in self.broken:
            raise ToolUnavailable("its weights are broken")
        if len(self.served) >= self.room:
            return False
        self.served[spec.digest] = spec
        return True

    @property
    def names(self) -> set[str]:
        return {spec.name for spec in self.served.values()}


@pytest.fixture
def library(tmp_path: Path) -> Iterator[Library]:
    with Library(tmp_path / "library") as made:
        yield made


def admitted(library: Library, spec: ToolSpec) -> ToolSpec:
    """A model that passed its exam."""
    library.propose(spec, None, by="scout", why="found")
    card = {"fingerprint": spec.digest}
    library.put_exam(spec.digest, card=card, text="", transcript=[], passed=True, by="exam", why="passed")
    return spec


def make_fleet(library: Library, servers: Servers, **settings: Any) -> Fleet:
    return Fleet(parse({"library": {"look_s": 0.01}, "serving": settings}), library, servers)


def ask(library: Library, model: ToolSpec, **changes: Any) -> None:
    asked: dict[str, Any] = {"digest": model.digest, "by": "ada", "why": "wanted", "event": "live"}
    hand_in(library.path, Submission(**(asked | changes)))


async def until(condition: Callable[[], bool]) -> None:
    for _ in range(2000):
        if condition():
            return
        await asyncio.sleep(0.005)
    raise AssertionError("it never came to that")


def boundary(library: Library, fleet: Fleet) -> list[str]:
    fleet.look()
    return [said for _, said in take_in(library, fleet.admits)]


def live(library: Library, step: int) -> list[str]:
    return [tool.name for tool in library.snapshot(step).tools]


async def test_a_run_without_reward_models_asks_nobody(library: Library) -> None:
    servers = Servers()
    fleet = make_fleet(library, servers)
    fleet.look()
    await fleet.serve(1)
    assert (servers.calls, fleet.serves) == ([], False)


async def test_a_published_model_starts_while_the_step_goes_on_and_has_a_say_from_the_first_boundary_after_that(
    library: Library,
) -> None:
    servers = Servers(held=True)
    fleet = make_fleet(library, servers)
    assert boundary(library, fleet) == []
    await fleet.serve(1)
    assert live(library, 1) == []
    ask(library, admitted(library, make_model("good")))
    await until(lambda: servers.calls == [("prefetch", ["good"])])
    assert boundary(library, fleet) == [], "it is still being started"
    await fleet.serve(2)
    assert live(library, 2) == []
    servers.go.set()
    await until(lambda: servers.names == {"good"})
    assert boundary(library, fleet) == ["live from step 3 on"]
    await fleet.serve(3)
    assert live(library, 3) == ["good"]
    assert servers.calls == [("prefetch", ["good"])], "the step waited for nothing"


async def test_a_model_that_cannot_be_started_is_refused_with_the_reason(library: Library) -> None:
    servers = Servers(broken=["bad"])
    fleet = make_fleet(library, servers)
    ask(library, admitted(library, make_model("bad")))
    fleet.look()
    await until(lambda: bool(servers.calls))
    (said,) = boundary(library, fleet)
    assert said == "refused: bad cannot be served: its weights are broken"
    await fleet.serve(1)
    assert live(library, 1) == []


async def test_what_left_is_stopped_while_the_next_step_goes_on(library: Library) -> None:
    servers = Servers()
    old, new = (admitted(library, make_model("judge", version)) for version in (1, 2))
    library.append("live", old.digest, by="ada", why="first")
    fleet = make_fleet(library, servers)
    await fleet.serve(0)
    assert live(library, 0) == ["judge"] and set(servers.served) == {old.digest}
    ask(library, new, replace=True)
    fleet.look()
    await until(lambda: new.digest in servers.served)
    assert boundary(library, fleet) == ["live from step 1 on"]
    await fleet.serve(1)
    await until(lambda: set(servers.served) == {new.digest})


async def test_where_there_is_no_room_beside_the_old_model_the_boundary_waits_for_the_swap(library: Library) -> None:
    servers = Servers(room=1)
    old, new = (admitted(library, make_model("judge", version)) for version in (1, 2))
    library.append("live", old.digest, by="ada", why="first")
    fleet = make_fleet(library, servers)
    await fleet.serve(0)
    library.snapshot(0)
    ask(library, new, replace=True)
    fleet.look()
    await until(lambda: ("prefetch", ["judge"]) in servers.calls)
    assert boundary(library, fleet) == ["live from step 1 on"]
    await fleet.serve(1)
    assert set(servers.served) == {new.digest}, "already when the step begins"


async def test_a_model_that_finds_no_room_gives_its_place_back_to_the_one_before(library: Library) -> None:
    servers = Servers(room=1)
    old, new = (admitted(library, make_model("judge", version)) for version in (1, 2))
    library.append("live", old.digest, by="ada", why="first")
    fleet = make_fleet(library, servers)
    await fleet.serve(0)
    library.snapshot(0)
    library.append("live", new.digest, by="ada", why="better", replaces=old.digest)
    await fleet.serve(1, behind=1)  # responses of step 0 are still to be scored by the old one
    assert live(library, 1) == ["judge"] and library.snapshot(1).tools[0].digest == old.digest
    (event,) = [event for event in library.events if event.event == "rolled_back"]
    assert (event.digest, event.why, event.restores) == (new.digest, "it cannot be served: no room", old.digest)


async def test_models_of_steps_that_may_still_score_stay(library: Library) -> None:
    servers = Servers()
    old, new = (admitted(library, make_model("judge", version)) for version in (1, 2))
    library.append("live", old.digest, by="ada", why="first")
    fleet = make_fleet(library, servers)
    await fleet.serve(0, behind=2)
    library.snapshot(0)
    library.append("live", new.digest, by="ada", why="better", replaces=old.digest)
    for step in (1, 2):
        await fleet.serve(step, behind=2)
        library.snapshot(step)
        assert set(servers.served) == {old.digest, new.digest}
    await fleet.serve(3, behind=2)
    await until(lambda: set(servers.served) == {new.digest})


async def test_a_training_does_not_begin_without_a_model_that_is_live(library: Library) -> None:
    servers = Servers(broken=["judge"])
    spec = admitted(library, make_model("judge"))
    library.append("live", spec.digest, by="ada", why="first")
    fleet = make_fleet(library, servers)
    with pytest.raises(ToolUnavailable, match=r"before step 1: judge .* cannot be served: its weights are broken"):
        await fleet.serve(1)


async def test_colocated_models_are_not_started_while_the_training_has_the_memory(library: Library) -> None:
    servers = Servers()
    fleet = make_fleet(library, servers, placement="colocated")
    ask(library, admitted(library, make_model("good")))
    assert boundary(library, fleet) == ["live from step 0 on"]
    assert servers.calls == []
    await fleet.serve(0)
    assert servers.calls == [("ensure", ["good"])]


async def test_submissions_that_bring_the_tool_along_are_started_ahead_unless_they_failed(library: Library) -> None:
    servers = Servers()
    fleet = make_fleet(library, servers)
    for name, passed in (("good", True), ("bad", False)):
        exam = Exam(card={"fingerprint": name}, text="", transcript=[], canaries=[], passed=passed, why="so it is")
        spec = make_model(name)
        ask(library, spec, spec=spec_to_json(spec), exam=exam, event="shadow")
    fleet.look()
    await until(lambda: bool(servers.served))
    assert boundary(library, fleet) == ["shadow from step 0 on", "taken in"]
    assert servers.calls == [("prefetch", ["good"])]
