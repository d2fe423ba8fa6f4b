"""Torch's file-system writer, made for files that are sealed: each one's BLAKE3 is taken as it is written."""

from __future__ import annotations

import io
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from blake3 import blake3
from torch.distributed.checkpoint import FileSystemWriter
from torch.distributed.checkpoint.filesystem import FileSystem

from megatron_octo.files import SmallWrites


class HashingWriter(FileSystemWriter):
    """Writes a plan to one file, in the thread that calls, and keeps its hash: sealing need not read it again.

    Args:
        directory: where files go.

    Nothing is copied ahead, so a planner may give each item in the same memory.
    """

    def __init__(self, directory: Path) -> None:
        super().__init__(str(directory), per_thread_copy_ahead=0)
        self._files = _HashingFiles()
        self.fs = self._files

    @property
    def digest(self) -> str:
        """BLAKE3 of the file written last."""
        return self._files.digest

    def storage_meta(self) -> None:
        """Nothing: neither a temporary path nor a random number belongs to what a checkpoint is."""


class _HashingFiles(FileSystem):
    """Opens files whose BLAKE3 is taken as they are written: what is sealed is what was meant, and read only once."""

    digest = ""

    @contextmanager
    def create_stream(self, path: Any, mode: str) -> Iterator[io.IOBase]:
        """Open a file for writing; `digest` is its hash once it is closed."""
        raw = _Hashed(path, mode)
        with io.BufferedWriter(raw) as stream:
            yield stream
        self.digest = raw.hash.hexdigest()


class _Hashed(SmallWrites):
    def __init__(self, path: Any, mode: str) -> None:
        super().__init__(path, mode)
        self.hash = blake3()

    def write(self, content: Any) -> int:
        count = super().write(content)
        self.hash.update(memoryview(content).cast("B")[:count])
        return count


@contextmanager
def without_checksums() -> Iterator[None]:
    """The seal's hashes cover every byte, so torch's own sums would only be a second pass over them."""
    before = torch.serialization.get_crc32_options()
    torch.serialization.set_crc32_options(False)
    try:
        yield
    finally:
        torch.serialization.set_crc32_options(before)


@contextmanager
def cause_raised() -> Iterator[None]:
    """Torch hides what happens while bytes are written, a full disk or an interrupt, behind an error of its archive."""
    try:
        yield
    except RuntimeError as error:
        found: BaseException | None = error
        while found is not None and not isinstance(found, OSError | KeyboardInterrupt):
            found = found.__cause__ or found.__context__
        raise found or error from None
