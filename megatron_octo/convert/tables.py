"""The mapping table of each model family, written out for a model, and how tensors found compare with it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from megatron_octo.checkpoint.tensors import Shape
from megatron_octo.convert.llama import LLAMA
from megatron_octo.convert.qwen2 import QWEN2
from megatron_octo.convert.qwen3 import QWEN3
from megatron_octo.convert.rules import Geometry, Rule, Table, expand
from megatron_octo.errors import ConfigError, DataError

TABLES: dict[str, Table] = {"llama": LLAMA, "qwen2": QWEN2, "qwen3": QWEN3}
"""The mapping table of each model family."""

_NAMES_SHOWN = 6


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
        kinds = (("missing", self.missing), ("extra", self.extra), ("misshapen", self.misshapen))
        faults = [f"{kind} {shorten(names)}" for kind, names in kinds if names]
        if faults:
            raise DataError(
                f"{where}: tensors do not cover the model: {'; '.join(faults)}",
                "every tensor is converted exactly once",
                "check that the directory is complete and that its configuration is the model's (its number of layers; "
                "tie_word_embeddings, where only the head is missing)",
            )


def table_of(family: str) -> Table:
    """The table of a model family.

    Raises:
        ConfigError: no such family.
    """
    if family not in TABLES:
        raise ConfigError(f"model family {family!r} cannot be converted", f"known are {', '.join(sorted(TABLES))}")
    return TABLES[family]


def stored_rules(table: Table, size: Geometry) -> list[Rule]:
    """The rules of the tensors a model stores, in the order a forward pass meets them."""
    return [rule for rule in expand(table, size) if rule.stored(size)]


def megatron_shapes(table: Table, size: Geometry) -> dict[str, Shape]:
    """Every Megatron tensor a model has, with its shape, in the table's order."""
    return _collect((rule.megatron, rule.megatron_shape(size)) for rule in stored_rules(table, size))


def source_shapes(table: Table, size: Geometry) -> dict[str, Shape]:
    """Every Hugging Face tensor a model has, with its shape, in the table's order."""
    return _collect(
        pair for rule in stored_rules(table, size) for pair in zip(rule.sources, rule.source_shapes(size), strict=True)
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


def _collect(pairs: Iterable[tuple[str, Shape]]) -> dict[str, Shape]:
    shapes: dict[str, Shape] = {}
    for name, shape in pairs:
        if name in shapes:
            raise ValueError(f"two rules of one table name {name}")
        shapes[name] = shape
    return shapes


def shorten(names: list[str]) -> str:
    """The first few of many names, and how many more there are."""
    shown = ", ".join(names[:_NAMES_SHOWN])
    return shown if len(names) <= _NAMES_SHOWN else f"{shown} and {len(names) - _NAMES_SHOWN} more"
