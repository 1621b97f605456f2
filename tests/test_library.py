# SPDX-License-Identifier: Apache-2.0
"""The library: what is live when, who may say so, and what is left of it when somebody is killed."""

from __future__ import annotations

import hashlib
import importlib
import json
import os
import resource
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from conftest import make_sample
from hypothesis import given, settings
from hypothesis import strategies as st

from verl_rlar.cli.score import live_tools
from verl_rlar.config import RlarConfig
from verl_rlar.errors import ConfigError, LibraryError, ToolUnavailable
from verl_rlar.ledger import read as read_ledger
from verl_rlar.library import (
    EVENTS_FILE,
    FOLDER_NAME,
    SCHEMA_VERSION,
    STEPS_FILE,
    Library,
    LibraryView,
    Trusted,
    builtin_snapshot,
    decode,
    encode,
    fold,
    same_behaviour,
    spec_from_json,
    spec_to_json,
)
from verl_rlar.service import Service
from verl_rlar.tools.rule import load_version
from verl_rlar.trusted import trusted_tools
from verl_rlar.types import Kind, Scope, ToolSpec


def sha(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def code(name: str, version: int = 1) -> str:
    return f"# {name} {version}\ndef score(prompt, response, reference, extra):\n    return 1.0\n"


def make_spec(name: str = "checker", version: int = 1, **changes: Any) -> ToolSpec:
    fields: dict[str, Any] = {
        "name": name,
        "kind": "verifier",
        "target": "score",
        "scope": Scope(kinds=frozenset({Kind.MATH, Kind.SHORT_TEXT})),
        "description": "A verifier.",
        "misses": ("much",),
        "boxed": True,
        "origin": "agent-7",
        "source_sha256": sha(code(name, version)),
    }
    return ToolSpec(**(fields | changes))


def make_trusted(name: str, version: int = 1, by: Any = "builtin") -> Trusted:
    spec = make_spec(name, version, kind="rule", target=f"package:{name}", boxed=False, origin=by)
    return Trusted(spec=spec, source=code(name, version), by=by)


def take_in(library: Library, name: str = "checker", version: int = 1, **card: Any) -> str:
    """A verifier that passed its exam."""
    spec = make_spec(name, version)
    library.propose(spec, code(name, version), by="coder", why="math has no tool")
    library.put_exam(
        spec.digest, card=card, text=f"# {name}\n", transcript=[], passed=True, by="exam", why="all cases right"
    )
    return spec.digest


def names(view: LibraryView, step: int) -> list[str]:
    return [tool.name for tool in LibraryView.snapshot(view, step).tools]


@pytest.fixture
def library(tmp_path: Path) -> Iterator[Library]:
    with Library(tmp_path / "library") as made:
        yield made


# --- What is live when ------------------------------------------------------------------------------------------------


def test_a_tool_is_live_from_its_step_on_and_not_before(library: Library) -> None:
    digest = take_in(library)
    library.append("live", digest, by="exam", why="passed", step=3)
    assert [names(library, step) for step in (0, 2, 3, 9)] == [[], [], ["checker"], ["checker"]]
    library.append("retired", digest, by="ada", why="a better one came", step=5)
    assert [names(library, step) for step in (3, 4, 5)] == [["checker"], ["checker"], []]


def test_a_step_that_was_handed_out_never_changes(library: Library) -> None:
    digest = take_in(library)
    before = library.snapshot(7)
    for step in (0, 7):
        with pytest.raises(LibraryError, match=r"step 7 are handed out already.*the earliest is step 8"):
            library.append("live", digest, by="exam", why="passed", step=step)
    event = library.append("live", digest, by="exam", why="passed")
    assert (event.step, library.snapshot(7), names(library, 8)) == (8, before, ["checker"])


def test_a_run_that_goes_back_to_an_earlier_checkpoint_sees_what_the_first_one_saw(tmp_path: Path) -> None:
    path = tmp_path / "library"
    with Library(path) as first:
        first.begin([make_trusted("a"), make_trusted("b")], "first")
        seen = [first.snapshot(0)]
        for step in range(1, 12):
            if step in (3, 6):
                digest = take_in(first, f"checker_{step}")
                first.append("live", digest, by="exam", why="passed", step=step + 1)
            if step == 8:
                first.append("retired", make_spec("checker_3").digest, by="watch", why="saturated", step=9)
            seen.append(first.snapshot(step))
    assert len({snapshot.version for snapshot in seen}) == 4
    log = (path / EVENTS_FILE).read_bytes()
    with Library(path) as second:
        second.begin([make_trusted("a"), make_trusted("b")], "second")
        again = [second.snapshot(5)]
        assert second.handed_out == Library.read(path).handed_out == 11
        again += [second.snapshot(step) for step in range(6, 12)]
        assert again == seen[5:] and [s.version for s in again] == [s.version for s in seen[5:]]
        with pytest.raises(LibraryError, match="the earliest is step 12"):
            second.append("live", take_in(second, "late"), by="exam", why="passed", step=7)
    assert (path / EVENTS_FILE).read_bytes().startswith(log)
    assert [Library.read(path).snapshot(step) for step in range(12)] == seen


def test_built_in_tools_come_first_in_their_order_then_the_others_by_their_first_event(library: Library) -> None:
    for name in ("zeta", "beta"):
        library.append("live", take_in(library, name), by="exam", why="passed", step=0)
    library.begin([make_trusted("b"), make_trusted("a"), make_trusted("mine", by="user")], "run")
    assert names(library, 0) == ["b", "a", "zeta", "beta", "mine"]
    library.append("live", take_in(library, "zeta", 2), by="x", why="", step=4, replaces=make_spec("zeta").digest)
    assert names(library, 4) == ["b", "a", "zeta", "beta", "mine"]


def test_a_shadow_scores_beside_the_live_ones_until_it_is_one(library: Library) -> None:
    digest = take_in(library)
    library.append("shadow", digest, by="exam", why="passed", step=2)
    library.append("live", digest, by="watch", why="agrees", step=5)
    assert [[spec.name for spec in library.snapshot(step).shadows] for step in (1, 2, 4, 5)] == [
        [],
        ["checker"],
        ["checker"],
        [],
    ]
    assert [names(library, step) for step in (4, 5)] == [[], ["checker"]]


def test_a_rollback_brings_the_tool_back_that_was_replaced(library: Library) -> None:
    old, new = take_in(library), take_in(library, version=2)
    library.append("live", old, by="exam", why="passed", step=1)
    library.append("live", new, by="exam", why="better", step=5, replaces=old)
    library.append("rolled_back", new, by="watch", why="a canary flipped", step=8, restores=old)
    live = [[tool.digest for tool in library.snapshot(step).tools] for step in (1, 5, 8)]
    assert live == [[old], [new], [old]]
    assert {d: s.event for d, s in library.standings().items()} == {old: "live", new: "rolled_back"}
    with pytest.raises(LibraryError, match="neither live nor in the shadow"):
        library.append("rolled_back", new, by="watch", why="again", step=9, restores=old)


def test_what_takes_a_tool_out_comes_before_what_was_planned_for_it(library: Library) -> None:
    old, new = take_in(library), take_in(library, version=2)
    library.append("live", old, by="exam", why="passed", step=1)
    library.append("retired", old, by="ada", why="a typo", step=400)
    library.append("retired", old, by="ada", why="meant 40", step=40)
    library.append("quarantined", old, by="watch", why="a canary flipped", step=9)
    assert [names(library, step) for step in (8, 9, 40, 400)] == [["checker"], [], [], []]
    assert (library.standings()[old].event, library.standings()[old].step) == ("quarantined", 9)
    library.append("live", new, by="exam", why="passed", step=20)
    assert [names(library, step) for step in (40, 400)] == [["checker"], ["checker"]]


def test_what_was_taken_out_does_not_come_back_by_what_was_planned_before(library: Library) -> None:
    old, new, other = (take_in(library, version=version) for version in (1, 2, 3))
    library.append("live", old, by="exam", why="passed", step=1)
    library.append("shadow", new, by="exam", why="passed", step=1)
    library.append("live", new, by="ada", why="better", step=20, replaces=old)
    library.append("quarantined", new, by="watch", why="a canary flipped", step=5)
    assert [library.snapshot(step).tools[0].digest for step in (4, 30)] == [old, old]
    library.append("live", other, by="ada", why="better", step=40, replaces=old)
    library.append("rolled_back", other, by="ada", why="for a while only", step=50, restores=old)
    with pytest.raises(LibraryError, match="from step 50 on"):
        library.append("quarantined", old, by="watch", why="it would come back", step=35)


def test_no_rollback_brings_a_tool_back_that_failed_its_latest_exam(library: Library) -> None:
    old, new = take_in(library), take_in(library, version=2)
    library.append("live", old, by="exam", why="passed", step=1)
    library.append("live", new, by="exam", why="better", step=5, replaces=old)
    assert library.may_return(old)
    library.put_exam(old, card={"verdict": "rejected"}, text="", transcript=[], passed=False, by="exam", why="worse")
    assert not library.may_return(old)
    with pytest.raises(LibraryError, match="cannot come back, it did not pass its latest exam"):
        library.append("rolled_back", new, by="watch", why="a canary flipped", step=8, restores=old)
    library.append("rolled_back", new, by="watch", why="a canary flipped", step=8)
    assert library.snapshot(8).tools == ()


operations = st.lists(
    st.tuples(
        st.sampled_from(["snapshot", "live", "shadow", "retired", "quarantined", "rolled_back"]),
        st.integers(0, 5),
        st.integers(0, 12),
    ),
    max_size=25,
)


@settings(deadline=None, max_examples=60)
@given(operations=operations)
def test_whatever_is_asked_for_a_step_that_was_handed_out_stays_as_it_is(
    tmp_path_factory: pytest.TempPathFactory, operations: list[tuple[Any, int, int]]
) -> None:
    path = tmp_path_factory.mktemp("library")
    handed_out: dict[int, Any] = {}
    with Library(path) as library:
        digests = [take_in(library, f"tool_{number % 2}", number) for number in range(6)]
        for what, number, step in operations:
            if what == "snapshot":
                newest = max(handed_out, default=-1)
                snapshot = library.snapshot(step)
                if step > newest:
                    handed_out[step] = snapshot
                continue
            live = {tool.name: tool.digest for tool in LibraryView.snapshot(library, step).tools}
            other = live.get(f"tool_{number % 2}")
            with suppress(LibraryError):
                restores = digests[(number + 2) % 6] if what == "rolled_back" else None
                replaces = other if what == "live" else None
                library.append(what, digests[number], by="x", why="", step=step, replaces=replaces, restores=restores)
        for step, snapshot in handed_out.items():
            assert LibraryView.snapshot(library, step) == snapshot
    for step, snapshot in handed_out.items():
        assert Library.read(path).snapshot(step) == snapshot


# --- What is not allowed ----------------------------------------------------------------------------------------------


def test_a_verifier_without_a_card_or_with_a_failed_exam_never_scores(library: Library) -> None:
    spec = make_spec()
    library.propose(spec, code("checker"), by="coder", why="")
    for event in ("live", "shadow"):
        with pytest.raises(LibraryError, match=r"it has no card.*needs an exam"):
            library.append(event, spec.digest, by="coder", why="trust me")  # type: ignore[arg-type]
    record: dict[str, Any] = {"text": "", "transcript": [], "by": "exam"}
    library.put_exam(spec.digest, card={"gold": 0.1}, passed=False, why="gold fails", **record)
    with pytest.raises(LibraryError, match="it was rejected"):
        library.append("live", spec.digest, by="coder", why="trust me")
    library.put_exam(spec.digest, card={"gold": 1.0}, passed=True, why="with the right cases", **record)
    library.append("live", spec.digest, by="exam", why="passed")
    kept = sorted(path.name for path in (library.path / "tools" / spec.digest).iterdir())
    assert len([name for name in kept if name.startswith("card-") and name.endswith(".json")]) == 1
    assert library.card(spec.digest) == {"gold": 1.0}


def test_what_an_agent_calls_a_rule_never_scores_and_its_verifiers_run_in_boxes(library: Library) -> None:
    rule = make_spec(kind="rule", target="os:system", boxed=False)
    library.propose(rule, code("checker"), by="coder", why="no exam needed")
    for event in ("live", "shadow"):
        with pytest.raises(LibraryError, match="only this package and the user can name one"):
            library.append(event, rule.digest, by="coder", why="")  # type: ignore[arg-type]
    for spec, source in ((make_spec(boxed=False), code("checker")), (make_spec(), None)):
        with pytest.raises(LibraryError, match="a verifier has a source, and runs in a box"):
            library.propose(spec, source, by="coder", why="")
    with pytest.raises(ToolUnavailable, match="a verifier does not run as a rule"):
        load_version(make_spec(target="os:system"))


def test_a_card_that_was_changed_by_hand_admits_nobody(library: Library) -> None:
    digest = take_in(library, gold=0.5)
    (library.path / "tools" / digest / "card.json").write_text('{"gold": 1.0}')
    with pytest.raises(LibraryError, match="cannot become live"):
        library.append("live", digest, by="exam", why="passed")


def test_a_name_belongs_to_one_live_tool_unless_the_event_says_which_one_goes(library: Library) -> None:
    one, two = take_in(library), take_in(library, version=2)
    library.append("live", one, by="exam", why="passed", step=1)
    with pytest.raises(LibraryError, match="another tool is live under that name"):
        library.append("live", two, by="exam", why="passed", step=2)
    with pytest.raises(LibraryError, match="another tool is live under that name"):
        library.append("live", two, by="exam", why="passed", step=2, replaces="f" * 16)
    library.append("live", two, by="exam", why="better", step=2, replaces=one)
    assert library.standings()[one].event == "retired"
    with pytest.raises(LibraryError, match=r"event \d+ counts from step 2 on; choose a later step"):
        library.append("shadow", two, by="ada", why="", step=1)
    with pytest.raises(LibraryError, match="it is live"):
        library.append("live", two, by="exam", why="passed", step=3)


def test_two_tools_that_answer_an_exam_alike_are_not_live_together(library: Library) -> None:
    one, two = take_in(library, "one", fingerprint="f"), take_in(library, "two", fingerprint="f")
    library.append("shadow", one, by="exam", why="passed")
    with pytest.raises(LibraryError, match=rf"same answers as one \({one}\), which is shadow"):
        library.append("live", two, by="exam", why="passed")
    library.append("retired", one, by="ada", why="a twin")
    library.append("live", two, by="exam", why="passed")
    assert same_behaviour({"fingerprint": "f"}, {"fingerprint": "f"})
    assert not any(
        same_behaviour(a, b) for a in (None, {}, {"fingerprint": ""}) for b in (None, {}, {"fingerprint": ""})
    )


def test_a_digest_is_one_content_for_ever(library: Library) -> None:
    digest = take_in(library)
    assert library.propose(make_spec(), code("checker"), by="coder", why="again") is False
    assert [event.event for event in library.events] == ["proposed", "examined"]
    with pytest.raises(LibraryError, match="not the one that the spec names"):
        library.propose(make_spec(), code("another"), by="coder", why="")
    folder = library.path / "tools" / digest
    (folder / "source.py").write_text("def score(**_): return 1\n")
    with pytest.raises(LibraryError, match=r"source\.py has another content"):
        library.propose(make_spec(), code("checker"), by="coder", why="")
    with pytest.raises(LibraryError, match="not the code that its spec names"):
        Library.read(library.path).source(digest)
    changed = json.loads((folder / "spec.json").read_text()) | {"timeout_s": 60.0}
    (folder / "spec.json").write_text(json.dumps(changed))
    with pytest.raises(LibraryError, match="its content has the digest"):
        Library.read(library.path).spec(digest)


def test_an_agent_cannot_sign_as_the_package_or_the_user(library: Library) -> None:
    digest = take_in(library)
    for by in ("builtin", "user"):
        with pytest.raises(LibraryError, match="say who you are"):
            library.append("live", digest, by=by, why="")


def test_an_unknown_digest_is_named(library: Library) -> None:
    with pytest.raises(LibraryError, match="no tool has the digest 'feedfeed'"):
        library.append("live", "feedfeed", by="exam", why="")


@pytest.mark.parametrize("spec", [make_spec(), *builtin_snapshot().tools], ids=lambda spec: spec.name)
def test_a_spec_comes_back_from_its_file_as_it_was(spec: ToolSpec) -> None:
    assert spec_from_json(json.loads(json.dumps(spec_to_json(spec)))) == spec
    with pytest.raises(LibraryError, match="fields of another release: colour"):
        spec_from_json(spec_to_json(spec) | {"colour": "red"})


# --- Tools that need no exam ------------------------------------------------------------------------------------------


def starts(path: Path, start: str, tools: Sequence[Trusted], step: int | None) -> list[tuple[str, str]]:
    """What a start of training with these tools sees at a step."""
    with Library(path) as library:
        library.begin(tools, start)
        snapshot = library.latest() if step is None else library.snapshot(step)
    return [(tool.name, tool.digest) for tool in snapshot.tools]


def seen(*tools: Trusted) -> list[tuple[str, str]]:
    return [(tool.spec.name, tool.spec.digest) for tool in tools]


def test_changed_code_counts_from_the_first_step_of_the_next_start(tmp_path: Path) -> None:
    a1, a2, a3, b = make_trusted("a"), make_trusted("a", 2), make_trusted("a", 3), make_trusted("b")
    assert starts(tmp_path, "1", [a1, b], 10) == seen(a1, b)
    assert starts(tmp_path, "2", [a2, b], 6) == seen(a2, b)
    view = Library.read(tmp_path)
    assert [view.snapshot(step).tool("a").digest for step in (0, 5, 6, 10)] == [
        *(a1.spec.digest, a1.spec.digest, a2.spec.digest, a2.spec.digest)
    ]
    assert view.source(a1.spec.digest) == a1.source, "the code of before is still there to be read"
    assert view.events[-1].replaces == a1.spec.digest and "changed" in view.events[-1].why
    assert view.snapshot(10, seq=2) == Library.read(tmp_path).snapshot(5), "what the first start saw at step 10"
    # ... also if it goes back before an earlier change: what counted later is of code that is gone
    assert starts(tmp_path, "3", [a3, b], 4) == seen(a3, b)
    assert [tool.digest for tool in Library.read(tmp_path).snapshot(10).tools] == [a3.spec.digest, b.spec.digest]
    assert starts(tmp_path, "4", [a1, b], 3) == seen(a1, b)
    assert [tool.digest for tool in Library.read(tmp_path).snapshot(10).tools] == [a1.spec.digest, b.spec.digest]


def test_a_start_with_the_same_code_writes_nothing(tmp_path: Path) -> None:
    tools = [make_trusted("a"), make_trusted("mine", by="user")]
    starts(tmp_path, "1", tools, 3)
    log = (tmp_path / EVENTS_FILE).read_bytes()
    assert len(log.splitlines()) == 2
    starts(tmp_path, "2", tools, 2)
    starts(tmp_path, "3", tools, None)
    assert (tmp_path / EVENTS_FILE).read_bytes() == log


def test_within_one_start_of_training_no_code_is_taken_in_anew(tmp_path: Path) -> None:
    a1, a2 = make_trusted("a"), make_trusted("a", 2)
    assert starts(tmp_path, "same", [a1], 3) == seen(a1)
    for step in (3, 4):
        assert starts(tmp_path, "same", [a2], step) == seen(a1), "the service was killed, the file edited meanwhile"


def test_what_is_not_named_any_more_is_retired_and_comes_back_when_it_is_named_again(tmp_path: Path) -> None:
    a, mine = make_trusted("a"), make_trusted("mine", by="user")
    starts(tmp_path, "1", [a, mine], 5)
    assert starts(tmp_path, "2", [a], 3) == seen(a)
    assert Library.read(tmp_path).events[-1].why.startswith("not in rlar.tools")
    assert starts(tmp_path, "3", [a, mine], 4) == seen(a, mine)
    assert starts(tmp_path, "4", [a], 2) == seen(a)
    assert Library.read(tmp_path).snapshot(5).tools == (a.spec,), "what an earlier start named later on is gone as well"


def test_what_took_a_place_at_a_later_step_takes_it_there_again_after_a_change_of_the_code(tmp_path: Path) -> None:
    a1, a2 = make_trusted("a"), make_trusted("a", 2)
    starts(tmp_path, "1", [a1], 4)
    with Library(tmp_path) as library:
        digest = take_in(library, "a", 9)
        library.append("live", digest, by="exam", why="better", step=5, replaces=a1.spec.digest)
    starts(tmp_path, "1", [a1], 6)
    assert starts(tmp_path, "2", [a2], 3) == seen(a2)
    live = [[tool.digest for tool in Library.read(tmp_path).snapshot(step).tools] for step in (2, 4, 5)]
    assert live == [[a1.spec.digest], [a2.spec.digest], [digest]]


def test_what_a_person_retired_stays_retired_and_what_was_quarantined_until_it_changes(tmp_path: Path) -> None:
    a, b, b2 = make_trusted("a"), make_trusted("b"), make_trusted("b", 2)
    starts(tmp_path, "1", [a, b], 3)
    with Library(tmp_path) as library:
        library.append("retired", a.spec.digest, by="ada", why="not wanted")
        library.append("quarantined", b.spec.digest, by="watch", why="a canary flipped")
    assert starts(tmp_path, "2", [make_trusted("a", 2), b], 4) == []
    assert starts(tmp_path, "3", [make_trusted("a", 2), b2], 5) == seen(b2)


def test_a_tool_that_took_a_built_in_ones_name_keeps_it(tmp_path: Path) -> None:
    a = make_trusted("a")
    starts(tmp_path, "1", [a], 3)
    with Library(tmp_path) as library:
        digest = take_in(library, "a", 9)
        library.append("live", digest, by="exam", why="better", replaces=a.spec.digest)
    assert starts(tmp_path, "2", [make_trusted("a", 2)], 4) == [("a", digest)]


OWN = """
from verl_rlar.tools.rule import rule
from verl_rlar.types import Kind, Sample, Verdict

@rule(name="{name}", kinds={{Kind.OPEN}}, needs_reference=False, description="1 if all letters are capitals.")
async def shouting(sample: Sample) -> Verdict:
    return Verdict(value=float(sample.response.isupper()))

def plain(sample): return 1.0
"""


@pytest.fixture
def own_module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., str]:
    """Makes a module of the user's, and gives its name."""
    monkeypatch.syspath_prepend(str(tmp_path / "site"))

    def make(module: str, name: str = "shouting", *, package: str = "") -> str:
        (tmp_path / "site").mkdir(exist_ok=True)
        (tmp_path / "site" / f"{module}.py").write_text(OWN.format(name=name))
        if package:
            info = tmp_path / "site" / f"{package}-1.0.dist-info"
            info.mkdir()
            (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {package}\nVersion: 1.0\n")
            (info / "entry_points.txt").write_text(f"[verl_rlar.tools]\n{name} = {module}:shouting\n")
        importlib.invalidate_caches()
        return module

    return make


def test_the_users_own_tools_come_from_the_settings_and_from_installed_packages(
    own_module: Callable[..., str],
) -> None:
    own_module("rlar_test_own_1", "loud")
    own_module("rlar_test_own_2", "louder", package="rlar-test-package")
    tools = trusted_tools(RlarConfig(tools=("rlar_test_own_1:shouting",)))
    builtin = builtin_snapshot().tools
    assert [tool.spec for tool in tools[: len(builtin)]] == list(builtin)
    own = [(tool.spec.name, tool.by, tool.spec.origin) for tool in tools[len(builtin) :]]
    assert own == [("loud", "user", "user"), ("louder", "user", "user")]
    assert all(sha(tool.source) == tool.spec.source_sha256 for tool in tools)


@pytest.mark.parametrize(
    ("target", "message"),
    [
        ("rlar_test_none:shouting", r"rlar\.tools \(rlar_test_none:shouting\).*cannot be imported.*No module named"),
        ("rlar_test_own_3:missing", "cannot be imported"),
        ("rlar_test_own_3", "cannot be imported"),
        ("rlar_test_own_3:plain", "is no rule; put `@rule"),
        ("rlar_test_own_3:shouting", "two tools named 'final_answer'.*built in"),
    ],
)
def test_an_own_tool_that_cannot_be_used_is_refused_by_name(
    own_module: Callable[..., str], target: str, message: str
) -> None:
    own_module("rlar_test_own_3", "final_answer")
    with pytest.raises(ConfigError, match=message):
        trusted_tools(RlarConfig(tools=(target,)))


def test_scores_by_a_librarys_tools_say_which_own_rule_is_left_out(
    tmp_path: Path, own_module: Callable[..., str], capsys: pytest.CaptureFixture[str]
) -> None:
    target = f"{own_module('rlar_test_own_4', 'loud')}:shouting"
    named, unnamed = (RlarConfig(run_dir=str(tmp_path), tools=tools) for tools in ((target,), ()))
    with Library(tmp_path / "library") as library:
        library.begin(trusted_tools(named), "run")
    assert "loud" in {tool.name for tool in live_tools(str(tmp_path), None, named)[0].tools}
    assert capsys.readouterr().err == ""
    assert "loud" not in {tool.name for tool in live_tools(str(tmp_path), None, unnamed)[0].tools}
    assert f"loud is live there and left out here: add --set 'tools=[\"{target}\"]'" in capsys.readouterr().err


def test_a_rule_whose_code_changed_does_not_answer_for_the_version_of_before() -> None:
    spec = builtin_snapshot().tool("exact_match")
    assert load_version(spec).spec == spec
    with pytest.raises(ToolUnavailable, match=r"the code of .*changed since version"):
        load_version(replace(spec, source_sha256=sha("before")))


# --- The service ------------------------------------------------------------------------------------------------------


async def test_the_service_hands_out_the_librarys_tools_and_keeps_their_specs_in_the_ledger(
    tmp_path: Path, own_module: Callable[..., str]
) -> None:
    own_module("rlar_test_own_4", "loud")
    config = RlarConfig(run_dir=str(tmp_path), tools=("rlar_test_own_4:shouting",))
    service = Service(config, "run")
    first = await service.at(1)
    assert [tool.name for tool in first.tools] == [*(tool.name for tool in builtin_snapshot().tools), "loud"]
    digest = take_in(service._library)
    with pytest.raises(LibraryError, match="handed out"):
        service._library.append("live", digest, by="exam", why="passed", step=1)
    service._library.append("live", digest, by="exam", why="passed", step=2)
    assert await service.at(1) == first
    assert (await service.at(2)).tool("checker") == make_spec()
    assert await service.source(make_spec().source_sha256) == code("checker")
    assert await service.source(sha("another")) is None
    with read_ledger(tmp_path) as db:
        assert db.execute("SELECT name FROM tools WHERE digest = ?", (digest,)).fetchone()[0] == "checker"
    service.close()
    again = Service(config, "another start")
    assert await again.at(1) == first
    again.close()


async def test_an_own_coroutine_scores_like_any_rule(tmp_path: Path, own_module: Callable[..., str]) -> None:
    from verl_rlar.dispatcher import Dispatcher

    own_module("rlar_test_own_5", "loud")
    async with Dispatcher(RlarConfig(tools=("rlar_test_own_5:shouting",))) as dispatcher:
        query = replace(make_sample().query, reference=None)
        values = [(await dispatcher.score(make_sample(text, query))).value for text in ("YES", "no")]
    assert values == [1.0, 0.0]


# --- Readers, writers, kills ------------------------------------------------------------------------------------------


def test_readers_follow_a_writer_and_see_whole_lines_only(library: Library) -> None:
    view = Library.read(library.path)
    digest = take_in(library)
    assert view.refresh() == 2
    line = encode(replace(library.append("live", digest, by="exam", why="passed"), seq=4))
    assert view.refresh() == 3
    with open(library.path / EVENTS_FILE, "ab") as log:
        log.write(line[:-20])
        log.flush()
        assert view.refresh() == 3
        log.write(line[-20:])
    assert view.refresh() == 4 == Library.read(library.path).refresh()


def test_a_second_writer_is_told_who_the_first_one_is(library: Library) -> None:
    with pytest.raises(LibraryError, match=rf"being written by process {os.getpid()} on .* since 20"):
        Library(library.path)
    begin = time.monotonic()
    with pytest.raises(LibraryError, match="one writer at a time"):
        Library(library.path, wait_s=0.2)
    assert time.monotonic() - begin >= 0.2
    library.close()
    Library(library.path).close()
    with pytest.raises(LibraryError, match="closed"):
        library.propose(make_spec(), code("checker"), by="coder", why="")


def test_a_torn_last_line_is_moved_aside_by_the_next_writer(tmp_path: Path) -> None:
    with Library(tmp_path) as library:
        take_in(library)
    log = tmp_path / EVENTS_FILE
    whole = log.read_bytes()
    log.write_bytes(whole + b'{"seq": 3, "ti')
    assert Library.read(tmp_path).refresh() == 2
    with Library(tmp_path) as library:
        assert log.read_bytes() == whole
        library.append("live", make_spec().digest, by="exam", why="passed")
    assert [path.read_bytes() for path in tmp_path.glob("torn-*")] == [b'{"seq": 3, "ti']
    assert names(Library.read(tmp_path), 0) == ["checker"]


@pytest.mark.parametrize("change", ["flip", "drop", "forge", "garbage"])
def test_a_damaged_line_is_an_error_that_names_it_and_is_never_skipped(tmp_path: Path, change: str) -> None:
    with Library(tmp_path) as library:
        library.append("live", take_in(library), by="exam", why="passed")
    log = tmp_path / EVENTS_FILE
    lines = log.read_bytes().splitlines(keepends=True)
    lines[1:2] = {
        "flip": [lines[1].replace(b"exam", b"Exam")],
        "drop": [],
        "forge": [encode(replace(decode(lines[1], 2), seq=7))],
        "garbage": [b"\0" * 80 + b"\n"],
    }[change]
    log.write_bytes(b"".join(lines))
    for opened in (Library.read, Library):
        with pytest.raises(LibraryError, match="line 2 is damaged"):
            opened(tmp_path)


def test_a_full_disk_is_an_error_and_leaves_the_log_whole(library: Library) -> None:
    digest = take_in(library)
    log = library.path / EVENTS_FILE
    whole = log.read_bytes()
    view = Library.read(library.path)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (len(whole) + 40, limits[1]))  # a part of the line fits
    try:
        with pytest.raises(LibraryError, match="the disk, or a quota, is full"):
            library.append("live", digest, by="exam", why="passed")
        with pytest.raises(LibraryError, match="full"):
            library.put_exam(
                digest, card={"x": "y" * 10_000}, text="", transcript=[], passed=True, by="exam", why="again"
            )
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert log.read_bytes() == whole
    library.append("live", digest, by="exam", why="there is room again")
    view.refresh()
    assert names(view, 0) == ["checker"]


def test_a_full_disk_does_not_stop_steps_from_being_handed_out(library: Library) -> None:
    library.begin([make_trusted("a")], "run")
    library.snapshot(1)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (5, limits[1]))
    try:
        assert names(library, 2) == ["a"] and library.snapshot(2).tools
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    with pytest.raises(LibraryError, match="step 2 are handed out"):
        library.append("live", take_in(library), by="exam", why="", step=2)
    library.snapshot(3)
    assert json.loads((library.path / STEPS_FILE).read_text()) == {"handed_out": 3, "start": "run"}


def test_a_file_that_is_in_the_way_is_an_error_with_its_path(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(LibraryError, match="file"):
        Library(tmp_path / "file")
    with pytest.raises(LibraryError, match="there is no library at"):
        Library.read(tmp_path)


KILLED = """
import os, random, signal, sys, time
from pathlib import Path
sys.path.insert(0, {tests!r})
from test_library import code, make_spec, make_trusted, take_in
from verl_rlar.library import Library, LibraryView

path, rounds = Path(sys.argv[1]), int(sys.argv[2])
random.seed(0)
acknowledged, snapshots = [], {{}}
with Library(path) as library:
    library.begin([make_trusted("a")], "0")

def write(pipe):
    with Library(path) as library:
        library.begin([make_trusted("a"), make_trusted("b", random.randrange(3))], str(random.random()))
        step = library.next_step
        while True:
            step += 1
            library.snapshot(step)
            name = "checker_" + str(len(library.events))
            digest = take_in(library, name)
            last = library.append("live", digest, by="exam", why="passed", step=step + 2)
            os.write(pipe, f"{{last.seq}} {{digest}} {{step}} {{library.snapshot(step).version}}\\n".encode())
            last = library.append("retired", digest, by="exam", why="enough", step=step + 3)
            os.write(pipe, f"{{last.seq}} {{digest}} {{step}} {{library.snapshot(step).version}}\\n".encode())

for number in range(rounds):
    out, into = os.pipe()
    writer = os.fork()
    if writer == 0:
        os.close(out)
        random.seed(number)
        try:
            write(into)
        finally:
            os._exit(1)
    os.close(into)
    time.sleep(random.random() * 0.08)
    os.kill(writer, signal.SIGKILL)
    assert os.waitpid(writer, 0)[1] == signal.SIGKILL, "it ended by itself"
    with os.fdopen(out) as lines:
        told = [line.split() for line in lines.read().splitlines(keepends=True) if line.endswith("\\n")]
    for opened in (Library.read, Library):
        library = opened(path)
        for seq, digest, step, version in told:
            assert library.events[int(seq) - 1].digest == digest and library.spec(digest) and library.source(digest)
            snapshots[int(step)] = version
        for step in list(snapshots)[-3:]:
            assert snapshots[step] == LibraryView.snapshot(library, step).version
        assert library.handed_out >= max(snapshots, default=-1)
    library.close()
    acknowledged += told
view = Library.read(path)
assert all(view.snapshot(step).version == version for step, version in snapshots.items())
assert view.source(view.events[-1].digest)
events = view.events
print(len(acknowledged), len(events))
"""


def test_no_acknowledged_event_is_lost_when_the_writer_is_killed_a_hundred_times(tmp_path: Path) -> None:
    script = KILLED.format(tests=str(Path(__file__).parent))
    done = subprocess.run(
        [sys.executable, "-c", script, str(tmp_path / "library"), "100"], capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr[-3000:]
    acknowledged, events = map(int, done.stdout.split())
    assert acknowledged > 20 and events >= acknowledged


@pytest.fixture(scope="module")
def grown(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A library with some history."""
    path = tmp_path_factory.mktemp("grown") / "library"
    with Library(path) as library:
        library.begin([make_trusted("a"), make_trusted("b")], "run")
        for step in range(4):
            library.snapshot(step)
            digest = take_in(library, f"checker_{step % 3}", step)
            live = {tool.name: tool.digest for tool in library.latest().tools}
            library.append("live", digest, by="exam", why="passed ✓", replaces=live.get(f"checker_{step % 3}"))
    return path


@settings(deadline=None, max_examples=60)
@given(share=st.floats(0, 1), step=st.integers(0, 6))
def test_any_beginning_of_the_log_opens_and_is_the_fold_of_its_whole_lines(
    grown: Path, share: float, step: int
) -> None:
    log = grown / EVENTS_FILE
    data = log.read_bytes()
    cut = data[: round(share * len(data))]
    lines = cut.split(b"\n")[:-1]
    events = [decode(line, number) for number, line in enumerate(lines, 1)]
    try:
        log.write_bytes(cut)
        view = Library.read(grown)
        assert list(view.events) == events
        assert [tool.digest for tool in view.snapshot(step).tools] == fold(events, step).order()
        with Library(grown) as library:
            assert list(library.events) == events
            assert LibraryView.snapshot(library, step) == view.snapshot(step)
    finally:
        log.write_bytes(data)


# --- Versions of the layout -------------------------------------------------------------------------------------------


def test_a_newer_layout_is_refused_by_both_sides(tmp_path: Path) -> None:
    Library(tmp_path).close()
    (tmp_path / "library.json").write_text(json.dumps({"schema": SCHEMA_VERSION + 1}))
    for opened in (Library.read, Library):
        with pytest.raises(
            LibraryError, match=rf"version {SCHEMA_VERSION + 1}, this release .* up to {SCHEMA_VERSION}"
        ):
            opened(tmp_path)


def make_version_0(path: Path) -> None:
    (path / "specs").mkdir(parents=True)
    for name in ("old", "older"):
        values = spec_to_json(make_spec(name)) | {"source": code(name)}
        (path / "specs" / f"{name}.json").write_text(json.dumps(values))
    events = [
        {"time": 1.7e9, "event": "live", "tool": "older", "step": 0, "by": "exam", "why": "passed"},
        {"time": 1.7e9 + 5, "event": "live", "tool": "old", "step": 2, "by": "exam", "why": "passed"},
        {"time": 1.7e9 + 9, "event": "retired", "tool": "older", "step": 4, "by": "ada", "why": "enough"},
    ]
    (path / "log.jsonl").write_text("".join(json.dumps(event) + "\n" for event in events) + '{"torn')
    (path / "library.json").write_text(json.dumps({"schema": 0}))


def test_a_library_of_version_0_is_brought_up_by_its_next_writer(tmp_path: Path) -> None:
    make_version_0(tmp_path)
    with pytest.raises(LibraryError, match="layout of version 0"):
        Library.read(tmp_path)
    with Library(tmp_path) as library:
        assert [names(library, step) for step in (0, 2, 4)] == [["older"], ["older", "old"], ["old"]]
        assert library.source(make_spec("old").digest) == code("old")
        library.append("retired", make_spec("old").digest, by="ada", why="", step=5)
    assert Library.read(tmp_path).refresh() == 4
    assert sorted(path.name for path in (tmp_path / "version-0").iterdir()) == ["log.jsonl", "specs"]


def test_a_migration_that_was_killed_halfway_is_done_again(tmp_path: Path) -> None:
    make_version_0(tmp_path / "whole")
    Library(tmp_path / "whole").close()
    make_version_0(tmp_path / "half")
    (tmp_path / "half" / EVENTS_FILE).write_text("half a li")
    with Library(tmp_path / "half") as library:
        assert library.events == Library.read(tmp_path / "whole").events


def test_the_folder_is_the_runs_own_and_readable(tmp_path: Path) -> None:
    service = Service(RlarConfig(run_dir=str(tmp_path)), "run")
    service.close()
    folder = tmp_path / FOLDER_NAME
    digest = builtin_snapshot().tool("final_answer").digest
    assert sorted(path.name for path in folder.iterdir()) == ["events.jsonl", "library.json", "lock", "tools"]
    assert "math-verify" in (folder / "tools" / digest / "spec.json").read_text()
    assert (folder / "tools" / digest / "source.py").read_text().startswith("# SPDX")
    assert textwrap.shorten((folder / "library.json").read_text(), 80) == '{ "made_by": "verl_rlar", "schema": 1 }'
