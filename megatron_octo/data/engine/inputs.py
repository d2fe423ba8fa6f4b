"""Input files: what they hash to, and whether they stay what they are while a build reads them."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

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
    return Stage("inputs", tasks, hash_input, {"format": 1}, [file.bytes for file in tasks], "bytes")


def hash_input(file: InputFile) -> dict[str, Any]:
    """The SHA-256 of a file and its size.

    Raises:
        DataError: it cannot be read, or is being written to.
    """
    import fsspec

    digest = hashlib.sha256()
    try:
        with fsspec.open(file.path, "rb") as stream:
            while chunk := stream.read(_CHUNK):
                digest.update(chunk)
                advance(len(chunk))
    except OSError as error:
        raise DataError(f"{file.path} cannot be read ({error})", fix="make it readable") from None
    refuse_change(file)
    return {"bytes": file.bytes, "sha256": digest.hexdigest()}


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
