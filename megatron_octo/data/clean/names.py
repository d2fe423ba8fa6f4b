"""The ids of a shard's documents, kept small: a duplicate names the document that is kept instead of it."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np

from megatron_octo.files import write_bytes


class Names:
    """Collects the ids of a shard's documents, `<corpus>/<file>:<line or row>`, in 8 bytes each."""

    def __init__(self) -> None:
        self._prefix, self._numbers = "", bytearray()

    def __len__(self) -> int:
        return len(self._numbers) // 8

    def add(self, name: str) -> None:
        """Note the id of the next document."""
        self._prefix, _, number = name.rpartition(":")
        self._numbers += int(number).to_bytes(8, "little")

    def write(self, path: Path) -> None:
        """Write them: a line with what they share, then the numbers."""
        write_bytes(path, self._prefix.encode() + b"\n" + self._numbers)


def read_names(path: Path) -> tuple[str, np.ndarray]:
    """The ids of a shard's documents: what they share, and the lines or rows in order; str and uint64 [documents].

    The numbers stay in the file until they are asked for.
    """
    with path.open("rb") as file:
        prefix = file.readline()
        empty = file.seek(0, os.SEEK_END) == len(prefix)
    numbers = np.empty(0, "<u8") if empty else np.memmap(path, "<u8", "r", offset=len(prefix))
    return prefix[:-1].decode(), numbers
