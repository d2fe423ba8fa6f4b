"""Writing an indexed pair: temporary names while it grows, its own names when both files are whole."""

from __future__ import annotations

import io
import math
import uuid
from array import array
from collections.abc import Iterable
from pathlib import Path

import numpy as np

from megatron_octo.data.index.pairs import bin_path, idx_path, token_dtype, write_index
from megatron_octo.errors import DataError
from megatron_octo.files import SmallWrites, flush_to_disk


class IndexedWriter:
    """Writes one pair under temporary names and publishes it when both files are complete.

    Use as a context manager: what was not published when it ends is deleted.

    Args:
        prefix: path of the pair without suffix; its directory must exist.
        entries: of the tokenizer; the type of a stored token follows from it.
        rows: largest token id plus 1, where that is not `entries`.
        shared: another process may write the same pair at the same time, and the last that publishes wins. Otherwise
            what a killed process left is overwritten.
    """

    def __init__(self, prefix: Path, entries: int, rows: int | None = None, shared: bool = False) -> None:
        self.prefix, self.dtype = prefix, token_dtype(entries, rows)
        self.tokens = 0
        self.counts = np.zeros(rows or entries, np.int64)
        """How often each token was written, int64 [rows]."""
        self._lengths = array("i")
        self._temporary = prefix.with_name(f".{prefix.name}.{uuid.uuid4().hex[:12] if shared else ''}.partial")
        self._file = io.BufferedWriter(SmallWrites(bin_path(self._temporary), "wb"), 1 << 16)

    def __enter__(self) -> IndexedWriter:
        return self

    def __exit__(self, *error: object) -> None:
        for path in (bin_path, idx_path):
            path(self._temporary).unlink(missing_ok=True)
        try:
            self._file.close()
        except OSError:  # what is left in its buffer may not fit on the disk, and is of no use
            self._file.raw.close()

    @property
    def documents(self) -> int:
        """Documents written."""
        return len(self._lengths)

    @property
    def largest_token(self) -> int | None:
        """The highest token id written; None where there is none."""
        return largest_token(self.counts)

    @property
    def unigram_entropy(self) -> float:
        """Nats per token of a reader who knows only how often each token occurs: the loss to fall below."""
        return unigram_entropy(self.counts)

    def add(self, tokens: list[int]) -> None:
        """Append one document, end mark included."""
        ids = np.asarray(tokens, np.int64)
        counts = np.bincount(ids, minlength=len(self.counts))
        self.write(ids.astype(self.dtype).tobytes(), [len(tokens)], counts)

    def write(self, content: bytes, lengths: list[int], counts: np.ndarray) -> None:
        """Append documents.

        Args:
            content: their tokens as they are stored.
            lengths: tokens of each document.
            counts: how often each token occurs in `content`, int64 [rows].

        Raises:
            DataError: a token beyond the vocabulary.
        """
        if len(counts) > len(self.counts):
            raise DataError(
                f"{self.prefix}: token {len(counts) - 1} is outside a vocabulary of {len(self.counts)}",
                "training would have no embedding for it",
                "the tokenizer's files do not fit together: fetch them again",
            )
        self._file.write(content)
        self._lengths.extend(lengths)
        self.counts += counts
        self.tokens += sum(lengths)

    def publish(self) -> None:
        """Write the index, flush both files to disk and give them their names; the `.idx` last."""
        self._file.close()
        write_index(idx_path(self._temporary), self.dtype, np.array(self._lengths, np.int32))
        for path in (bin_path, idx_path):
            flush_to_disk(path(self._temporary))
        idx_path(self.prefix).unlink(missing_ok=True)  # an old index must never stand beside new tokens
        bin_path(self._temporary).replace(bin_path(self.prefix))
        idx_path(self._temporary).replace(idx_path(self.prefix))


def write_indexed(prefix: Path, documents: Iterable[list[int]], vocabulary: int) -> IndexedWriter:
    """Write a whole pair at once; returns the finished writer with its counts."""
    with IndexedWriter(prefix, vocabulary) as writer:
        for document in documents:
            writer.add(document)
        writer.publish()
    return writer


def largest_token(counts: np.ndarray) -> int | None:
    """The highest token id that occurs at all, given how often each does."""
    found = np.flatnonzero(counts)
    return int(found[-1]) if len(found) else None


def unigram_entropy(counts: np.ndarray) -> float:
    """Nats per token of a reader who knows only how often each token occurs, given that."""
    total = int(counts.sum())
    return -math.fsum(int(count) / total * math.log(int(count) / total) for count in counts[counts > 0])
