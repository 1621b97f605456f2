# SPDX-License-Identifier: Apache-2.0
"""The scout without an LLM, on a stand-in hub of real tiny reward models and hostile repositories."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner, Result

pytest.importorskip("transformers", reason="transformers is not installed (extra `cpu`)")
from hub_repos import HOSTILE, TRAINED, bare, build, change_config, encode, pairs_of
from hub_server import HubServer, says

from verl_rlar.agents.scout import BY, Findings, brief_of, scout
from verl_rlar.cli import app
from verl_rlar.config import HubConfig
from verl_rlar.errors import HubUnreachable
from verl_rlar.hub import Hub
from verl_rlar.types import Kind, Message, Query

NOW = datetime(2026, 7, 1, tzinfo=timezone.utc)
CHAT, SAFETY, RANKER, MATH, TWO, WEAK, INVERTED, WORDY = (trained.repo for trained in TRAINED)


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, float]]:
    """The repositories, and what each model has learned."""
    folder = tmp_path_factory.mktemp("hub")
    return folder, build(folder)


@pytest.fixture
def server(built: tuple[Path, dict[str, float]]) -> Iterator[HubServer]:
    with HubServer(built[0]) as server:
        yield server


@pytest.fixture
def hub(server: HubServer, tmp_path: Path) -> Iterator[Hub]:
    with Hub(HubConfig(endpoint=server.url, offline=False, cache_dir=str(tmp_path), max_wait_s=0)) as hub:
        yield hub


def find(task: str, hub: Hub, **options: Any) -> Findings:
    return scout(brief_of(task), hub, now=NOW, **options)


def test_the_models_are_what_they_are_said_to_be(built: tuple[Path, dict[str, float]]) -> None:
    learned = built[1]
    assert all(learned[repo] >= 0.85 for repo in (CHAT, SAFETY, RANKER, MATH, TWO))
    assert 0.55 <= learned[WEAK] <= 0.8 and learned[INVERTED] <= 0.3 and learned[WORDY] >= 0.75


TASKS = {
    "helpful answers in open chat": CHAT,
    "en-de translation": RANKER,
    "math word problems": MATH,
    "safety: harmful requests are refused": SAFETY,
}


@pytest.mark.parametrize("task", sorted(TASKS))
def test_the_right_model_is_first_and_every_hostile_one_is_refused_with_its_reason(
    hub: Hub, server: HubServer, task: str
) -> None:
    findings = find(task, hub)
    assert findings.by == BY and "no LLM" in findings.by
    assert findings.proposals[0].repo == TASKS[task]
    assert {proposal.repo for proposal in findings.proposals} <= {trained.repo for trained in TRAINED}
    refused = {refusal.repo: refusal.reasons for refusal in findings.refused}
    assert refused.keys() == HOSTILE.keys()
    for repo, reason in HOSTILE.items():
        assert any(found.startswith(reason) for found in refused[repo]), (repo, refused[repo])
    assert not server.asked(r"\.(?:py|bin)$")
    for repo in HOSTILE:
        path = server.folder / repo / "model.safetensors"
        header = 8 + int.from_bytes(path.read_bytes()[:8], "little") if path.exists() else 0
        assert server.sent(f"^/{repo}/resolve/.*safetensors$") <= header


def test_a_proposal_comes_with_receipts(hub: Hub, server: HubServer) -> None:
    best = find("en-de translation", hub).proposals[0]
    assert best.commit == server.commit(RANKER) == best.report.commit and best.report.ok
    assert (best.licence, best.scoring, best.labels) == ("apache-2.0", "one_logit", 1)
    assert 5_000 < best.parameters < 20_000 and best.gib == best.report.weight_bytes / 2**30
    assert "translation" in best.why and "9,000 downloads" in best.why and "one logit" in best.why
    assert {evidence.source for evidence in best.evidence} >= {"tags", "card", "hub", "files"}
    assert set(best.parts) == {"topic", "language", "use", "age", "size", "scoring"} and best.parts["language"] == 1
    two = next(p for p in find("helpfulness", hub).proposals if p.repo == TWO)
    assert (two.scoring, two.labels) == ("several_logits", 2)


def test_the_same_hub_gives_the_same_findings(hub: Hub) -> None:
    first, second = (find("math", hub).as_dict() | {"seconds": 0} for _ in range(2))
    assert first == second
    assert json.loads(json.dumps(first))["proposals"][0]["report"]["ok"] is True


def test_what_was_proposed_loads_from_its_folder_and_scores_as_it_learned(hub: Hub, server: HubServer) -> None:
    import torch
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    best = find("helpful chat", hub).proposals[0]
    place = hub.fetch(hub.inspect(best.repo, best.commit))
    before = len(server.requests)
    settings: dict[str, Any] = {"trust_remote_code": False, "local_files_only": True}
    tokenizer = AutoTokenizer.from_pretrained(place, **settings)
    model = AutoModelForSequenceClassification.from_pretrained(place, use_safetensors=True, **settings).eval()
    prompts, good, bad = zip(*pairs_of("chat")[-40:], strict=True)
    with torch.inference_mode():
        better, worse = model(**encode(tokenizer, prompts * 2, good + bad)).logits[:, 0].chunk(2)
    assert (better > worse).float().mean() > 0.8
    assert len(server.requests) == before


def test_many_hostile_and_popular_ones_do_not_crowd_out_a_good_one(tmp_path: Path) -> None:
    for number in range(40):
        change_config(bare(tmp_path / f"crowd/chat-reward-{number}", downloads=10**6, likes=999), auto_map={"A": "x.Y"})
    bare(tmp_path / "honest/reward-model", downloads=5)
    with HubServer(tmp_path) as server, Hub(HubConfig(endpoint=server.url, offline=False, results=100)) as hub:
        findings = find("chat", hub, most=1)
    assert [proposal.repo for proposal in findings.proposals] == ["honest/reward-model"]
    assert len(findings.refused) == 40


def test_no_more_are_looked_into_than_are_wanted_twice(hub: Hub) -> None:
    findings = find("chat", hub, most=1)
    assert len(findings.proposals) == 1 and findings.looked_at < len(TRAINED) + len(HOSTILE)


def test_one_broken_candidate_does_not_stop_the_others(hub: Hub, server: HubServer) -> None:
    server.faults = [(f"api/models/{CHAT}", says(200, b"broken"), 1)]
    findings = find("chat", hub)
    assert findings.proposals
    assert any(r.repo == CHAT and "hub: " in r.reasons[0] and r.report is None for r in findings.refused)


def test_a_limit_of_the_hub_ends_the_look_and_is_said(hub: Hub, server: HubServer) -> None:
    server.faults = [(f"api/models/{CHAT}", says(429, Retry_After="900"), 1)]
    findings = find("chat", hub)
    assert "900" in findings.faults[0] and "were not looked at" in findings.faults[0]
    assert findings.looked_at < len(TRAINED) + len(HOSTILE)


def test_offline_there_is_nothing_to_search(server: HubServer) -> None:
    with Hub(HubConfig(endpoint=server.url, offline=True)) as hub, pytest.raises(HubUnreachable, match="offline"):
        find("chat", hub)
    assert server.requests == []


# what a task is about


def query(prompt: str, reference: str | None = None, **extra: Any) -> Query:
    return Query(messages=(Message(role="user", content=prompt),), reference=reference, extra=extra)


def test_a_task_is_read_from_its_words() -> None:
    brief = brief_of("Translation from English to French, legal texts")
    assert brief.topics == ("translation",) and brief.languages == ("en", "fr")
    assert brief.words == ("legal", "texts")
    assert brief_of("en→fr translation").languages == ("en", "fr")
    assert brief_of("which answer is better?").topics == ("chat",)
    for pair in ("en-fr", "en – fr", "en -> fr", "en>fr"):
        assert brief_of(f"{pair} translation").languages == ("en", "fr")
    for words in ("safety: is it harmful", "does it say hi to users", "is-it polite"):
        assert brief_of(words).languages == ()


def test_a_task_is_read_from_its_queries() -> None:
    queries = [query("What is 6*7?", "42")] * 9 + [query("Hello!")]
    assert brief_of("my data", queries).topics == ("math", "chat")
    brief = brief_of("my data", [query("Guten Tag", "Bonjour", source_lang="German", target_lang="fr")])
    assert brief.topics == ("translation",) and brief.languages == ("de", "fr")
    assert brief.kinds == (Kind.TRANSLATION,)
    for name, wanted in {
        "Estonian": (),
        "Armenian": (),
        "pt-BR": ("pt",),
        "zh_CN": ("zh",),
        "English": ("en",),
    }.items():
        assert brief_of("my data", [query("Tere", "Hello", target_lang=name)]).languages == wanted


def test_no_more_queries_than_needed_are_read() -> None:
    def endless() -> Iterator[Query]:
        while True:
            yield query("Hello!")

    assert brief_of("my data", endless()).topics == ("chat",)


# the command


def rlar(server: HubServer, *args: str) -> Result:
    settings = ("--set", f"hub.endpoint={server.url}", "--set", "hub.offline=false")
    return CliRunner().invoke(app, ["scout", *settings, *args])


def test_the_command_prints_the_table_the_reasons_and_that_no_llm_was_used(server: HubServer) -> None:
    result = rlar(server, "math word problems", "--most", "2")
    assert result.exit_code == 0, result.output
    assert "no LLM was used" in result.stdout
    assert re.search(rf"1 +{MATH} +[0-9a-f]{{10}} +0\.\d+ +one logit +apache-2\.0", result.stdout)
    assert result.stdout.count("apache-2.0  ") == 2
    for repo, reason in HOSTILE.items():
        assert repo in result.stdout and reason in result.stdout
    assert f"rlar exam {MATH}@{server.commit(MATH)} --data FILE" in result.stdout


def test_the_command_reads_rows_and_prints_json(server: HubServer, tmp_path: Path) -> None:
    rows = tmp_path / "rows.jsonl"
    row = {"prompt": "Translate into German: Good day", "reference": "Guten Tag", "extra": {"target_lang": "de"}}
    rows.write_text(json.dumps(row) + "\nbroken\n")
    result = rlar(server, "my data", "--data", str(rows), "--json")
    assert result.exit_code == 0, result.output
    records = [json.loads(line) for line in result.stdout.splitlines()]
    assert records[0]["type"] == "proposal" and records[0]["rank"] == 1 and records[0]["repo"] == RANKER
    assert records[-1]["type"] == "summary" and records[-1]["by"] == BY
    assert records[-1]["refused"] == len(HOSTILE) == sum(record["type"] == "refused" for record in records)
    assert "line 2" in result.stderr


def test_the_commands_exit_code_says_whether_there_is_a_proposal(server: HubServer) -> None:
    none = rlar(server, "chat", "--set", 'hub.organisations=["nobody"]')
    assert none.exit_code == 1 and "No model passed the gate" in none.stdout
    for args in (["chat", "--set", "hub.licence=[]"], [" "], ["chat", "--data", "no-such-file.jsonl"]):
        assert rlar(server, *args).exit_code == 2
    offline = rlar(server, "chat", "--set", "hub.offline=true")
    assert offline.exit_code == 2
    down = rlar(server, "chat", "--set", "hub.endpoint=http://127.0.0.1:1")
    assert down.exit_code == 2 and "cannot be reached" in down.stderr
