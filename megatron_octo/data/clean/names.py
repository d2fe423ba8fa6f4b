"""The ids of a shard's documents, kept small: a duplicate names the document that is kept instead of it."""

from __future__ import annotations

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


def read_names(path: Path, places: np.ndarray) -> list[str]:
    """The ids of the documents at some places of a shard."""
    prefix, numbers = _read(path)
    return [f"{prefix}:{number}" for number in numbers[places].tolist()]


def read_numbers(path: Path) -> np.ndarray:
    """The lines or rows of a shard's documents, in order; uint64 [documents]."""
    return _read(path)[1]


def _read(path: Path) -> tuple[str, np.ndarray]:
    with path.open("rb") as file:
        prefix = file.readline()[:-1].decode()
        return prefix, np.frombuffer(file.read(), "<u8")
