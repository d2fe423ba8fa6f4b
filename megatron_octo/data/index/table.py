"""Which document is which: from a document's id to its place in an indexed pair, and back.

Ids read `<corpus>/<file>:<line>`. A table keeps each file's name once and four bytes a document, so one of 10^8
documents is found in a file of 400 MB of which little is read.
"""

from __future__ import annotations

import json
import os
import struct
from array import array
from bisect import bisect_right
from itertools import accumulate
from pathlib import Path

import numpy as np

from megatron_octo.data.index.pairs import bin_path, damaged, idx_path, stretches
from megatron_octo.errors import DataError

_MAGIC = b"OCTODOCS"
_HEADER = struct.Struct("<8sII")  # magic, version, bytes of the list of files that follows
_VERSION = 1


def docs_path(prefix: Path) -> Path:
    """The table of a pair's documents."""
    return Path(f"{prefix}.docs")


def histogram_path(prefix: Path) -> Path:
    """How often each token occurs in a pair: a NumPy array, int64 [rows]."""
    return Path(f"{prefix}.counts.npy")


def pair_files(prefix: Path) -> list[Path]:
    """Every file of a pair of the build, the index first."""
    return [idx_path(prefix), bin_path(prefix), docs_path(prefix), histogram_path(prefix)]


def save_histogram(path: Path, counts: np.ndarray) -> None:
    """Write a histogram under any name and flush it to disk."""
    with path.open("wb") as file:
        np.save(file, counts)
        file.flush()
        os.fsync(file.fileno())


def read_histogram(prefix: Path) -> np.ndarray:
    """How often each token occurs in a pair, int64 [rows].

    Raises:
        DataError: the histogram is missing or damaged.
    """
    path = histogram_path(prefix)
    try:
        counts = np.load(path, allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        raise damaged(path, f"no histogram of tokens ({error})") from None
    if not isinstance(counts, np.ndarray) or counts.dtype != np.int64 or counts.ndim != 1:
        raise damaged(path, "no histogram of tokens")
    return counts


class TableWriter:
    """Collects ids in the order of the pair; four bytes each."""

    def __init__(self) -> None:
        self._files: list[tuple[str, int]] = []
        self._lines = array("I")

    def add(self, name: str) -> None:
        """Append the next document.

        Raises:
            DataError: the id does not end in a line number.
        """
        file, _, line = name.rpartition(":")
        if not file or not line.isdecimal() or int(line) >> 32:
            raise DataError(f"document id {name!r}", "an id is the file's name, a colon and the line or row")
        _append(self._files, file, 1)
        self._lines.append(int(line))

    def write(self, path: Path) -> None:
        """Write the table and flush it to disk."""
        with path.open("wb") as file:
            file.write(_head(self._files))
            self._lines.tofile(file)
            file.flush()
            os.fsync(file.fileno())


class DocumentTable:
    """The documents of one pair, by place and by id.

    Args:
        path: the table.

    Raises:
        DataError: it is missing or damaged.
    """

    def __init__(self, path: Path) -> None:
        try:
            size = path.stat().st_size
            with path.open("rb") as file:
                head = file.read(_HEADER.size)
                magic, version, length = _HEADER.unpack(head)
                listed = file.read(length)
        except OSError as error:
            raise DataError(f"{path}: {(error.strerror or 'cannot be read').lower()}", fix="build it again") from None
        except struct.error:
            raise damaged(path, "too few bytes for a table of documents") from None
        if magic != _MAGIC or version != _VERSION:
            raise damaged(path, "it does not start with the mark of a table of documents")
        try:
            self.files = [(str(name), int(count)) for name, count in json.loads(listed)]
        except (ValueError, TypeError):
            raise damaged(path, "its list of files cannot be read") from None
        self._ends = list(accumulate(count for _, count in self.files))
        self.documents = self._ends[-1] if self._ends else 0
        start = _HEADER.size + length
        if size != start + 4 * self.documents:
            raise damaged(path, f"{size} bytes, but its {self.documents} documents need {start + 4 * self.documents}")
        self.lines = np.memmap(path, np.uint32, "r", start, (self.documents,)) if self.documents else np.empty(0, "u4")
        """Line or row of each document in its file, uint32 [documents], mapped and not read."""

    def id_of(self, place: int) -> str:
        """The id of the document at a place of the pair.

        Raises:
            IndexError: there is no such place.
        """
        if not 0 <= place < self.documents:
            raise IndexError(f"document {place} of {self.documents}")
        return f"{self.files[bisect_right(self._ends, place)][0]}:{self.lines[place]}"

    def find(self, name: str) -> int | None:
        """The place of a document in the pair; None where the pair does not hold it."""
        file, _, line = name.rpartition(":")
        if not line.isdecimal() or int(line) >> 32:
            return None
        wanted = np.uint32(int(line))
        for (listed, count), end in zip(self.files, self._ends, strict=True):
            if listed == file:
                lines = self.lines[end - count : end]
                place = int(np.searchsorted(lines, wanted))
                if place == count or lines[place] != wanted:  # a shuffled corpus is not in the order of its lines
                    places = np.flatnonzero(lines == wanted)
                    place = int(places[0]) if len(places) else count
                if place < count:
                    return end - count + place
        return None


def join_tables(path: Path, parts: list[tuple[DocumentTable, int]]) -> None:
    """Write one table of several, in order, and flush it to disk.

    Args:
        path: of the table to write.
        parts: tables, each with the number of documents to take from its start.
    """
    files: list[tuple[str, int]] = []
    for table, left in parts:
        for name, count in table.files:
            if taken := min(count, left):
                _append(files, name, taken)
            left -= taken
    with path.open("wb") as file:
        file.write(_head(files))
        for table, documents in parts:
            for lines in stretches(table.lines[:documents]):
                file.write(lines.tobytes())
        file.flush()
        os.fsync(file.fileno())


def _append(files: list[tuple[str, int]], name: str, documents: int) -> None:
    if files and files[-1][0] == name:
        files[-1] = (name, files[-1][1] + documents)
    else:
        files.append((name, documents))


def _head(files: list[tuple[str, int]]) -> bytes:
    listed = json.dumps(files, ensure_ascii=False).encode()
    listed += b" " * (-(_HEADER.size + len(listed)) % 4)
    return _HEADER.pack(_MAGIC, _VERSION, len(listed)) + listed
