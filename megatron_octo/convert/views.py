"""Views: a source of tensors seen under the other world's names and row order, or in another dtype.

A view holds no tensor. Asked for rows, it reads just those from the source below it, so views stack, and whoever
writes one needs memory for a block however large the model is. Before a view exists the names and shapes below it
are held against the table: nothing missing, nothing extra, nothing of another shape, nothing twice.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

from megatron_octo.checkpoint.tensors import Shape, TensorSource, read, row_blocks
from megatron_octo.convert.rules import Geometry, Table, Tied, expand
from megatron_octo.convert.tables import cover, megatron_shapes, source_shapes, stored_rules
from megatron_octo.errors import DataError
from megatron_octo.progress import Progress

if TYPE_CHECKING:
    from torch import Tensor


class _Piece(NamedTuple):
    """`count` rows of a view from row `at` on: those of tensor `name` below from row `start`, or zeros."""

    at: int
    count: int
    name: str | None
    start: int


class _Gathered:
    """A source whose tensors are put together from runs of rows of another's."""

    def __init__(self, source: TensorSource, shapes: Mapping[str, Shape], pieces: Mapping[str, list[_Piece]]) -> None:
        self.where = source.where
        self._source, self._shapes, self._pieces = source, dict(shapes), pieces
        self._dtypes = {name: self._one_dtype(name) for name in shapes}

    def shapes(self) -> Mapping[str, Shape]:
        """Shape of every tensor, by name, in the order of a forward pass."""
        return self._shapes

    def dtype(self, name: str) -> str:
        """Dtype of a tensor: that of the rows below."""
        return self._dtypes[name]

    def fill(self, name: str, start: int, out: Tensor) -> None:
        """Read rows `start` to `start + len(out)` of a tensor into `out`."""
        end = start + len(out)
        for piece in self._pieces[name]:
            first, last = max(start, piece.at), min(end, piece.at + piece.count)
            if first >= last:
                continue
            rows = out[first - start : last - start]
            if piece.name is None:
                rows.zero_()
            else:
                self._source.fill(piece.name, piece.start + first - piece.at, rows)

    def _one_dtype(self, name: str) -> str:
        parts = {part: self._source.dtype(part) for _, _, part, _ in self._pieces[name] if part is not None}
        if len(set(parts.values())) > 1:
            told = ", ".join(f"{part} is {dtype}" for part, dtype in parts.items())
            raise DataError(
                f"{self.where}: {told}",
                f"they are rows of one tensor, {name}, which has one dtype",
                "write the model in one dtype first",
            )
        return next(iter(parts.values()))


class AsMegatron(_Gathered):
    """A Hugging Face model's tensors as Megatron has them; rows that pad the vocabulary are zeros.

    Args:
        table: the family's table.
        size: the model's geometry.
        source: the Hugging Face side. A copy of a tied head is left out if it equals the embedding bit for bit.

    Raises:
        DataError: a tensor is missing, extra or of another shape, a tied head is not the embedding, or parts of one
            Megatron tensor have different dtypes.
    """

    def __init__(self, table: Table, size: Geometry, source: TensorSource) -> None:
        found = dict(source.shapes())
        tied = [rule for rule in expand(table, size) if isinstance(rule, Tied) and not rule.stored(size)]
        copies = [rule for rule in tied if found.pop(rule.source, None) is not None]
        cover(source_shapes(table, size), found).require(source.where)
        for rule in copies:
            _require_tied_copy(rule, source)
        pieces = defaultdict(list)
        for rule in stored_rules(table, size):
            at = 0
            for rows in rule.rows(size):
                name = None if rows.source is None else rule.sources[rows.source]
                pieces[rule.megatron].append(_Piece(at, rows.count, name, rows.start))
                at += rows.count
        super().__init__(source, megatron_shapes(table, size), pieces)


class AsHuggingFace(_Gathered):
    """A Megatron model's tensors as Hugging Face has them; rows that pad the vocabulary are left out.

    Args:
        table: the family's table.
        size: the model's geometry.
        source: the Megatron side.

    Raises:
        DataError: a tensor is missing, extra or of another shape.
    """

    def __init__(self, table: Table, size: Geometry, source: TensorSource) -> None:
        cover(megatron_shapes(table, size), source.shapes()).require(source.where)
        pieces = defaultdict(list)
        for rule in stored_rules(table, size):
            at = 0
            for rows in rule.rows(size):
                if rows.source is not None:
                    pieces[rule.sources[rows.source]].append(_Piece(rows.start, rows.count, rule.megatron, at))
                at += rows.count
        super().__init__(source, source_shapes(table, size), pieces)


class Cast:
    """A source in another floating-point dtype; tensors of that dtype and those of integers stay as they are.

    Args:
        source: where the values come from.
        dtype: torch's name of the dtype, e.g. "bfloat16".
    """

    def __init__(self, source: TensorSource, dtype: str) -> None:
        self.where = source.where
        self._source, self._dtype = source, dtype

    def shapes(self) -> Mapping[str, Shape]:
        """Shape of every tensor, by name."""
        return self._source.shapes()

    def dtype(self, name: str) -> str:
        """Dtype in which `fill` gives a tensor."""
        import torch

        stored = self._source.dtype(name)
        return self._dtype if getattr(torch, stored).is_floating_point else stored

    def fill(self, name: str, start: int, out: Tensor) -> None:
        """Read rows `start` to `start + len(out)` of a tensor into `out`, rounded to nearest.

        Raises:
            DataError: a finite value is too large for the dtype.
        """
        import torch

        stored = self._source.dtype(name)
        if self.dtype(name) == stored:
            return self._source.fill(name, start, out)
        for first, count in row_blocks(tuple(out.shape), getattr(torch, stored).itemsize):
            rows = out[first : first + count]
            values = read(self._source, name, start + first, count)
            rows.copy_(values)
            # Only half precision ends (65504) where weights may still be.
            if self._dtype == "float16" and bool((rows.isinf() & values.isfinite()).any()):
                raise DataError(
                    f"{self.where}: {name} has values beyond float16's range",
                    "a conversion keeps every value",
                    "choose bfloat16 or float32",
                )
        return None


class Watched:
    """A source that moves a progress bar as its rows are read; use as a context manager.

    Args:
        label: what is being done.
        source: what is read, each row once.
    """

    def __init__(self, label: str, source: TensorSource) -> None:
        self.where, self._source = source.where, source
        total = sum(math.prod(shape) for shape in source.shapes().values())
        self._bar = Progress(label, total, unit="parameters")

    def __enter__(self) -> Watched:
        self._bar.__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        self._bar.__exit__(*error)

    def shapes(self) -> Mapping[str, Shape]:
        """As the source's."""
        return self._source.shapes()

    def dtype(self, name: str) -> str:
        """As the source's."""
        return self._source.dtype(name)

    def fill(self, name: str, start: int, out: Tensor) -> None:
        """As the source's, counted."""
        self._source.fill(name, start, out)
        self._bar.advance(out.numel())


def same_bits(one: Tensor, other: Tensor) -> bool:
    """Whether two tensors have the same dtype, shape and bits (so that NaN equals itself, and 0 is not -0)."""
    import torch

    if one.dtype != other.dtype or one.shape != other.shape:
        return False
    return torch.equal(one.contiguous().view(torch.uint8), other.contiguous().view(torch.uint8))


def _require_tied_copy(rule: Tied, source: TensorSource) -> None:
    import torch

    shapes, dtype = source.shapes(), source.dtype(rule.to)
    blocks = row_blocks(shapes[rule.to], getattr(torch, dtype).itemsize)
    if shapes[rule.source] != shapes[rule.to] or not all(
        same_bits(read(source, rule.source, *block), read(source, rule.to, *block)) for block in blocks
    ):
        raise DataError(
            f"{source.where}: {rule.source} differs from {rule.to} although the configuration ties them",
            "a tied head is the embedding; dropping a different one would change the model",
            "set tie_word_embeddings to false in config.json if the head is meant to be its own",
        )
