"""Indexed files: the bytes of megatron's own builder, and every damage refused by name."""

from __future__ import annotations

import random
import struct
from pathlib import Path

import numpy as np
import pytest

from megatron_octo.data.index.inspect import inspect
from megatron_octo.data.index.pairs import bin_path, idx_path, read_index
from megatron_octo.data.index.writer import write_indexed
from megatron_octo.errors import DataError
from megatron_octo.files import hash_file

LENGTHS, POINTERS, MARKS = 34, 34 + 50 * 4, 34 + 50 * 12  # where they start in the index of `pair`


def _documents(count: int, vocabulary: int, seed: int = 0) -> list[list[int]]:
    chance = random.Random(seed)
    return [[chance.randrange(vocabulary) for _ in range(chance.randint(1, 60))] for _ in range(count)]


@pytest.fixture
def pair(tmp_path: Path) -> Path:
    write_indexed(tmp_path / "pair", _documents(50, 500), 500)
    return tmp_path / "pair"


@pytest.mark.parametrize(("vocabulary", "dtype"), [(500, np.uint16), (65499, np.uint16), (65500, np.int32)])
def test_bytes_are_megatrons(tmp_path: Path, vocabulary: int, dtype: type) -> None:
    import torch
    from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

    documents = _documents(200, vocabulary)
    builder = IndexedDatasetBuilder(str(tmp_path / "megatron.bin"), dtype=dtype)
    for document in documents:
        builder.add_document(torch.tensor(document), [len(document)])
    builder.finalize(str(tmp_path / "megatron.idx"))
    written = write_indexed(tmp_path / "ours", documents, vocabulary)
    assert bin_path(tmp_path / "ours").read_bytes() == (tmp_path / "megatron.bin").read_bytes()
    assert idx_path(tmp_path / "ours").read_bytes() == (tmp_path / "megatron.idx").read_bytes()
    assert (written.documents, written.tokens) == (200, sum(map(len, documents)))
    assert written.largest_token == max(map(max, documents))
    _, counts = np.unique(np.concatenate([np.array(document) for document in documents]), return_counts=True)
    shares = counts / counts.sum()
    assert written.unigram_entropy == pytest.approx(-(shares * np.log(shares)).sum())
    assert sorted(path.name for path in tmp_path.iterdir()) == ["megatron.bin", "megatron.idx", "ours.bin", "ours.idx"]


def test_read_back(pair: Path) -> None:
    index = read_index(pair)
    assert [index.document(number).tolist() for number in range(50)] == _documents(50, 500)
    facts = inspect(pair, first=2)
    assert facts["documents"] == 50 and facts["dtype"] == "uint16"
    assert facts["bytes"] == 2 * facts["tokens"] == 2 * len(index.all_tokens())
    assert [sample["ids"] for sample in facts["samples"]] == _documents(50, 500)[::49]
    assert facts["checked"].endswith("; hashes were not compared, for there is no manifest.json beside the pair")
    (pair.parent / "manifest.json").write_text('{"sources": {"other": {}}}')
    assert inspect(pair)["checked"].endswith("; hashes were not compared, for the manifest does not list pair")


def _cut(path: Path, size: int) -> None:
    path.write_bytes(path.read_bytes()[:size])


def _put(path: Path, offset: int, value: bytes) -> None:
    content = bytearray(path.read_bytes())
    content[offset : offset + len(value)] = value
    path.write_bytes(bytes(content))


DAMAGES = {
    "idx empty": (lambda b, i: _cut(i, 0), ".idx", "too few for an index"),
    "idx cut in the header": (lambda b, i: _cut(i, 20), ".idx", "too few for an index"),
    "idx cut in the lengths": (lambda b, i: _cut(i, 100), ".idx", "documents need"),
    "idx longer": (lambda b, i: i.write_bytes(i.read_bytes() + b"\0"), ".idx", "documents need"),
    "idx garbage": (lambda b, i: i.write_bytes(b"\xa7" * 500), ".idx", "does not start with the mark"),
    "idx version": (lambda b, i: _put(i, 9, b"\x02"), ".idx", "version 2"),
    "idx token type": (lambda b, i: _put(i, 17, b"\x09"), ".idx", "token type 9"),
    "idx count": (lambda b, i: _put(i, 18, struct.pack("<Q", 2**60)), ".idx", "documents need"),
    "idx pointer outside": (lambda b, i: _put(i, POINTERS + 8, struct.pack("<q", 2**40)), ".idx", "positions"),
    "idx negative length": (lambda b, i: _put(i, LENGTHS, struct.pack("<i", -5)), ".idx", "negative"),
    "idx document marks": (lambda b, i: _put(i, MARKS, struct.pack("<q", 7)), ".idx", "document marks"),
    "bin half": (lambda b, i: _cut(b, b.stat().st_size // 2), ".bin", "counts"),
    "bin empty": (lambda b, i: _cut(b, 0), ".bin", "counts"),
    "bin one byte more": (lambda b, i: b.write_bytes(b.read_bytes() + b"\0"), ".bin", "counts"),
    "bin missing": (lambda b, i: b.unlink(), ".bin", "does not exist"),
    "idx missing": (lambda b, i: i.unlink(), ".idx", "does not exist"),
}


@pytest.mark.parametrize("name", DAMAGES)
def test_damage_is_refused(pair: Path, name: str) -> None:
    damage, suffix, reason = DAMAGES[name]
    damage(bin_path(pair), idx_path(pair))
    with pytest.raises(DataError) as caught:
        read_index(pair)
    assert f"{pair}{suffix}" in caught.value.what and reason in caught.value.what
    assert caught.value.fix


def test_an_unfinished_pair_does_not_show(tmp_path: Path, pair: Path) -> None:
    before = hash_file(bin_path(pair))

    def broken() -> object:
        yield [1, 2, 3]
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_indexed(pair, broken(), 500)
    assert hash_file(bin_path(pair)) == before and read_index(pair).documents == 50


def test_a_token_outside_the_vocabulary_is_not_written(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="token 500 is outside a vocabulary of 500"):
        write_indexed(tmp_path / "pair", [[1, 2], [3, 500]], 500)
    assert list(tmp_path.iterdir()) == []
