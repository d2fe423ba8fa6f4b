"""Input files: what they hash to, and whether they stay what they are while a build reads them."""

from __future__ import annotations

import hashlib
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from megatron_octo.data.corpora import shard
from megatron_octo.data.corpora.lines import open_input
from megatron_octo.data.corpora.shard import Shard
from megatron_octo.data.engine.stage import Stage, advance
from megatron_octo.errors import DataError

_CHUNK = 1 << 20
_SAID = 300  # characters of a foreign error
_SHOWN = 3
_AFAR = "start the same command again when the server answers, or name a copy on this machine"
_AGAIN = "start the same command again when it is complete; what does not depend on it is kept"
_STATE = ("mtime", "ETag", "LastModified", "Last-Modified", "etag", "last_modified", "created")


@dataclass(frozen=True)
class InputFile:
    """A file as a look at it finds it: enough to tell that it was written to, without reading it.

    Args:
        path: expanded path, or a URL of fsspec.
        bytes: its size.
        modified: time of its last change or a tag of its content, whatever its file system has; empty where it has
            none, and then a change is noticed by the size alone.
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


def look_at(path: str, anew: bool = False) -> InputFile:
    """How a file is now.

    Args:
        path: of the file, or its URL.
        anew: ask the server, and not the listing of its directory that this process may have kept.

    Raises:
        DataError: it is not there, or cannot be reached.
    """
    if "://" in path:
        return _look_afar(path, anew)
    try:
        found = Path(path).stat()
    except (OSError, ValueError) as error:
        raise DataError(f"{path} cannot be read ({error})", "the build reads it", "put it there") from None
    return InputFile(path, found.st_size, str(found.st_mtime_ns))


def look_at_shards(shards: Iterable[Shard]) -> dict[str, InputFile]:
    """How the files of shards are, by path: those that are in parts as they were when they were cut.

    Raises:
        DataError: as `look_at`, or a file was written to since it was cut, so that its parts may not be all of it.
    """
    cut: dict[tuple[str, str], list[Any]] = {}
    for one in shards:
        cut.setdefault((one.corpus, one.path), []).append((one.part, one.first))
    looked = {path: look_at(path) for path in dict.fromkeys(path for _, path in cut)}
    for (_, path), parts in cut.items():
        if parts[0][0] is not None and parts != list(shard.parts_of(path)):
            raise _changed(path)
    return looked


def _is_pinned(url: str) -> bool:
    """Whether a URL names a commit; a bucket of the hub has none."""
    return url.startswith("hf://") and not url.startswith("hf://buckets/")


def _look_afar(url: str, anew: bool) -> InputFile:
    import fsspec

    try:
        files, name = fsspec.core.url_to_fs(url)
        if anew and not _is_pinned(url):
            files.invalidate_cache(name.rpartition("/")[0])
        facts = files.info(name)
    except Exception as error:  # each file system has errors of its own
        reason = " ".join(f"{type(error).__name__}: {error}".split())[:_SAID]
        raise DataError(f"{url} cannot be reached ({reason})", "the build reads it", _AFAR) from None
    if facts.get("size") is None:
        raise DataError(f"{url}: its server does not tell its size", "a file cut short would not be noticed", _AFAR)
    return InputFile(url, int(facts["size"]), str(next((facts[key] for key in _STATE if facts.get(key)), "")))


def tell_remote(files: Mapping[str, Iterable[InputFile]], times: int) -> None:
    """Say on stderr which files come over a network every time they are read, and which of them may change unnoticed.

    Args:
        files: of each corpus, by the field that names it.
        times: how often each is read, at most.
    """
    for where, own in files.items():
        afar = [file for file in own if "://" in file.path]
        if afar:
            print(
                f"octo: note: {where}: {len(afar)} files come over the network at every reading, up to {times} times; "
                f"to fetch them once, download them and set {where}.path to the copy",
                file=sys.stderr,
            )
        unmarked = [file for file in afar if not file.modified and not _is_pinned(file.path)]
        if unmarked:
            print(
                f"octo: note: {where}: of {len(unmarked)} files the server tells neither time nor tag: while they are "
                "read, a change is noticed only if it changes their size",
                file=sys.stderr,
            )


def tell_empty(files: Mapping[str, Iterable[InputFile]]) -> None:
    """Say on stderr which files have 0 bytes: of a file of lines that may be meant, others are refused when read.

    Args:
        files: of each corpus, by the field that names it.
    """
    for where, own in files.items():
        if empty := [file.path for file in own if not file.bytes]:
            print(f"octo: note: {where}: {len(empty)} files are empty: {_shown(empty)}", file=sys.stderr)


def tell_copies(inputs: Mapping[str, Mapping[str, Mapping[str, Any]]], left_out: bool) -> None:
    """Say on stderr which files of a corpus have the same content.

    Args:
        inputs: size and hash of the files of each corpus, by the field that names it and by their names there.
        left_out: whether the work leaves out duplicates.
    """
    end = "the copies are left out as duplicates" if left_out else "read as often; deduplicate: {} leaves copies out"
    for where, own in inputs.items():
        same: dict[str, list[str]] = {}
        for name, facts in own.items():
            same.setdefault(facts["sha256"], []).append(name)
        copies = [" = ".join(names) for names in same.values() if len(names) > 1 and own[names[0]]["bytes"]]
        if copies:
            print(f"octo: note: {where}: files of equal content, {end}: {_shown(copies)}", file=sys.stderr)


def _shown(names: Sequence[str]) -> str:
    return ", ".join(names[:_SHOWN]) + (" ..." if len(names) > _SHOWN else "")


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
        reason = " ".join(str(error).split())[:_SAID]
        fix = _AFAR if "://" in file.path else "make it readable"
        raise DataError(f"{file.path} cannot be read ({reason})", fix=fix) from None
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
    if look_at(file.path, anew=True) != file:
        raise _changed(file.path)


def _changed(path: str) -> DataError:
    return DataError(
        f"{path} changed while the build read it",
        "half of the result would be of the old file and half of the new one",
        _AGAIN,
    )
