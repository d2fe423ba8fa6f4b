"""Files of one JSON object a line, read with the line number of whatever is wrong."""

from __future__ import annotations

import gzip
import json
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from dataclasses import field as default
from pathlib import Path
from typing import IO, Any

from megatron_octo.config.data import InputFile, expand_path, variables_of
from megatron_octo.data.render import BadRecord
from megatron_octo.errors import DataError

_LINES_NAMED = 20


@dataclass
class BadLines:
    """What to do with lines that cannot be used: end the build, or count them.

    Args:
        path: the file, for messages.
        skip: leave bad lines out instead of stopping.
    """

    path: Path
    skip: bool = False
    count: int = 0
    first: list[str] = default(default_factory=list)

    def add(self, line: int, reason: str) -> None:
        """Note one bad line.

        Raises:
            DataError: bad lines are not to be skipped.
        """
        if not self.skip:
            raise DataError(
                f"{self.path}, line {line}: {reason}",
                "every line must be a JSON object with the fields of its template",
                "mend the line, or set on_bad_line: skip",
            )
        self.count += 1
        if len(self.first) < _LINES_NAMED:
            self.first.append(f"line {line}: {reason}")


def input_path(file: InputFile, where: str) -> Path:
    """The path of an input file, which must be there.

    Args:
        file: its configuration.
        where: the field that names it, for the message.

    Raises:
        DataError: there is no such file; the message says what to download and where to put it.
        ConfigError: the path names an environment variable that is not set.
    """
    path = expand_path(file.path, f"{where}.path")
    if path.is_file():
        return path
    what = f"{where}: {path} {'is a directory' if path.is_dir() else 'does not exist'}"
    fix = f"put the file at {path}"
    names = variables_of(file.path)
    if names:
        fix += f", or set {names[0]} to where it is ({file.path})"
    raise DataError(what, file.hint, fix)


def records(path: Path, bad: BadLines) -> Iterator[tuple[int, dict[str, Any]]]:
    """Read the objects of a file, one line after the other.

    Args:
        path: plain, or compressed where the name ends in `.gz`.
        bad: what to do with broken lines.

    Yields:
        Line number, from 1, and the object.

    Raises:
        DataError: a broken line under the strict rule, or a compressed file that ends early.
    """
    try:
        with _open(path) as file:
            for number, line in enumerate(file, start=1):
                try:
                    yield number, _parse(line)
                except BadRecord as problem:
                    bad.add(number, str(problem))
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(f"{path} cannot be read to its end ({error})", fix="fetch the file again") from None


def _open(path: Path) -> IO[bytes]:
    return gzip.open(path, "rb") if path.suffix == ".gz" else path.open("rb")


def _parse(line: bytes) -> dict[str, Any]:
    if not line.strip():
        raise BadRecord("the line is empty")
    if b"\0" in line:
        raise BadRecord("it holds a NUL byte")
    try:
        record = json.loads(line.decode("utf-8"))
    except UnicodeDecodeError as error:
        raise BadRecord(f"not UTF-8 at byte {error.start + 1} of the line") from None
    except (ValueError, RecursionError) as error:
        raise BadRecord(f"not JSON ({error})") from None
    if not isinstance(record, dict):
        raise BadRecord(f"a JSON {type(record).__name__} and not an object")
    return record
