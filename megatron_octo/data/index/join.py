"""Pieces of a corpus -> one indexed pair, its table of documents and its histogram of tokens."""

from __future__ import annotations

import hashlib
import io
import tempfile
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from blake3 import blake3

from megatron_octo.data.index.digest import spot_digest
from megatron_octo.data.index.pairs import Index, bin_path, damaged, idx_path, read_index, stretches, write_index
from megatron_octo.data.index.table import (
    DocumentTable,
    docs_path,
    join_tables,
    pair_files,
    read_histogram,
    save_histogram,
)
from megatron_octo.data.index.writer import largest_token, unigram_entropy
from megatron_octo.errors import DataError
from megatron_octo.files import SmallWrites, flush_to_disk, hash_file, replacing

_COPIED = 1 << 20  # bytes in one go


@dataclass(frozen=True)
class _Part:
    """A piece and how many of its first documents are taken."""

    index: Index
    documents: int
    tokens: int


def join_pieces(
    pieces: Sequence[Path], prefix: Path, budget: int | None = None, hashes: Sequence[str] | None = None
) -> dict[str, Any]:
    """Write the pieces of a corpus one behind the other; takes the same memory for any number of documents.

    Args:
        pieces: their prefixes, in the order of the shards.
        prefix: path of the pair to write; its directory must exist.
        budget: cut after the document that reaches so many tokens; None for all of them.
        hashes: BLAKE3 of each piece's token file, as `write_piece` returned it; what differs is refused.

    Returns:
        documents, tokens, largest_token, unigram_entropy, dtype, bytes, `spot`: `spot_digest` of the index, `sha256`
        of each file by its name, and `beyond_budget`: documents and tokens of the pieces that were not needed.

    Raises:
        DataError: a piece is missing or damaged, the pieces differ in the type of their tokens, they hold no document,
            or fewer tokens than the budget.
    """
    parts = _within([read_index(piece) for piece in pieces], budget, prefix)
    tables = [(DocumentTable(docs_path(part.index.prefix)), part.documents) for part in parts]
    counts = _counts(parts)
    with ExitStack() as stack:  # the last of these is renamed first
        index, tokens, table, histogram = (stack.enter_context(replacing(path)) for path in pair_files(prefix))
        sha256 = _copy_tokens(tokens, parts, list(hashes or [""] * len(pieces)))
        _write_index(index, parts)
        join_tables(table, tables)
        save_histogram(histogram, counts)
        idx_path(prefix).unlink(missing_ok=True)  # an old index must never stand beside new tokens
    return {
        "documents": sum(part.documents for part in parts),
        "tokens": sum(part.tokens for part in parts),
        "largest_token": largest_token(counts),
        "unigram_entropy": unigram_entropy(counts),
        "dtype": parts[0].index.dtype.name,
        "bytes": sum(path.stat().st_size for path in pair_files(prefix)),
        "spot": spot_digest(idx_path(prefix)),
        "sha256": {path.name: sha256 if path == bin_path(prefix) else hash_file(path) for path in pair_files(prefix)},
        "beyond_budget": {
            "documents": sum(part.index.documents - part.documents for part in parts),
            "tokens": sum(part.index.tokens - part.tokens for part in parts),
        },
    }


def _within(indices: list[Index], budget: int | None, prefix: Path) -> list[_Part]:
    """How much of each piece the budget takes; the document that reaches it is kept whole."""
    parts, left = [], budget
    for index in indices:
        if index.dtype != indices[0].dtype:
            raise DataError(f"{index.prefix} stores tokens as another type than {indices[0].prefix}", fix="build again")
        if left is None or left > index.tokens:
            parts.append(_Part(index, index.documents, index.tokens))
        else:
            parts.append(_Part(index, *_first_documents(index, left)))
        left = None if left is None else left - parts[-1].tokens
    if not any(part.documents for part in parts):
        raise DataError(
            f"corpora.{prefix.name} holds no documents", fix="check its files, and what was removed from them"
        )
    if left is not None and left > 0:
        has = sum(part.tokens for part in parts)
        raise DataError(
            f"corpora.{prefix.name}.tokens = {budget}, but its files have only {has}",
            "a token budget is a promise to the mixture",
            f"set corpora.{prefix.name}.tokens to all or to at most {has}",
        )
    return parts


def _first_documents(index: Index, tokens: int) -> tuple[int, int]:
    """Documents that reach a number of tokens, which the piece holds, and the tokens they have."""
    documents = reached = 0
    for lengths in stretches(index.lengths):
        ends = reached + np.cumsum(lengths, dtype=np.int64)
        if tokens > 0 and ends[-1] >= tokens:
            last = int(np.searchsorted(ends, tokens))
            return documents + last + 1, int(ends[last])
        if tokens <= 0:
            break
        documents, reached = documents + len(lengths), int(ends[-1])
    return documents, reached


def _counts(parts: list[_Part]) -> np.ndarray:
    """How often each token occurs in what is taken of the pieces, int64 [rows]."""
    total: Any = 0
    for part in parts:
        counts = read_histogram(part.index.prefix)
        if part.tokens < part.index.tokens:
            rows, counts = len(counts), np.zeros_like(counts)
            for tokens in stretches(part.index.all_tokens()[: part.tokens]):
                counts += np.bincount(tokens, minlength=rows)
        total = total + counts
    return total


def _copy_tokens(path: Path, parts: list[_Part], hashes: list[str]) -> str:
    """Copy the token files, each checked against its hash where one is given; returns the SHA-256 of the result."""
    whole = hashlib.sha256()
    with io.BufferedWriter(SmallWrites(path, "wb"), 1 << 16) as file:
        for part, expected in zip(parts, hashes, strict=True):
            source, own = bin_path(part.index.prefix), blake3()
            left = part.tokens * part.index.dtype.itemsize
            with source.open("rb") as read:
                while content := read.read(_COPIED):
                    own.update(content)
                    file.write(content[:left])
                    whole.update(content[:left])
                    left = max(0, left - len(content))
                    if not left and not expected:
                        break
            if expected and own.hexdigest() != expected:
                raise damaged(source, "its hash is not the one it was written with")
    flush_to_disk(path)
    return whole.hexdigest()


def _write_index(path: Path, parts: list[_Part]) -> None:
    """The index of the joined pair; lengths of all documents pass through a file, for they may fill the memory."""
    dtype, documents = parts[0].index.dtype, sum(part.documents for part in parts)
    with tempfile.TemporaryFile(dir=path.parent) as file:
        for part in parts:
            for lengths in stretches(part.index.lengths[: part.documents]):
                file.write(lengths.tobytes())
        file.flush()
        write_index(path, dtype, np.memmap(file, np.int32, "r", shape=(documents,)))
    flush_to_disk(path)
