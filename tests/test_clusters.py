# SPDX-License-Identifier: Apache-2.0
"""Clusters of alike prompts: what they depend on, and what outlives a process."""

from __future__ import annotations

import json
import random
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from conftest import make_query

from verl_rlar import clusters as module
from verl_rlar.clusters import Clusters, hard_part, hashed
from verl_rlar.errors import LibraryError
from verl_rlar.features import describe
from verl_rlar.types import Message, Query

NAMES = ("Ann", "Bob", "Carl", "Dora", "Emil")


def shop(n: int) -> Query:
    rng = random.Random(n)
    name, other = rng.sample(NAMES, 2)
    return make_query(
        f"{name} buys {rng.randint(2, 90)} apples and {rng.randint(2, 90)} pears for {other} at the market. "
        f"How much does {name} pay if each costs ${rng.randint(1, 9)}?",
        str(n),
    )


def algebra(n: int) -> Query:
    rng = random.Random(n)
    number = rng.randint(2, 9)
    return make_query(
        rf"Let $f(x) = \frac{{{number}x^2}}{{\sqrt{{x + {number}}}}}$. Find $f({n})$ \pmod{{7}}.",
        str(n),
    )


def ids(clusters: Clusters, queries: list[Query]) -> list[str]:
    return [clusters.of(query) for query in queries]


def test_alike_prompts_are_together_and_unlike_ones_are_not() -> None:
    clusters = Clusters()
    queries = [make(n) for n in range(60) for make in (shop, algebra)]
    found = ids(clusters, queries)
    assert len({*found[::2]}) == len({*found[1::2]}) == 1
    assert found[0] != found[1] and len(clusters) == 2
    assert clusters.name(found[0]).startswith("math/number: "), "it is settled, and named by its words"
    assert {"apples", "pears"} & {*clusters.name(found[0]).replace(",", "").split()}


@pytest.mark.parametrize(
    "other",
    [
        make_query(shop(1).prompt, r"\frac{1}{2}"),
        make_query(shop(1).prompt, None),
        make_query(shop(1).prompt, "1", format="think"),
        replace(shop(1), messages=(Message(role="user", content="Hi"), *shop(1).messages)),
        make_query("小明在市场上买了三个苹果和四个梨, 每个两元. 他付多少钱?", "14"),
    ],
    ids=["reference", "none", "format", "turns", "script"],
)
def test_prompts_with_other_features_are_never_together_however_alike_their_words(other: Query) -> None:
    clusters = Clusters()
    assert clusters.of(shop(1)).rpartition("#")[0] != clusters.of(other).rpartition("#")[0]


def test_neither_the_name_of_a_data_set_nor_the_place_of_a_row_in_it_matters() -> None:
    query = shop(3)
    renamed = replace(query, data_source="gsm8k", extra={"index": 7})
    assert hard_part(query, describe(query)) == hard_part(renamed, describe(renamed))
    assert np.array_equal(hashed(query), hashed(renamed))


def test_the_same_prompts_in_the_same_order_give_the_same_clusters() -> None:
    queries = [random.Random(n).choice((shop, algebra))(n) for n in range(80)]
    first, second = Clusters(), Clusters()
    assert ids(first, queries) == ids(second, queries)
    assert first.all() == second.all()


def test_a_cluster_outlives_its_process_with_its_id_and_centre(tmp_path: Path) -> None:
    path = tmp_path / "clusters.jsonl"
    before = Clusters(path)
    seen = ids(before, [make(n) for n in range(40) for make in (shop, algebra)])
    assert [json.loads(line)["settled"] for line in path.read_text().splitlines()] == [False, False, True, True]
    after = Clusters(path)
    assert after.all() == before.all()
    assert ids(after, [make(n) for n in range(900, 940) for make in (shop, algebra)]) == seen


def test_a_line_that_a_killed_writer_left_unfinished_is_cut_off_and_its_id_given_anew(tmp_path: Path) -> None:
    path = tmp_path / "clusters.jsonl"
    first = Clusters(path).of(shop(1))
    whole = path.read_bytes()
    path.write_bytes(whole + whole[:50])
    again = Clusters(path)
    assert [cluster.id for cluster in again.all()] == [first]
    assert path.read_bytes() == whole
    again.of(make_query("How are you?", None))
    assert len(Clusters(path)) == 2


def test_a_damaged_line_is_an_error_that_says_which(tmp_path: Path) -> None:
    path = tmp_path / "clusters.jsonl"
    Clusters(path).of(shop(1))
    path.write_bytes(path.read_bytes().replace(b'"centre"', b'"center"'))
    with pytest.raises(LibraryError, match=r"clusters\.jsonl, line 1 is damaged"):
        Clusters(path)


def test_a_cluster_that_cannot_be_written_is_not_founded(tmp_path: Path) -> None:
    folder = tmp_path / "gone"
    clusters = Clusters(folder / "clusters.jsonl")
    assert clusters.of(shop(1)) == "math/number" and len(clusters) == 0
    folder.mkdir()
    assert clusters.of(shop(1)) == "math/number#1"


def test_the_number_of_clusters_is_bounded_however_many_unlike_prompts_come() -> None:
    clusters = Clusters()
    rng = random.Random(0)
    for _ in range(300):
        words = ("".join(rng.choices("abcdefghijklmnopqrstuvwxyz", k=9)) for _ in range(12))
        clusters.of(make_query(" ".join(words), None))
    assert len(clusters) == module.PER_KEY
    for n in range(2 * module.MOST):
        clusters.of(make_query(f"Translate: word {n}", "Wort", source_lang=f"l{n}", target_lang="de"))
    assert len(clusters) == module.MOST
    assert clusters.of(make_query("Translate: word", "Wort", source_lang="xx", target_lang="yy")) == "translation/xx-yy"


def test_an_embedding_of_ones_own_may_take_the_place_of_hashed_words(tmp_path: Path) -> None:
    def by_length(query: Query) -> np.ndarray:
        return np.eye(2, dtype=np.float32)[len(query.prompt) % 2]

    path = tmp_path / "clusters.jsonl"
    clusters = Clusters(path, by_length)
    assert len({clusters.of(make_query("a" * n, "1")) for n in range(1, 9)}) == 2
    with pytest.raises(ValueError, match="mismatch"):
        Clusters(path).of(make_query("another", "1"))
