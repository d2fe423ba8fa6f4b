"""Which documents share a bucket of signatures, and what becomes of a cluster of them.

The pairs are those that datatrove finds, in its order and its files. It opens the signatures of all shards at once and
compares them one by one; here they are read by ranges of their first hash, one file after another, so that the limit of
open files does not matter. The more shards there are, the larger the ranges, for each of these opens all files.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from megatron_octo.config.clean import NearDuplicates
from megatron_octo.data.clean.exact import PAIR, in_order
from megatron_octo.data.clean.near import signature_path, signature_type
from megatron_octo.files import replacing

_TOGETHER = 1 << 18  # signatures that are sorted together, about, or more:
_OF_EACH = 64  # so many of each shard, or most of the time would go into opening files
_SAMPLED = 64  # hashes drawn for each range, to make the ranges equally large
_LOW = np.uint64(0xFFFFFFFF)


def find_candidates(folder: Path, out: Path, bucket: int, shards: int, settings: NearDuplicates) -> Path:
    """Find the documents that share a bucket.

    Memory: 300 bytes for each of a quarter of a million signatures, of 64 for each shard, or of those that have one
    first hash in common, whichever are most; that is 2 GB for 100 000 shards.

    Args:
        folder: of `Signatures`.
        out: where the file of pairs is written.
        bucket: which one.
        shards: how many there are; signatures of others are of inputs that are no more.
        settings: how documents are compared.

    Returns:
        The file of pairs: shard and place of two documents, the one before first; uint32 [pairs, 4].
    """
    record, found = signature_type(settings), candidates_path(out, bucket)
    paths = [signature_path(folder, bucket, number) for number in range(shards)]
    found.parent.mkdir(parents=True, exist_ok=True)
    with replacing(found) as temporary, temporary.open("wb") as file:
        for signatures, owners in _ranges(paths, record):
            file.write(_alike(signatures, owners).tobytes())
    return found


def candidates_path(out: Path, bucket: int) -> Path:
    """Where the pairs of a bucket are."""
    return out / f"{bucket:05d}_00.dups"


def _ranges(paths: Sequence[Path], record: np.dtype) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """The signatures of all shards by ranges of their first hash, each with its shard, in the order of shards."""
    sizes = [path.stat().st_size // record.itemsize for path in paths]
    edges = _edges(paths, sizes, record)
    done = [0] * len(paths)
    for edge in (*edges, None):
        parts = []
        for number, path in enumerate(paths):
            guess = (sizes[number] - done[number]) if edge is None else sizes[number] // len(edges) + 16
            parts.append(_below(path, record, done[number], edge, guess))
            done[number] += len(parts[-1])
        owners = np.repeat(np.arange(len(parts), dtype="<u4"), [len(part) for part in parts])
        yield np.concatenate([np.empty(0, record), *parts]), owners


def _edges(paths: Sequence[Path], sizes: Sequence[int], record: np.dtype) -> list[int]:
    """First hashes that cut all signatures into ranges of about the same size; minima crowd at small values."""
    ranges = -(-sum(sizes) // max(_TOGETHER, _OF_EACH * len(sizes)))
    if ranges <= 1:
        return []
    step, skip, drawn = max(1, sum(sizes) // (_SAMPLED * ranges)), 0, []
    for path, size in zip(paths, sizes, strict=True):
        if size > skip:
            drawn.append(np.array(np.memmap(path, record, "r")["hashes"][skip::step, 0]))
        skip = (skip - size) % step
    sample = np.sort(np.concatenate(drawn))
    return sorted({int(sample[len(sample) * number // ranges]) for number in range(1, ranges)})


def _below(path: Path, record: np.dtype, first: int, edge: int | None, guess: int) -> np.ndarray:
    """The signatures of a shard from one on whose first hash is less than an edge; read so many at a time."""
    parts = []
    while True:
        some = np.fromfile(path, record, guess, offset=first * record.itemsize)
        end = len(some) if edge is None else int(np.searchsorted(some["hashes"][:, 0], np.uint64(edge)))
        parts.append(some[:end])
        if end < guess or edge is None:
            return np.concatenate(parts)
        first += guess


def _alike(signatures: np.ndarray, owners: np.ndarray) -> np.ndarray:
    """Pairs of neighbours among the documents of equal signatures, by signature, shard and place; uint32 [pairs, 4]."""
    column = np.ascontiguousarray(signatures["hashes"][:, 0])
    order = np.argsort(column, kind="stable")
    column = column[order]
    shared = np.zeros(len(order), bool)
    shared[1:] = column[1:] == column[:-1]
    shared[:-1] |= shared[1:]
    order = order[shared]  # few are left to be compared in full
    signatures, owners = signatures[order], owners[order]
    order = np.lexsort(signatures["hashes"].T[::-1])  # stable: equal ones stay in the order of shards and places
    signatures, owners = signatures[order], owners[order]
    second = np.flatnonzero((signatures["hashes"][1:] == signatures["hashes"][:-1]).all(axis=1)) + 1
    sides = [(owners[rows], signatures["place"][rows]) for rows in (second - 1, second)]
    return np.stack([column for side in sides for column in side], axis=1).astype("<u4")


def cluster(files: Sequence[Path]) -> np.ndarray:
    """Join pairs to clusters, and name the first document of each as the one that is kept.

    Args:
        files: pairs of documents that share a bucket, of all buckets.

    Returns:
        PAIR [documents left out], ordered. Memory: about 125 bytes for each pair of one bucket and each document left
        out so far; a document with a double is one pair of every bucket, and counts twice and not as often as that.
    """
    links = np.empty((0, 2), np.uint64)
    for path in files:
        pairs = np.fromfile(path, "<u4").reshape(-1, 4)
        links = _join(np.concatenate([links, (pairs[:, 0::2].astype(np.uint64) << np.uint64(32)) | pairs[:, 1::2]]))
    found = np.empty(len(links), PAIR)
    for names, chosen in ((("shard", "place"), links[:, 0]), (("kept_shard", "kept_place"), links[:, 1])):
        found[names[0]], found[names[1]] = chosen >> np.uint64(32), chosen & _LOW
    return in_order(found)


def _join(links: np.ndarray) -> np.ndarray:
    """All documents of linked ones but the first of each cluster, each linked with that first one; uint64 [n, 2]."""
    documents, edges = np.unique(links, return_inverse=True)
    edges = edges.reshape(-1, 2)
    first = np.arange(len(documents))
    while True:
        least = np.minimum(first[edges[:, 0]], first[edges[:, 1]])
        before = first.copy()
        np.minimum.at(first, before[edges[:, 0]], least)
        np.minimum.at(first, before[edges[:, 1]], least)
        first = first[first]
        if np.array_equal(first, before):
            break
    out = np.flatnonzero(first != np.arange(len(documents)))
    return np.stack([documents[out], documents[first[out]]], axis=1)
