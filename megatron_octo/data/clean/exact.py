"""Exact duplicates: documents whose texts agree but for case and white space.

Each shard writes the hashes of its documents, sorted into partitions by their leading bits; one task a partition then
sees all documents with its hashes, of all shards, and nothing else. Memory of that task: 40 bytes for each of them.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
import xxhash

from megatron_octo.files import write_bytes

_KEY = np.dtype([("high", "<u8"), ("low", "<u8"), ("place", "<u4")])
PAIR = np.dtype([("shard", "<u4"), ("place", "<u4"), ("kept_shard", "<u4"), ("kept_place", "<u4")])
"""A document that is left out and the one kept instead: numbers of shards in the build, places in them."""


def same_text(text: str) -> bytes:
    """A form in which texts agree that differ in case, white space or the composition of accents alone."""
    if not text.isascii():
        text = unicodedata.normalize("NFC", text)
    return " ".join(text.lower().split()).encode()


class Keys:
    """Collects the hashes of a shard's documents.

    Args:
        partitions: into how many parts the hashes are cut.
    """

    def __init__(self, partitions: int) -> None:
        self._partitions, self._found = partitions, bytearray()

    def add(self, place: int, text: str) -> None:
        """Note a document."""
        self._found += xxhash.xxh3_128_digest(same_text(text))[::-1]  # low half first, both little-endian
        self._found += place.to_bytes(4, "little")

    def write(self, path: Path) -> None:
        """Write them, partition by partition: first the number of documents in each, then the documents."""
        keys = np.frombuffer(bytes(self._found), _KEY)
        part = _partition(keys, self._partitions)
        counts = np.bincount(part, minlength=self._partitions).astype("<u8")
        write_bytes(path, counts.tobytes() + keys[np.argsort(part, kind="stable")].tobytes())


def _partition(keys: np.ndarray, partitions: int) -> np.ndarray:
    return (keys["high"] % np.uint64(partitions)).astype(np.int64)


def duplicates(files: Sequence[Path], partition: int, partitions: int) -> np.ndarray:
    """Find the exact duplicates of one partition.

    Args:
        files: of `Keys`, in the order of the shards in the build.
        partition: which one.
        partitions: how many there are.

    Returns:
        PAIR [duplicates], ordered by shard and place. The first of equal documents in that order is kept.
    """
    parts = [_read_part(path, partition, partitions) for path in files]
    keys = np.concatenate(parts) if parts else np.empty(0, _KEY)
    shard = np.repeat(np.arange(len(parts), dtype="<u4"), [len(part) for part in parts])
    order = np.lexsort((keys["low"], keys["high"]))  # stable: equal hashes stay in the order of the build
    keys, shard = keys[order], shard[order]
    same = np.zeros(len(keys), bool)
    same[1:] = (keys["high"][1:] == keys["high"][:-1]) & (keys["low"][1:] == keys["low"][:-1])
    first = np.maximum.accumulate(np.where(same, 0, np.arange(len(keys))))[same]
    pairs = np.empty(int(same.sum()), PAIR)
    pairs["shard"], pairs["place"] = shard[same], keys["place"][same]
    pairs["kept_shard"], pairs["kept_place"] = shard[first], keys["place"][first]
    return in_order(pairs)


def _read_part(path: Path, partition: int, partitions: int) -> np.ndarray:
    with path.open("rb") as file:
        counts = np.frombuffer(file.read(8 * partitions), "<u8").astype(np.int64)
        file.seek(int(counts[:partition].sum()) * _KEY.itemsize, 1)
        return np.frombuffer(file.read(int(counts[partition]) * _KEY.itemsize), _KEY)


def in_order(pairs: np.ndarray) -> np.ndarray:
    """Pairs ordered by shard and place."""
    return pairs[np.lexsort((pairs["place"], pairs["shard"]))]


def pairs_of(files: Iterable[Path], shard: int) -> np.ndarray:
    """The pairs of one shard out of files of ordered pairs, in order; PAIR [n]."""
    found = [np.empty(0, PAIR)]
    for path in files:
        pairs = np.load(path, mmap_mode="r")
        edges = np.array([shard, shard + 1], PAIR["shard"])  # of another type, the whole column would be converted
        first, end = np.searchsorted(pairs["shard"], edges)
        found.append(np.array(pairs[first:end]))
    return in_order(np.concatenate(found))
