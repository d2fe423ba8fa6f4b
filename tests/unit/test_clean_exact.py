"""Exact duplicates: the first in the order of the build is kept, whatever the shards and the partitions are."""

from __future__ import annotations

from pathlib import Path

import pytest
from clean_tools import clean, config_of, shards_of

from megatron_octo.data.clean.removals import read_removals
from megatron_octo.data.clean.stages import clean_stages
from megatron_octo.data.engine.executors import Workers

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


def test_nothing_asked_nothing_done(tmp_path: Path) -> None:
    assert clean_stages(config_of(), shards_of(CORPORA), tmp_path, {}) == []
    with pytest.raises(FileNotFoundError):  # that nothing is to be left out is said by a file, not by none
        read_removals(tmp_path, shards_of(CORPORA)["web"][0])


@pytest.mark.timeout(60)
def test_workers_give_the_same_bytes(tmp_path: Path) -> None:
    clean(CORPORA, tmp_path / "one", deduplicate={})
    with Workers(2) as team:
        clean(CORPORA, tmp_path / "two", team, deduplicate={})
    one, two = (
        {str(path.relative_to(root)): path.read_bytes() for path in root.rglob("*") if path.is_file()}
        for root in (tmp_path / "one", tmp_path / "two")
    )
    assert one == two and any("/removals/" in name and content for name, content in one.items())
