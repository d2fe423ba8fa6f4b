"""Answers of a model, kept in a log that only grows: a question that has an answer there is never asked again."""

from __future__ import annotations

import io
import os
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from types import TracebackType
from typing import IO, Any

import numpy as np
import orjson

_OFFSET_BITS = 40  # of a place in a log; the bits before them are the log's number
_MERGED = 1 << 16  # new answers after which their places are packed


@dataclass(frozen=True)
class Answer:
    """What came of a question: one of `text`, `error`, `failure`.

    Args:
        text: what the model wrote.
        error: why there will be no text for this document: the server or the model refuses it.
        failure: why there was none this time; such a question is asked again if the shard is not finished.
        finish: why the model ended, in the server's words.
        tokens: of the prompt and of the answer, as the server counts.
    """

    text: str | None = None
    error: str | None = None
    failure: str | None = None
    finish: str | None = None
    tokens: tuple[int, int] = (0, 0)


class Log:
    """The answers about one shard, one a line; use as a context manager to add to it.

    A line counts when its end is there: what a killed process left of its last one is cut off.

    Args:
        path: file, made with its directory when opened.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._file: IO[bytes] | None = None

    def __enter__(self) -> Log:
        self._path.parent.mkdir(parents=True, exist_ok=True)
        self._file = self._path.open("a+b")
        self._file.truncate(_whole(self._file))
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Make the answers survive a power cut, and close."""
        if self._file is not None:
            os.fsync(self._file.fileno())
            self._file.close()
            self._file = None

    def add(self, key: str, document: str, answer: Answer) -> int:
        """Append an answer; when this returns it survives the end of this process. Returns its place in the file."""
        assert self._file is not None
        given = {name: value for name, value in asdict(answer).items() if value is not None}
        place = self._file.seek(0, os.SEEK_END)
        self._file.write(orjson.dumps({"key": key, "id": document, **given}) + b"\n")
        self._file.flush()
        return place

    def open(self) -> IO[bytes]:
        """The log to `read` from; empty where nothing was asked."""
        return self._path.open("rb") if self._path.exists() else io.BytesIO()

    def answered(self) -> set[str]:
        """Keys of the questions that need not be asked again."""
        return {line["key"] for _, line in self.lines() if "failure" not in line}

    def index(self) -> dict[str, int]:
        """Where the answer to each question stands; a failure only where nothing better followed."""
        found: dict[str, int] = {}
        failed: set[str] = set()
        for offset, line in self.lines():
            key = line["key"]
            if "failure" in line:
                failed.add(key)
                found.setdefault(key, offset)
            elif key not in found or key in failed:
                failed.discard(key)
                found[key] = offset
        return found

    def read(self, file: IO[bytes], offset: int) -> Answer:
        """The answer at a place of the log, which the caller has open."""
        return _answer(_line_at(file, offset))

    def lines(self) -> Iterator[tuple[int, dict[str, Any]]]:
        """All whole lines, each with its place in the file."""
        if not self._path.exists():
            return
        offset = 0
        with self._path.open("rb") as file:
            for line in file:
                if line.endswith(b"\n"):
                    yield offset, orjson.loads(line)
                offset += len(line)


class Answers:
    """Where the answer to each question of a step stands, over all its logs, whatever shards these are named after.

    Texts may stand in several shards, and a file that is renamed or grows is read as other shards: the question stays
    the same. Takes about 20 bytes of memory an answer.

    Args:
        logs: the logs' files.
    """

    def __init__(self, logs: Iterable[Path]) -> None:
        self._paths: list[Path] = []
        self._numbers: dict[Path, int] = {}
        self._keys, self._places = np.zeros(0, "<u8"), np.zeros(0, "<u8")
        self._new: dict[int, int] = {}
        for path in logs:
            for offset, line in Log(path).lines():
                if "failure" not in line:
                    self.add(line["key"], path, offset)

    def add(self, key: str, path: Path, offset: int) -> None:
        """Take in where an answer stands."""
        log = self._numbers.setdefault(path, len(self._paths))
        if log == len(self._paths):
            self._paths.append(path)
        self._new[_number(key)] = log << _OFFSET_BITS | offset
        if len(self._new) >= _MERGED:
            self._merge()

    def find(self, key: str) -> Answer | None:
        """The answer to a question; None where there is none yet."""
        number = _number(key)
        place = self._new.get(number)
        if place is None:
            row = int(np.searchsorted(self._keys, np.uint64(number)))
            if row == len(self._keys) or int(self._keys[row]) != number:
                return None
            place = int(self._places[row])
        with self._paths[place >> _OFFSET_BITS].open("rb") as file:
            line = _line_at(file, place & ((1 << _OFFSET_BITS) - 1))
        return _answer(line) if line["key"] == key else None  # another one's key begins like it

    def _merge(self) -> None:
        keys = np.concatenate([self._keys, np.fromiter(self._new.keys(), "<u8", len(self._new))])
        places = np.concatenate([self._places, np.fromiter(self._new.values(), "<u8", len(self._new))])
        order = np.argsort(keys, kind="stable")
        self._keys, self._places, self._new = keys[order], places[order], {}


def _number(key: str) -> int:
    return int(key[:16], 16)


def _line_at(file: IO[bytes], offset: int) -> dict[str, Any]:
    file.seek(offset)
    return orjson.loads(file.readline())


def _answer(line: dict[str, Any]) -> Answer:
    return Answer(line.get("text"), line.get("error"), line.get("failure"), line.get("finish"), tuple(line["tokens"]))


def _whole(file: IO[bytes]) -> int:
    """Bytes up to the end of the last whole line."""
    end = file.seek(0, os.SEEK_END)
    while end:
        begin = max(0, end - 65536)
        file.seek(begin)
        place = file.read(end - begin).rfind(b"\n")
        if place >= 0:
            return begin + place + 1
        end = begin
    return 0
