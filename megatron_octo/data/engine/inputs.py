"""Input files: what they hash to, and whether they stay what they are while a build reads them."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from megatron_octo.data.corpora import shard
from megatron_octo.data.corpora.lines import open_input
from megatron_octo.data.engine.stage import Stage, advance
from megatron_octo.errors import DataError

_CHUNK = 1 << 20
_STATE = ("mtime", "ETag", "LastModified", "etag", "last_modified", "created")


@dataclass(frozen=True)
class InputFile:
    """A file as a look at it finds it: enough to tell that it was written to, without reading it.

    Args:
        path: expanded path, or a URL of fsspec.
        bytes: its size.
        modified: time of its last change or a tag of its content, whatever its file system has.
    """

    path: str
    bytes: int
    modified: str


class Version(NamedTuple):
    """What a task that reads a file follows from: its content, and how it looked when that was hashed.

    A file that was another one while it was read may be mended to the content that was hashed. It then looks otherwise,
    so that what was made meanwhile counts for nothing.
    """

    sha256: str
    bytes: int
    modified: str


def versions(files: Iterable[InputFile], hashes: Mapping[str, str]) -> dict[str, Version]:
    """The versions of those files that are hashed, by path."""
    return {file.path: Version(hashes[file.path], file.bytes, file.modified) for file in files if file.path in hashes}


def look_at(path: str) -> InputFile:
    """How a file is now.

    Raises:
        DataError: it is not there, or cannot be reached.
    """
    try:
        if "://" not in path:
            found = Path(path).stat()
            return InputFile(path, found.st_size, str(found.st_mtime_ns))
        import fsspec

        files, name = fsspec.core.url_to_fs(path)
        facts = files.info(name)
        return InputFile(path, int(facts["size"]), str(next((facts[key] for key in _STATE if facts.get(key)), "")))
    except (OSError, ImportError, ValueError, KeyError) as error:
        raise DataError(f"{path} cannot be read ({error})", "the build reads it", "put it there") from None


def inputs_stage(files: Iterable[InputFile]) -> Stage:
    """The stage that hashes input files; one that looks as it did is not read again."""
    tasks = sorted(set(files), key=lambda file: file.path)
    made_from = {"format": 2, "part": shard.PART}
    return Stage("inputs", tasks, hash_input, made_from, [file.bytes for file in tasks], "bytes")


def lines_of(stage: Stage, facts: Sequence[Mapping[str, Any]]) -> dict[str, list[int]]:
    """Lines before the parts of files, by path, out of what the stage found; see `shard.numbered`."""
    return {file.path: found["lines"] for file, found in zip(stage.tasks, facts, strict=True) if "lines" in found}


def hash_input(file: InputFile) -> dict[str, Any]:
    """Read a file to its end, the only time that all of it is read by one process.

    Returns:
        `bytes` and `sha256`; of a file whose parts are told by bytes also `lines`, those that begin before each part.

    Raises:
        DataError: it cannot be read, or is being written to.
    """
    digest, count = hashlib.sha256(), _LineCount(shard.line_cuts(file.path, file.bytes))
    try:
        with open_input(file.path) as stream:
            while chunk := stream.read(_CHUNK):
                digest.update(chunk)
                count.update(chunk)
                advance(len(chunk))
    except OSError as error:
        raise DataError(f"{file.path} cannot be read ({error})", fix="make it readable") from None
    refuse_change(file)
    found = {"bytes": file.bytes, "sha256": digest.hexdigest()}
    return {**found, "lines": count.found} if count.found else found


class _LineCount:
    """Counts, while a file goes by, the lines that begin before each of some places."""

    def __init__(self, cuts: Sequence[int]) -> None:
        self._cuts, self._place, self._lines = list(cuts), 0, 1  # one begins at the start
        self.found: list[int] = []

    def update(self, chunk: bytes) -> None:
        """Take the next bytes of the file."""
        start = 0
        while len(self.found) < len(self._cuts):
            end = max(0, self._cuts[len(self.found)] - 1) - self._place  # what ends there begins a line at the cut
            if end > len(chunk):
                break
            self._lines += chunk.count(b"\n", start, end)
            start = end
            self.found.append(self._lines if self._cuts[len(self.found)] else 0)
        if len(self.found) < len(self._cuts):
            self._lines += chunk.count(b"\n", start)
        self._place += len(chunk)


def refuse_change(file: InputFile) -> None:
    """Check that a file is as it was.

    Raises:
        DataError: it was written to.
    """
    if look_at(file.path) != file:
        raise DataError(
            f"{file.path} changed while the build read it",
            "half of the result would be of the old file and half of the new one",
            "start the same command again when it is complete; what does not depend on it is kept",
        )
