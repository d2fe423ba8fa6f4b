"""Walk a table over tensor streams, in either direction, one tensor at a time.

Before the first tensor is read the names and shapes on both sides are held against the table: nothing missing,
nothing extra, nothing twice, nothing of another shape. So a walk that starts covers the model exactly once.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Protocol

from megatron_octo.convert.llama import LLAMA
from megatron_octo.convert.rules import Geometry, Rule, Shape, Table, Tied, expand
from megatron_octo.errors import ConfigError, DataError

if TYPE_CHECKING:
    from torch import Tensor

TABLES: dict[str, Table] = {"llama": LLAMA}
"""The mapping table of each model family."""

_NAMES_SHOWN = 6


class TensorSource(Protocol):
    """Where tensors come from: names and shapes for nothing, values one by one."""

    where: str
    """What to call it in messages, usually its path."""

    def shapes(self) -> Mapping[str, Shape]:
        """Shape of every tensor it holds, by name, without reading values."""
        ...

    def read(self, name: str) -> Tensor:
        """One tensor, on CPU."""
        ...


@dataclass(frozen=True, slots=True)
class Coverage:
    """How the tensors found compare with the tensors a table names; empty lists mean each is there once."""

    tensors: int
    missing: list[str] = field(default_factory=list)
    extra: list[str] = field(default_factory=list)
    misshapen: list[str] = field(default_factory=list)

    @property
    def complete(self) -> bool:
        """Whether every tensor is covered exactly once with the right shape."""
        return not (self.missing or self.extra or self.misshapen)

    def require(self, where: str) -> None:
        """Refuse an incomplete coverage.

        Raises:
            DataError: names the tensors that are missing, extra or of another shape.
        """
        faults = [f"{kind} {_some(names)}" for kind, names in self._faults() if names]
        if faults:
            raise DataError(
                f"{where}: tensors do not cover the model: {'; '.join(faults)}",
                "every tensor is converted exactly once",
                "check that the directory is complete and that its configuration is the model's",
            )

    def _faults(self) -> tuple[tuple[str, list[str]], ...]:
        return ("missing", self.missing), ("extra", self.extra), ("misshapen", self.misshapen)


def table_of(family: str) -> Table:
    """The table of a model family.

    Raises:
        ConfigError: no such family.
    """
    if family not in TABLES:
        raise ConfigError(f"model family {family!r} cannot be converted", f"known are {', '.join(sorted(TABLES))}")
    return TABLES[family]


def megatron_shapes(table: Table, size: Geometry) -> dict[str, Shape]:
    """Every Megatron tensor a model has, with its shape, in walking order."""
    return _collect((rule.megatron, rule.megatron_shape(size)) for rule in _stored(table, size))


def source_shapes(table: Table, size: Geometry) -> dict[str, Shape]:
    """Every Hugging Face tensor a model has, with its shape, in walking order."""
    return _collect(
        pair for rule in _stored(table, size) for pair in zip(rule.sources, rule.source_shapes(size), strict=True)
    )


def cover(expected: Mapping[str, Shape], found: Mapping[str, Shape]) -> Coverage:
    """Hold the tensors found against those expected, names and shapes."""
    misshapen = [
        f"{name} {list(found[name])} instead of {list(shape)}"
        for name, shape in expected.items()
        if name in found and tuple(found[name]) != tuple(shape)
    ]
    return Coverage(
        tensors=len(expected.keys() & found.keys()),
        missing=[name for name in expected if name not in found],
        extra=[name for name in found if name not in expected],
        misshapen=misshapen,
    )


def import_tensors(table: Table, size: Geometry, source: TensorSource) -> Iterator[tuple[str, Tensor]]:
    """Hugging Face tensors -> Megatron tensors, as (name, tensor), in walking order.

    Args:
        table: the family's table.
        size: the model's geometry.
        source: the Hugging Face side. A copy of a tied head is accepted if it equals the embedding.

    Raises:
        DataError: a tensor is missing, extra, of another shape, or a tied head is not the embedding.
    """
    found = dict(source.shapes())
    for rule in expand(table, size):
        if isinstance(rule, Tied) and size.tied and rule.source in found:
            _check_tied_copy(rule, source)
            del found[rule.source]
    cover(source_shapes(table, size), found).require(source.where)
    for rule in _stored(table, size):
        yield rule.megatron, rule.import_([source.read(name) for name in rule.sources], size)


def export_tensors(table: Table, size: Geometry, source: TensorSource) -> Iterator[tuple[str, Tensor]]:
    """Megatron tensors -> Hugging Face tensors, as (name, tensor), in walking order.

    Raises:
        DataError: a tensor is missing, extra or of another shape.
    """
    cover(megatron_shapes(table, size), source.shapes()).require(source.where)
    for rule in _stored(table, size):
        yield from zip(rule.sources, rule.export(source.read(rule.megatron), size), strict=True)


def _stored(table: Table, size: Geometry) -> Iterator[Rule]:
    return (rule for rule in expand(table, size) if rule.stored(size))


def _collect(pairs: Iterator[tuple[str, Shape]]) -> dict[str, Shape]:
    shapes: dict[str, Shape] = {}
    for name, shape in pairs:
        if name in shapes:
            raise ValueError(f"two rules of one table name {name}")
        shapes[name] = shape
    return shapes


def _check_tied_copy(rule: Tied, source: TensorSource) -> None:
    head, embedding = source.read(rule.source), source.read(rule.to)
    if head.shape != embedding.shape or head.dtype != embedding.dtype or not bool((head == embedding).all()):
        raise DataError(
            f"{source.where}: {rule.source} differs from {rule.to} although the configuration ties them",
            "a tied head is the embedding; dropping a different one would change the model",
            "set tie_word_embeddings to false in config.json if the head is meant to be its own",
        )


def _some(names: list[str]) -> str:
    shown = ", ".join(names[:_NAMES_SHOWN])
    return shown if len(names) <= _NAMES_SHOWN else f"{shown} and {len(names) - _NAMES_SHOWN} more"
