"""Signatures of documents by MinHash, with datatrove's hash functions and in its files.

Ours is what the words are: those of `words`, with numbers as they stand, since texts that differ in numbers are
different problems here. Ours is also what is kept of a cluster: the first document in the order of the build, not
whichever gathered most others.
"""

from __future__ import annotations

import uuid
from pathlib import Path
from typing import IO, Any

import numpy as np

from megatron_octo.config.clean import NearDuplicates
from megatron_octo.data.clean.words import Batch, ngrams

_MERSENNE = np.uint64((1 << 61) - 1)
_SHIFT = np.uint64(61)


class Signatures:
    """Writes the signatures of a shard's documents: for each bucket one file, sorted, as datatrove does.

    Args:
        folder: of all shards; a shard's part of bucket b is `bucket_<b>/<number>.minhash.sig`.
        number: of the shard.
        settings: how documents are compared.
    """

    def __init__(self, folder: Path, number: int, settings: NearDuplicates) -> None:
        from datatrove.pipeline.dedup.minhash import MinhashDedupSignature

        self._settings = settings
        self._record = signature_type(settings)
        self.paths = [signature_path(folder, bucket, number) for bucket in range(settings.buckets)]
        multiply, add = MinhashDedupSignature(str(folder), datatrove_config(settings), _no_words()).parameters
        self._functions = list(zip(multiply[0], add[0], strict=True))
        for path in self.paths:
            path.parent.mkdir(parents=True, exist_ok=True)
        # names of their own, for the task may be done twice at once; and beside the folders that datatrove lists
        own = uuid.uuid4().hex[:12]
        self._temporary = [folder / f".{bucket:03d}.{number:05d}.{own}.partial" for bucket in range(settings.buckets)]
        self._files: list[IO[bytes]] = []
        for path in self._temporary:
            self._files.append(path.open("w+b"))

    def add(self, batch: Batch, numbers: list[int], places: list[int]) -> None:
        """Note documents of a batch; one with fewer words than an n-gram is left alone.

        Args:
            batch: texts.
            numbers: which of them.
            places: their places in the shard.
        """
        hashes, first = batch.words.hashes, batch.first
        found = [ngrams(hashes[first[number] : first[number + 1]], self._settings.ngram) for number in numbers]
        sizes = np.array([len(shingles) for shingles in found], np.int64)
        if not sizes.any():
            return
        shingles, starts = np.concatenate(found), (np.cumsum(sizes) - sizes)[sizes > 0]
        least = minima(shingles, starts, self._functions)
        wide = self._settings.hashes_per_bucket
        records = np.empty(len(starts), self._record)
        records["place"] = np.array(places)[sizes > 0]
        for bucket, file in enumerate(self._files):
            records["hashes"] = least[:, bucket * wide : (bucket + 1) * wide]
            file.write(records.tobytes())

    def finish(self) -> None:
        """Sort what was noted, one bucket at a time, and give the files their names."""
        for file, temporary, path in zip(self._files, self._temporary, self.paths, strict=True):
            file.seek(0)
            records = np.frombuffer(file.read(), self._record)
            columns = [records["place"], *records["hashes"].T[::-1]]
            file.seek(0)
            file.write(records[np.lexsort(columns)].tobytes())
            file.close()
            temporary.replace(path)

    def close(self) -> None:
        """Let go of files that were not finished."""
        for file, temporary in zip(self._files, self._temporary, strict=False):
            file.close()
            temporary.unlink(missing_ok=True)


def signature_type(settings: NearDuplicates) -> np.dtype:
    """What a file of signatures holds for each document."""
    return np.dtype([("hashes", "<u8", (settings.hashes_per_bucket,)), ("place", "<u4")])


def signature_path(folder: Path, bucket: int, number: int) -> Path:
    """Where a shard's part of a bucket is."""
    return folder / f"bucket_{bucket:03d}" / f"{number:05d}.minhash.sig"


def minima(shingles: np.ndarray, starts: np.ndarray, functions: list[tuple[np.uint64, np.uint64]]) -> np.ndarray:
    """The least value of each hash function over the shingles of each document.

    Args:
        shingles: of all documents one after another, uint64 [s].
        starts: where each document starts; none is empty.
        functions: factor and summand of each, as datatrove draws them; values are taken modulo 2**61 - 1.

    Returns:
        uint64 [documents, functions].
    """
    found = np.empty((len(functions), len(starts)), np.uint64)
    for row, (factor, summand) in enumerate(functions):
        values = shingles * factor
        values += summand
        high = values >> _SHIFT
        values &= _MERSENNE
        values += high
        values[values >= _MERSENNE] -= _MERSENNE
        found[row] = np.minimum.reduceat(values, starts)
    return found.T


def datatrove_config(settings: NearDuplicates) -> Any:
    """The settings as datatrove has them."""
    from datatrove.pipeline.dedup.minhash import MinhashConfig

    return MinhashConfig(settings.ngram, settings.buckets, settings.hashes_per_bucket, settings.seed)


def _no_words() -> Any:
    """A tokenizer that is never asked: datatrove's own for English is spaCy, which the signatures here do not need."""
    from datatrove.utils.word_tokenizers import WhitespaceTokenizer

    return WhitespaceTokenizer()
