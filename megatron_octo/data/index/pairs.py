"""Megatron's indexed datasets: a pair of files, tokens in `.bin` and where each document lies in `.idx`.

The bytes are those of Megatron-LM's own tool; neither writing nor reading needs torch or megatron. Reading checks what
megatron's reader does not: that the two files belong together.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from megatron_octo.errors import DataError

_MAGIC = b"MMIDIDX\x00\x00"
_HEADER = struct.Struct("<9sQBQQ")  # magic, version, dtype code, sequences, document marks
_DTYPES = {1: np.uint8, 2: np.int8, 3: np.int16, 4: np.int32, 5: np.int64, 8: np.uint16}
_SMALL_VOCABULARY = 65_500  # Megatron-LM's border between two and four bytes a token
_STRETCH = 1 << 20  # documents, or tokens, looked at in one go


@dataclass(frozen=True)
class Index:
    """What an `.idx` file says, after it was checked against its `.bin`.

    Args:
        prefix: path of the pair without suffix.
        dtype: type of one stored token.
        lengths: tokens of each document, int32 [documents], mapped and not read.
        pointers: byte offset of each document in the `.bin`, int64 [documents], mapped and not read.
        tokens: tokens of all documents, their end marks included.
    """

    prefix: Path
    dtype: np.dtype[Any]
    lengths: np.ndarray
    pointers: np.ndarray
    tokens: int

    @property
    def documents(self) -> int:
        """Number of documents."""
        return len(self.lengths)

    def all_tokens(self) -> np.ndarray:
        """Every stored token in file order, [tokens], mapped and not read."""
        if not self.tokens:
            return np.empty(0, self.dtype)
        return np.memmap(bin_path(self.prefix), dtype=self.dtype, mode="r")

    def document(self, number: int) -> np.ndarray:
        """Tokens of one document, [length]."""
        first = int(self.pointers[number]) // self.dtype.itemsize
        return self.all_tokens()[first : first + int(self.lengths[number])]


def bin_path(prefix: Path) -> Path:
    """The token file of a pair."""
    return Path(f"{prefix}.bin")


def idx_path(prefix: Path) -> Path:
    """The index file of a pair."""
    return Path(f"{prefix}.idx")


def token_dtype(entries: int, rows: int | None = None) -> np.dtype[Any]:
    """Type of a stored token.

    Args:
        entries: of the tokenizer: uint16 below 65,500, else int32, as in Megatron-LM.
        rows: largest token id plus 1; where ids have gaps the type is wide enough for them.
    """
    small = entries < _SMALL_VOCABULARY and (rows or 0) <= 1 << 16
    return np.dtype(np.uint16 if small else np.int32)


def stretches(array: np.ndarray) -> Iterator[np.ndarray]:
    """A long array piece by piece, so that work on it takes the same memory however long it is."""
    for first in range(0, len(array), _STRETCH):
        yield array[first : first + _STRETCH]


def write_index(path: Path, dtype: np.dtype[Any], lengths: np.ndarray) -> None:
    """Write an `.idx` file for documents that lie one behind the other, each of one sequence.

    Args:
        path: of the file.
        dtype: type of one stored token.
        lengths: tokens of each document, int32 [documents].
    """
    code = next(code for code, known in _DTYPES.items() if known == dtype)
    with path.open("wb") as file:
        file.write(_HEADER.pack(_MAGIC, 1, code, len(lengths), len(lengths) + 1))
        for part in stretches(lengths):
            file.write(part.astype("<i4", copy=False).tobytes())
        start = 0
        for part in stretches(lengths):
            ends = start + np.cumsum(part, dtype=np.int64) * dtype.itemsize
            file.write((ends - part.astype(np.int64) * dtype.itemsize).astype("<i8", copy=False).tobytes())
            start = int(ends[-1])
        for first in range(0, len(lengths) + 1, _STRETCH):
            file.write(np.arange(first, min(first + _STRETCH, len(lengths) + 1), dtype="<i8").tobytes())


def read_index(prefix: Path, checked: bool = False) -> Index:
    """Open an index and check it against its token file.

    Args:
        prefix: path of the pair without suffix.
        checked: whether another process has checked the pair just now; its documents are then not looked at.

    Returns:
        The index; takes the same memory for any number of documents.

    Raises:
        DataError: a file is missing, the index is empty, truncated or not an index, or the pair does not fit together.
    """
    check_present(prefix)
    path = idx_path(prefix)
    with path.open("rb") as file:
        header, size = file.read(_HEADER.size), path.stat().st_size
    if len(header) < _HEADER.size:
        raise damaged(path, f"{size} bytes are too few for an index")
    magic, version, code, count, marks = _HEADER.unpack(header)
    if magic != _MAGIC:
        raise damaged(path, "it does not start with the mark of a Megatron index")
    if version != 1 or code not in _DTYPES:
        raise damaged(path, f"version {version} with token type {code} is unknown")
    expected = _HEADER.size + count * (4 + 8) + marks * 8
    if size != expected:
        raise damaged(path, f"{size} bytes, but its {count} documents need {expected}")
    raw = np.memmap(path, np.uint8, mode="r")
    lengths, pointers, ends = (
        np.frombuffer(raw, kind, length, offset)
        for kind, length, offset in (
            (np.int32, count, _HEADER.size),
            (np.int64, count, _HEADER.size + 4 * count),
            (np.int64, marks, _HEADER.size + 12 * count),
        )
    )
    dtype = np.dtype(_DTYPES[code])
    stored = bin_path(prefix).stat().st_size
    tokens = stored // dtype.itemsize if checked else _check_documents(path, lengths, pointers, ends, dtype.itemsize)
    needed = tokens * dtype.itemsize
    if stored != needed:
        raise damaged(bin_path(prefix), f"{stored} bytes, but {path.name} counts {tokens} tokens in {needed} bytes")
    return Index(prefix, dtype, lengths, pointers, tokens)


def check_present(prefix: Path) -> None:
    """Check that both files of a pair are there.

    Raises:
        DataError: one is not; the message says how to name the pair.
    """
    for path in (bin_path(prefix), idx_path(prefix)):
        if not path.is_file():
            named = prefix.suffix in (".bin", ".idx")
            raise DataError(
                f"{path} {'is not a file' if path.exists() else 'does not exist'}",
                "an indexed dataset is a pair .bin and .idx",
                f"name it without suffix: {prefix.with_suffix('')}" if named else _where_to_look(prefix),
            )


def _check_documents(path: Path, lengths: np.ndarray, pointers: np.ndarray, ends: np.ndarray, size: int) -> int:
    """Documents lie one behind the other and are marked one by one; returns the tokens of all."""
    start = place = 0
    for part, places in zip(stretches(lengths), stretches(pointers), strict=True):
        if int(part.min()) < 0:
            raise damaged(path, "it holds a negative document length")
        behind = start + np.cumsum(part, dtype=np.int64)
        if not np.array_equal(places, (behind - part) * size):
            raise damaged(path, "its document positions do not follow from its document lengths")
        start = int(behind[-1])
    if len(ends) != len(lengths) + 1:
        raise damaged(path, f"{len(ends)} document marks for {len(lengths)} documents")
    for part in stretches(ends):
        if not np.array_equal(part, np.arange(place, place + len(part))):
            raise damaged(path, "its document marks do not run from 0 to the number of documents")
        place += len(part)
    return start


def damaged(path: Path, reason: str) -> DataError:
    """The error for a file that is not as it was written."""
    return DataError(f"{path} is damaged: {reason}", "it must be exactly what was written", "build it again")


def _where_to_look(prefix: Path) -> str:
    start = "" if prefix.is_absolute() else f"; a relative path starts from here, {Path.cwd()}"
    return f"build it with `octo data build`, or mend the path{start}"
