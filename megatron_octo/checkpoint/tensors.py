"""Tensors by name that are read a run of rows at a time, so that memory never depends on the model's size.

Everything that moves weights speaks this protocol: files on either side are sources, a mapping between two
families of names is a view of a source that is a source again, and a writer takes any of them.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from torch import Tensor

Shape = tuple[int, ...]

BLOCK_BYTES = 8 * 2**20
"""Most bytes of one tensor that are held at a time (a single longer row is held whole)."""


class TensorSource(Protocol):
    """Named tensors whose rows (the first axis; elements of a vector) can be read in any order."""

    where: str
    """What to call it in messages, usually its path."""

    def shapes(self) -> Mapping[str, Shape]:
        """Shape of every tensor it holds, by name, in its natural order, without reading values."""
        ...

    def dtype(self, name: str) -> str:
        """Dtype in which `fill` gives a tensor: torch's name without the prefix, e.g. "bfloat16"."""
        ...

    def fill(self, name: str, start: int, out: Tensor) -> None:
        """Read rows `start` to `start + len(out)` of a tensor into `out`.

        Args:
            name: one of `shapes()`.
            start: first row.
            out: contiguous CPU tensor of the source's dtype, `[rows, *shape[1:]]`.
        """
        ...


def read(source: TensorSource, name: str, start: int = 0, rows: int | None = None) -> Tensor:
    """Rows of a tensor as a new one; all of them if not said otherwise."""
    import torch

    shape = source.shapes()[name]
    count = shape[0] - start if rows is None else rows
    out = torch.empty((count, *shape[1:]), dtype=getattr(torch, source.dtype(name)))
    source.fill(name, start, out)
    return out


def row_blocks(shape: Shape, item_bytes: int, block_bytes: int = BLOCK_BYTES) -> Iterator[tuple[int, int]]:
    """Cut a tensor into runs of rows of at most `block_bytes`: (first row, number of rows)."""
    row_bytes = item_bytes
    for length in shape[1:]:
        row_bytes *= length
    step = max(1, block_bytes // max(1, row_bytes))
    for start in range(0, shape[0], step):
        yield start, min(step, shape[0] - start)
