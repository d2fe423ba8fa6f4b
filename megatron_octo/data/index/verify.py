"""Whether an indexed pair is what was written: every token is read, and what is wrong is named."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from megatron_octo.data.index.pairs import Index, bin_path, damaged, idx_path, read_index, stretches
from megatron_octo.data.index.table import DocumentTable, docs_path, histogram_path, read_histogram
from megatron_octo.errors import DataError
from megatron_octo.files import hash_file


def verify_pair(
    prefix: Path, rows: int | None = None, end: int | None = None, facts: Mapping[str, Any] | None = None
) -> tuple[Index, np.ndarray]:
    """Check everything about a pair that is known.

    Takes the same memory for any number of documents.

    Args:
        prefix: path of the pair without suffix.
        rows: largest token id of its tokenizer plus 1; None where that is not known.
        end: token that every document ends with; None where there is no such rule.
        facts: what the manifest says of it; None where there is none.

    Returns:
        The index, and how often each token occurs, int64 [rows].

    Raises:
        DataError: a file is missing, truncated or altered; a token is outside the vocabulary; a document does not end
            with the end mark; or the files of the pair do not belong together.
    """
    index = read_index(prefix)
    counts = _count(index, rows)
    if end is not None:
        _check_ends(index, end)
    if facts is not None:
        check_hashes(prefix.parent, facts["sha256"])
    if docs_path(prefix).exists():
        _check_table(index)
    if histogram_path(prefix).exists():
        _check_histogram(index, counts)
    return index, counts


def check_hashes(folder: Path, hashes: Mapping[str, str]) -> None:
    """Check files against the SHA-256 a manifest lists, by name.

    Raises:
        DataError: one is missing or was altered.
    """
    for name, expected in hashes.items():
        path = folder / name
        if not path.is_file():
            raise DataError(f"{path} does not exist", "the manifest lists it", "build the data again")
        if hash_file(path) != expected:
            raise DataError(
                f"{path} was altered after it was written", "its hash is not the manifest's", "build the data again"
            )


def _count(index: Index, rows: int | None) -> np.ndarray:
    counts, first = np.zeros(rows or 1, np.int64), 0
    for tokens in stretches(index.all_tokens()):
        lowest, highest = int(tokens.min()), int(tokens.max())
        if lowest < 0 or (rows is not None and highest >= rows):
            bad = (tokens < 0) | (tokens >= rows) if rows is not None else tokens < 0
            place = first + int(np.flatnonzero(bad)[0])
            limit = f"the tokenizer has {rows} rows" if rows is not None else "no token is negative"
            raise _at(index, place, f"token {tokens[place - first]}, but {limit}")
        found = np.bincount(tokens, minlength=len(counts))
        found[: len(counts)] += counts
        counts, first = found, first + len(tokens)
    return counts


def _check_ends(index: Index, end: int) -> None:
    stored, start = index.all_tokens(), 0
    for lengths in stretches(index.lengths):
        ends = start + np.cumsum(lengths, dtype=np.int64)
        wrong = np.flatnonzero((lengths == 0) | (stored[np.maximum(ends - 1, 0)] != end))
        if len(wrong):
            raise _at(index, int(ends[wrong[0]]) - 1, f"the document does not end with the end mark, token {end}")
        start = int(ends[-1])


def _check_table(index: Index) -> None:
    table = DocumentTable(docs_path(index.prefix))
    if table.documents != index.documents:
        name = idx_path(index.prefix).name
        raise damaged(docs_path(index.prefix), f"{table.documents} documents, but {name} has {index.documents}")


def _check_histogram(index: Index, counts: np.ndarray) -> None:
    kept, path = read_histogram(index.prefix), bin_path(index.prefix)
    size = max(len(kept), len(counts))
    different = np.flatnonzero(np.pad(kept, (0, size - len(kept))) != np.pad(counts, (0, size - len(counts))))
    if len(different):
        token = int(different[0])
        now, then = (int(each[token]) if token < len(each) else 0 for each in (counts, kept))
        raise damaged(path, f"token {token} occurs {now} times, and did {then} times when it was written")


def _at(index: Index, place: int, reason: str) -> DataError:
    """Damage at one token, with the document that holds it."""
    number = int(np.searchsorted(index.pointers, max(place, 0) * index.dtype.itemsize, side="right")) - 1
    name = f"document {number}"
    if docs_path(index.prefix).is_file():
        name += f" ({DocumentTable(docs_path(index.prefix)).id_of(number)})"
    return damaged(bin_path(index.prefix), f"{name}: {reason}")
