"""Near duplicates: datatrove's signatures and buckets, our words, the first document of a cluster."""

from __future__ import annotations

import random
import re
import resource
import subprocess
import sys
import tracemalloc
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from clean_tools import clean
from datatrove.data import Document

from megatron_octo.config.clean import NearDuplicates
from megatron_octo.data.clean import pairs
from megatron_octo.data.clean.near import Signatures, datatrove_config, signature_path, signature_type
from megatron_octo.data.clean.pairs import cluster, find_candidates
from megatron_octo.data.clean.words import Batch, ngrams, words_of
from megatron_octo.data.engine.executors import Workers
from megatron_octo.errors import machine_problem

NEAR = {"deduplicate": {"near": {}}}
WORDS = ("river", "stone", "lantern", "market", "winter", "harbour", "copper", "garden", "silver", "window", "bridge")


def _text(seed: int, words: int = 120) -> str:
    draw = random.Random(seed)
    return " ".join(draw.choice(WORDS) + draw.choice("abcdefgh") for _ in range(words))


def _changed(text: str, places: list[int]) -> str:
    words = text.split()
    for place in places:
        words[place] = "other"
    return " ".join(words)


def test_clusters_over_corpora_keep_the_first(tmp_path: Path) -> None:
    one, two = _text(1), _text(2)
    corpora = {
        "a": [[_changed(two, [3]), "short"], [one, _text(3)]],
        "b": [[_changed(one, [40]), two, "short"], [_changed(one, [40, 80]), one.upper() + "!", _text(4)]],
    }
    found = clean(corpora, tmp_path, **NEAR)
    kept = {name: (removal.reason, removal.other) for name, removal in found.items()}
    assert kept == {
        "b/0.jsonl:1": ("near_duplicate", "a/1.jsonl:1"),
        "b/0.jsonl:2": ("near_duplicate", "a/0.jsonl:1"),
        "b/0.jsonl:3": ("exact_duplicate", "a/0.jsonl:2"),
        "b/1.jsonl:1": ("near_duplicate", "a/1.jsonl:1"),
        "b/1.jsonl:2": ("near_duplicate", "a/1.jsonl:1"),
    }


def test_an_exact_duplicate_names_the_document_that_is_kept(tmp_path: Path) -> None:
    """Not the first of its own kind, where that one is left out as well."""
    text, like = _text(5), _changed(_text(5), [10])
    found = clean({"a": [[text, like, like]]}, tmp_path, **NEAR)
    assert {name: (r.reason, r.other) for name, r in found.items()} == {
        "a/0.jsonl:2": ("near_duplicate", "a/0.jsonl:1"),
        "a/0.jsonl:3": ("exact_duplicate", "a/0.jsonl:1"),
    }


def test_other_numbers_are_another_problem(tmp_path: Path) -> None:
    problem = (
        "A train travels {} miles in {} hours. At the same rate, how many additional hours would it take to travel an "
        "additional {} miles? It travels {} miles in an hour, so it takes {} hours."
    )
    found = clean({"a": [[problem.format(270, 3, 180, 90, 2), problem.format(360, 4, 540, 91, 6)]]}, tmp_path, **NEAR)
    assert found == {}


@pytest.mark.timeout(120)
def test_shards_and_workers_change_nothing(tmp_path: Path) -> None:
    texts = [_text(number % 9) if number % 3 else _changed(_text(number), [5]) for number in range(30)]
    whole = clean({"a": [texts]}, tmp_path / "whole", **NEAR)
    places = {int(name.rpartition(":")[2]) - 1 for name in whole}
    assert 12 < len(places) < 30
    with Workers(2) as team:
        cut = clean({"a": [texts[:7], texts[7:21], texts[21:]]}, tmp_path / "cut", team, **NEAR)
    assert {(0, 7, 21)[int(name[2])] + int(name.rpartition(":")[2]) - 1 for name in cut} == places


def test_old_signatures_join_nothing(tmp_path: Path) -> None:
    """Two texts that only a third makes one cluster are two again when that one's file is no more."""
    middle = _text(0)
    ends = [_changed(middle, [10, 30, 50, 70]), _changed(middle, [20, 40, 60, 80])]
    assert set(clean({"a": [ends, [middle]]}, tmp_path, **NEAR)) == {"a/0.jsonl:2", "a/1.jsonl:1"}
    assert clean({"a": [ends]}, tmp_path, **NEAR) == {}


def test_signatures_are_datatroves(tmp_path: Path) -> None:
    """The same files that datatrove writes for the same shingles, byte for byte."""
    from datatrove.pipeline.dedup.minhash import MinhashDedupSignature
    from datatrove.utils.word_tokenizers import WhitespaceTokenizer

    settings = NearDuplicates(buckets=3, hashes_per_bucket=4)
    texts = [_text(number, 5 + 7 * number) for number in range(12)] + ["too short"]

    class OurWords(MinhashDedupSignature):
        def get_shingles(self, text: str) -> Any:
            return ngrams(words_of(text).hashes, settings.ngram).reshape(-1, 1)

    theirs = OurWords(str(tmp_path / "theirs"), datatrove_config(settings), WhitespaceTokenizer())
    theirs.run((Document(text, str(number)) for number, text in enumerate(texts)), rank=4)
    ours = Signatures(tmp_path / "ours", 4, settings)
    for first in (0, 5):
        some = texts[first : first + 5] if not first else texts[first:]
        ours.add(Batch(some), list(range(len(some))), list(range(first, first + len(some))))
    ours.finish()
    for path in ours.paths:
        other = tmp_path / "theirs" / path.relative_to(tmp_path / "ours")
        assert path.read_bytes() == other.read_bytes() and path.stat().st_size == 12 * 36


def _bucket(folder: Path, settings: NearDuplicates, shards: int, each: int) -> list[Path]:
    """Signatures of one bucket out of few values, so that many agree wholly, and more in their first hash alone."""
    draw, record = np.random.default_rng(0), signature_type(settings)
    paths = [signature_path(folder, 0, number) for number in range(shards)]
    paths[0].parent.mkdir(parents=True)
    for path in paths:
        found = np.empty(each if path != paths[3] else 0, record)
        found["place"] = np.arange(len(found))
        found["hashes"] = draw.integers(0, 40, found["hashes"].shape) ** 4
        found["hashes"][:, 2:] = 7
        if path == paths[5]:
            found["hashes"][:, 0] = 16  # more of one range than a shard has on the average
        found[np.lexsort([found["place"], *found["hashes"].T[::-1]])].tofile(path)
    return paths


@pytest.mark.parametrize("together", [1 << 18, 300, 7])
def test_pairs_are_datatroves(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, together: int) -> None:
    """The same file that datatrove writes, byte for byte, in however many ranges the signatures are read."""
    from datatrove.pipeline.dedup.minhash import MinhashDedupBuckets

    settings = NearDuplicates(buckets=1, hashes_per_bucket=4)
    _bucket(tmp_path / "signatures", settings, 9, 200)
    config = datatrove_config(settings)
    MinhashDedupBuckets(str(tmp_path / "signatures"), str(tmp_path / "theirs"), config=config).run(None, 0, 1)
    monkeypatch.setattr(pairs, "_TOGETHER", together)
    monkeypatch.setattr(pairs, "_OF_EACH", 0)
    ours = find_candidates(tmp_path / "signatures", tmp_path / "ours", 0, 9, settings)
    assert ours.read_bytes() == (tmp_path / "theirs" / ours.name).read_bytes()
    assert 400 < ours.stat().st_size // 16 < 1600


def test_many_shards_are_not_opened_for_a_few_signatures_each(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    settings, opened, fromfile = NearDuplicates(buckets=1, hashes_per_bucket=4), [], np.fromfile
    _bucket(tmp_path, settings, 40, 200)
    whole = find_candidates(tmp_path, tmp_path / "whole", 0, 40, settings).read_bytes()
    monkeypatch.setattr(np, "fromfile", lambda *given, **how: (opened.append(1), fromfile(*given, **how))[1])
    monkeypatch.setattr(pairs, "_TOGETHER", 100)
    assert find_candidates(tmp_path, tmp_path / "ranges", 0, 40, settings).read_bytes() == whole
    assert 40 < len(opened) < 2 * (40 + 40 * 200 / 64), "each twice, or once for 64 signatures"


def test_more_shards_than_files_may_be_open(tmp_path: Path) -> None:
    settings = NearDuplicates(buckets=1, hashes_per_bucket=4)
    _bucket(tmp_path, settings, 80, 30)
    code = (
        "import pathlib, resource, sys; from megatron_octo.config.clean import NearDuplicates\n"
        "from megatron_octo.data.clean.pairs import find_candidates\n"
        "resource.setrlimit(resource.RLIMIT_NOFILE, (32, 32)); folder = pathlib.Path(sys.argv[1])\n"
        "settings = NearDuplicates(buckets=1, hashes_per_bucket=4)\n"
        "print(find_candidates(folder, folder / 'pairs', 0, 80, settings).stat().st_size)"
    )
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0 and int(done.stdout) > 0, done.stderr


def test_cluster_of_a_long_chain(tmp_path: Path) -> None:
    links = [(0, number, 0, number + 1) for number in range(500)] + [(2, 7, 1, 9), (1, 9, 3, 0)]
    random.Random(0).shuffle(links)
    np.array(links, "<u4").tofile(tmp_path / "whole")
    buckets = [tmp_path / str(number) for number in range(4)]
    for number, path in enumerate(buckets):
        np.array(links[number::4], "<u4").tofile(path)
    found = cluster([tmp_path / "whole"])
    assert len(found) == 502
    assert {tuple(pair)[2:] for pair in found.tolist() if pair[0] == 0} == {(0, 0)}
    assert [tuple(pair) for pair in found.tolist() if pair[0]] == [(2, 7, 1, 9), (3, 0, 1, 9)]
    assert (cluster(buckets) == found).all(), "links that join clusters may be in any bucket"


def test_a_pair_of_many_buckets_is_joined_once(tmp_path: Path) -> None:
    """Equal documents are a pair in each of 14 buckets; memory is that of two of them."""
    pair = np.zeros((20_000, 4), "<u4")
    pair[:, 2], pair[:, 1], pair[:, 3] = 1, np.arange(20_000), np.arange(20_000)
    pair.tofile(tmp_path / "pairs")
    tracemalloc.start()
    try:
        assert len(cluster([tmp_path / "pairs"] * 14)) == 20_000
        assert tracemalloc.get_traced_memory()[1] < 300 * 20_000
    finally:
        tracemalloc.stop()


def test_signatures_written_twice_at_once_are_whole(tmp_path: Path) -> None:
    """One task may be done by two workers: what ends first stays, whenever the other one dies."""
    settings, texts = NearDuplicates(buckets=2), [f"a text of several words, number {number}" for number in range(50)]
    first = Signatures(tmp_path, 0, settings)
    first.add(Batch(texts), list(range(50)), list(range(50)))
    other = Signatures(tmp_path, 0, settings)
    first.finish()
    whole = [path.read_bytes() for path in first.paths]
    other.add(Batch(texts[:1]), [0], [0])
    other.close()
    alone = Signatures(tmp_path / "alone", 0, settings)
    alone.add(Batch(texts), list(range(50)), list(range(50)))
    alone.finish()
    assert whole == [path.read_bytes() for path in first.paths] == [path.read_bytes() for path in alone.paths]
    assert not list(tmp_path.rglob("*.partial"))


def test_too_many_open_files_is_one_line(tmp_path: Path) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    Signatures(tmp_path, 0, NearDuplicates()).close()  # what it imports is imported
    resource.setrlimit(resource.RLIMIT_NOFILE, (12, hard))
    try:
        with pytest.raises(OSError) as caught:
            Signatures(tmp_path, 1, NearDuplicates(buckets=14))
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    assert re.search("too many open files; one process may have .*ulimit -n", str(machine_problem(caught.value)))
