"""Answers of a model, kept in a log that only grows: a question that has an answer there is never asked again."""

from __future__ import annotations

import io
import os
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from types import TracebackType
from typing import IO, Any

import orjson


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

    def add(self, key: str, document: str, answer: Answer) -> None:
        """Append an answer; when this returns it survives the end of this process."""
        assert self._file is not None
        given = {name: value for name, value in asdict(answer).items() if value is not None}
        self._file.write(orjson.dumps({"key": key, "id": document, **given}) + b"\n")
        self._file.flush()

    def open(self) -> IO[bytes]:
        """The log to `read` from; empty where nothing was asked."""
        return self._path.open("rb") if self._path.exists() else io.BytesIO()

    def answered(self) -> set[str]:
        """Keys of the questions that need not be asked again."""
        return {line["key"] for _, line in self._lines() if "failure" not in line}

    def index(self) -> dict[str, int]:
        """Where the answer to each question stands; a failure only where nothing better followed."""
        found: dict[str, int] = {}
        failed: set[str] = set()
        for offset, line in self._lines():
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
        file.seek(offset)
        line = orjson.loads(file.readline())
        return Answer(
            line.get("text"), line.get("error"), line.get("failure"), line.get("finish"), tuple(line["tokens"])
        )

    def _lines(self) -> Iterator[tuple[int, dict[str, Any]]]:
        if not self._path.exists():
            return
        offset = 0
        with self._path.open("rb") as file:
            for line in file:
                if line.endswith(b"\n"):
                    yield offset, orjson.loads(line)
                offset += len(line)


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
