"""Exact duplicates: the first in the order of the build is kept, whatever the shards and the partitions are."""

from __future__ import annotations

import tracemalloc
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from clean_tools import clean, config_of, shards_of
from datatrove.data import Document

from megatron_octo.data.clean.exact import PAIR, pairs_of
from megatron_octo.data.clean.removals import read_removals
from megatron_octo.data.clean.stages import clean_stages
from megatron_octo.data.engine.executors import InProcess, Workers
from megatron_octo.data.engine.stage import run_stages
from megatron_octo.data.index.tokenise import without
from megatron_octo.files import LOCK

CORPORA = {
    "web": [["One text.", "Another text.", "one\n  TEXT."], ["A third.", "another text."]],
    "qa": [["A third.", "A fourth.", "a fifth: caf\u00e9"], ["a fifth: cafe\u0301", "One text.", "one text!"]],
}
KEPT = {
    "web/0.jsonl:3": "web/0.jsonl:1",
    "web/1.jsonl:2": "web/0.jsonl:2",
    "qa/0.jsonl:1": "web/1.jsonl:1",
    "qa/1.jsonl:1": "qa/0.jsonl:3",
    "qa/1.jsonl:2": "web/0.jsonl:1",
}


@pytest.mark.parametrize("partitions", [1, 3, 64])
def test_first_is_kept(tmp_path: Path, partitions: int) -> None:
    found = clean(CORPORA, tmp_path, deduplicate={"partitions": partitions})
    assert {name: removal.other for name, removal in found.items()} == KEPT
    assert {removal.reason for removal in found.values()} == {"exact_duplicate"}
    assert found["web/0.jsonl:3"].excerpt == "one TEXT."


def test_order_of_corpora_decides(tmp_path: Path) -> None:
    turned = {"qa": CORPORA["qa"], "web": CORPORA["web"]}
    found = clean(turned, tmp_path, deduplicate={})
    assert found["web/0.jsonl:1"].other == "qa/1.jsonl:2" and "qa/1.jsonl:2" not in found


@pytest.mark.parametrize("how", [{}, {"exact": False, "near": {}}])
def test_a_corpus_with_a_budget_takes_nothing_from_one_without(tmp_path: Path, how: dict[str, object]) -> None:
    """Both kinds of duplicates keep the same documents: a corpus may leave its copies beyond its budget."""
    texts = ["one text of more than five words", "another text of more than five words, it is"]
    corpora = {
        "first": {"path": "f", "tokens": 9}, "second": {"path": "s", "tokens": 9}, "whole": {"path": "w"}
    }  # fmt: skip
    own = {"first": [texts], "second": [texts], "whole": [texts[:1]]}
    found = clean(own, tmp_path, corpora=corpora, deduplicate=how)
    assert {name: removal.other for name, removal in found.items()} == {
        "first/0.jsonl:1": "whole/0.jsonl:1",
        "second/0.jsonl:1": "whole/0.jsonl:1",
        "second/0.jsonl:2": "first/0.jsonl:2",
    }


def test_nothing_asked_nothing_done(tmp_path: Path) -> None:
    assert clean_stages(config_of(), shards_of(CORPORA), tmp_path, {}) == []
    with pytest.raises(FileNotFoundError):  # that nothing is to be left out is said by a file, not by none
        list(read_removals(tmp_path, shards_of(CORPORA)["web"][0]))


@pytest.mark.timeout(60)
def test_workers_give_the_same_bytes(tmp_path: Path) -> None:
    clean(CORPORA, tmp_path / "one", deduplicate={})
    with Workers(2) as team:
        clean(CORPORA, tmp_path / "two", team, deduplicate={})
    one, two = (
        {
            str(path.relative_to(root)): path.read_bytes()
            for path in root.rglob("*")
            if path.is_file() and path.name != LOCK
        }
        for root in (tmp_path / "one", tmp_path / "two")
    )
    assert one == two and any("/removals/" in name and content for name, content in one.items())


def _many(shard: Any) -> Iterator[Document]:
    """10,000 texts; those of the second shard are those of the first, each twice."""
    for place in range(10_000):
        text = f"text {place // 2 if shard.number else place} {'of several words ' * 9}"
        yield Document(text, f"{shard.path}:{place + 1}")


@pytest.mark.timeout(60)
def test_a_duplicate_takes_no_memory_for_its_text(tmp_path: Path) -> None:
    """Millions of them in one shard must fit a worker: they are told as numbers, and read one at a time."""
    shards = shards_of({"a": [[], []]})
    stages = clean_stages(config_of(deduplicate={"partitions": 1}), shards, tmp_path, {}, _many)
    run_stages(stages[:-1], tmp_path, InProcess())
    counted: dict[str, int] = {}

    def peak(work: Callable[[], Any]) -> float:
        tracemalloc.reset_peak()
        before = tracemalloc.get_traced_memory()[0]
        work()
        return (tracemalloc.get_traced_memory()[1] - before) / 10_000

    tracemalloc.start()
    try:
        decided = peak(lambda: stages[-1].work(stages[-1].tasks[1]))
        left_out = peak(lambda: list(without(_many(shards["a"][1]), read_removals(tmp_path, shards["a"][1]), counted)))
    finally:
        tracemalloc.stop()
    assert counted == {"exact_duplicate": 10_000}
    assert decided < 200 and left_out < 100, "bytes of each"


def test_the_pairs_of_a_shard_are_found_without_a_copy_of_all(tmp_path: Path) -> None:
    pairs = np.zeros(200_000, PAIR)
    pairs["shard"], pairs["place"] = np.arange(200_000) // 10, np.arange(200_000)
    np.save(tmp_path / "all.npy", pairs)
    tracemalloc.start()
    try:
        found = pairs_of([tmp_path / "all.npy"], 700)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert found["place"].tolist() == list(range(7000, 7010))
    assert peak < 100_000, "not 8 bytes for each pair of all shards"
