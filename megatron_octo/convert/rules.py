"""The rules a mapping table is made of: how one Megatron tensor and its Hugging Face tensors become each other.

A rule is data (names, with `{layer}` for the layer number, and axis names) and two pure functions that are each
other's inverse: `import_` takes the Hugging Face tensors to the Megatron tensor, `export` takes it back. Axis
names are those of `Geometry`: hidden, attention (all query heads), dim (one head), ffn.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, fields, replace
from typing import TYPE_CHECKING, Self

if TYPE_CHECKING:
    from torch import Tensor

    from megatron_octo.config.run import ModelConfig

LAYER = "{layer}"
"""Placeholder for the layer number in the names of a table."""

Shape = tuple[int, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Geometry:
    """The sizes a rule may need, counted in elements.

    `padded` is the number of rows Megatron's embedding has, `vocabulary` the number that is published.
    """

    layers: int
    hidden: int
    heads: int
    groups: int
    dim: int
    ffn: int
    vocabulary: int
    padded: int
    tied: bool

    @classmethod
    def of(cls, model: ModelConfig, padded: int) -> Geometry:
        """Take the sizes of a model whose embedding Megatron pads to `padded` rows."""
        return cls(
            layers=model.layers, hidden=model.hidden, heads=model.heads, groups=model.kv_groups, dim=model.dim,
            ffn=model.ffn, vocabulary=model.vocabulary, padded=padded, tied=model.tied_embeddings,
        )  # fmt: skip

    @property
    def attention(self) -> int:
        """Width of all query heads together."""
        return self.heads * self.dim

    def shape(self, axes: Iterable[str]) -> Shape:
        """Sizes of named axes: `("hidden", "attention")` -> `(2048, 2048)`."""
        return tuple(getattr(self, axis) for axis in axes)


class _Rule:
    """What all rules share."""

    __slots__ = ()

    def at(self, layer: int) -> Self:
        """The same rule for one layer: `{layer}` replaced in every name."""
        names = {field.name: getattr(self, field.name) for field in fields(self)}  # type: ignore[arg-type]
        numbered = {key: name.replace(LAYER, str(layer)) for key, name in names.items() if isinstance(name, str)}
        return replace(self, **numbered)  # type: ignore[type-var]

    def stored(self, size: Geometry) -> bool:
        """Whether a model of this geometry stores the tensor at all."""
        return True

    def comparable(self, tensor: Tensor, size: Geometry) -> Tensor:
        """The part of a Megatron tensor that Hugging Face has too."""
        return tensor


@dataclass(frozen=True, slots=True)
class Rename(_Rule):
    """One tensor, the same in both worlds but for its name.

    Args:
        megatron: name in the Megatron checkpoint.
        source: name in the Hugging Face directory.
        axes: names of its axes.
    """

    megatron: str
    source: str
    axes: tuple[str, ...]

    @property
    def sources(self) -> tuple[str, ...]:
        """Hugging Face names, in the order `import_` takes their tensors."""
        return (self.source,)

    def megatron_shape(self, size: Geometry) -> Shape:
        """Shape of the Megatron tensor."""
        return size.shape(self.axes)

    def source_shapes(self, size: Geometry) -> tuple[Shape, ...]:
        """Shapes of the Hugging Face tensors, in the order of `sources`."""
        return (size.shape(self.axes),)

    def import_(self, tensors: Sequence[Tensor], size: Geometry) -> Tensor:
        """Hugging Face tensors -> Megatron tensor."""
        return tensors[0]

    def export(self, tensor: Tensor, size: Geometry) -> tuple[Tensor, ...]:
        """Megatron tensor -> Hugging Face tensors."""
        return (tensor,)


@dataclass(frozen=True, slots=True)
class FusedQKV(_Rule):
    """Query, key and value in one tensor, group by group: [q heads of the group | k | v] for each KV group.

    Args:
        megatron: name in the Megatron checkpoint.
        query: name of the query projection, `[heads * dim, ...]`.
        key: name of the key projection, `[groups * dim, ...]`.
        value: name of the value projection, `[groups * dim, ...]`.
        axes: the axes after the rows; `()` for a bias.
    """

    megatron: str
    query: str
    key: str
    value: str
    axes: tuple[str, ...] = ("hidden",)

    @property
    def sources(self) -> tuple[str, ...]:
        """Hugging Face names, in the order `import_` takes their tensors."""
        return (self.query, self.key, self.value)

    def megatron_shape(self, size: Geometry) -> Shape:
        """Shape of the Megatron tensor: `[(heads + 2 groups) * dim, ...]`."""
        return ((size.heads + 2 * size.groups) * size.dim, *size.shape(self.axes))

    def source_shapes(self, size: Geometry) -> tuple[Shape, ...]:
        """Shapes of the Hugging Face tensors, in the order of `sources`."""
        rest, small = size.shape(self.axes), size.groups * size.dim
        return (size.attention, *rest), (small, *rest), (small, *rest)

    def import_(self, tensors: Sequence[Tensor], size: Geometry) -> Tensor:
        """Hugging Face tensors -> Megatron tensor."""
        import torch

        rest = tensors[0].shape[1:]
        by_group = [tensor.reshape(size.groups, -1, *rest) for tensor in tensors]
        return torch.cat(by_group, dim=1).reshape(-1, *rest)

    def export(self, tensor: Tensor, size: Geometry) -> tuple[Tensor, ...]:
        """Megatron tensor -> Hugging Face tensors."""
        rest, per_group = tensor.shape[1:], size.heads // size.groups * size.dim
        by_group = tensor.reshape(size.groups, -1, *rest)
        parts = by_group.split((per_group, size.dim, size.dim), dim=1)
        return tuple(part.reshape(-1, *rest) for part in parts)


@dataclass(frozen=True, slots=True)
class GatedPair(_Rule):
    """The two input projections of a gated MLP, one above the other: [gate ; up].

    Args:
        megatron: name in the Megatron checkpoint.
        gate: name of the projection that goes through the activation, `[ffn, ...]`.
        up: name of the projection it multiplies, `[ffn, ...]`.
        axes: the axes after the rows; `()` for a bias.
    """

    megatron: str
    gate: str
    up: str
    axes: tuple[str, ...] = ("hidden",)

    @property
    def sources(self) -> tuple[str, ...]:
        """Hugging Face names, in the order `import_` takes their tensors."""
        return (self.gate, self.up)

    def megatron_shape(self, size: Geometry) -> Shape:
        """Shape of the Megatron tensor: `[2 ffn, ...]`."""
        return (2 * size.ffn, *size.shape(self.axes))

    def source_shapes(self, size: Geometry) -> tuple[Shape, ...]:
        """Shapes of the Hugging Face tensors, in the order of `sources`."""
        half = (size.ffn, *size.shape(self.axes))
        return half, half

    def import_(self, tensors: Sequence[Tensor], size: Geometry) -> Tensor:
        """Hugging Face tensors -> Megatron tensor."""
        import torch

        return torch.cat(tuple(tensors))

    def export(self, tensor: Tensor, size: Geometry) -> tuple[Tensor, ...]:
        """Megatron tensor -> Hugging Face tensors."""
        return tuple(tensor.split(size.ffn))


@dataclass(frozen=True, slots=True)
class VocabPadded(_Rule):
    """A tensor with a row per token, padded by Megatron so that every tensor-parallel size divides it.

    Import adds rows of zeros, export cuts them: what training did to rows that no token has is dropped.

    Args:
        megatron: name in the Megatron checkpoint, `[padded, ...]`.
        source: name in the Hugging Face directory, `[vocabulary, ...]`.
        axes: the axes after the rows.
    """

    megatron: str
    source: str
    axes: tuple[str, ...] = ("hidden",)

    @property
    def sources(self) -> tuple[str, ...]:
        """Hugging Face names, in the order `import_` takes their tensors."""
        return (self.source,)

    def megatron_shape(self, size: Geometry) -> Shape:
        """Shape of the Megatron tensor: `[padded, ...]`."""
        return (size.padded, *size.shape(self.axes))

    def source_shapes(self, size: Geometry) -> tuple[Shape, ...]:
        """Shapes of the Hugging Face tensors, in the order of `sources`."""
        return ((size.vocabulary, *size.shape(self.axes)),)

    def import_(self, tensors: Sequence[Tensor], size: Geometry) -> Tensor:
        """Hugging Face tensors -> Megatron tensor."""
        import torch

        rows = tensors[0]
        padding = rows.new_zeros((size.padded - size.vocabulary, *rows.shape[1:]))
        return torch.cat((rows, padding))

    def export(self, tensor: Tensor, size: Geometry) -> tuple[Tensor, ...]:
        """Megatron tensor -> Hugging Face tensors."""
        return (self.comparable(tensor, size),)

    def comparable(self, tensor: Tensor, size: Geometry) -> Tensor:
        """The rows of real tokens."""
        return tensor[: size.vocabulary]


@dataclass(frozen=True, slots=True)
class Tied(VocabPadded):
    """The output head: a padded tensor of its own, or, in a tied model, the embedding and stored nowhere.

    Some trainers write a tied head all the same; such a copy is accepted if it equals the embedding bit for bit.

    Args:
        megatron: name in the Megatron checkpoint.
        source: name in the Hugging Face directory.
        axes: the axes after the rows.
        to: Hugging Face name of the embedding a tied head is.
    """

    to: str = "model.embed_tokens.weight"

    def stored(self, size: Geometry) -> bool:
        """A tied head is not stored."""
        return not size.tied


Rule = Rename | FusedQKV | GatedPair | VocabPadded | Tied
"""Any rule of a table."""

Table = tuple[Rule, ...]
"""A family's mapping: every tensor of the model, each named once."""


def expand(table: Table, size: Geometry) -> list[Rule]:
    """Write a table out for a model: rules with `{layer}` once per layer, in the order a forward pass meets them."""
    first = next((index for index, rule in enumerate(table) if LAYER in rule.megatron), len(table))
    before = [rule for rule in table[:first] if LAYER not in rule.megatron]
    after = [rule for rule in table[first:] if LAYER not in rule.megatron]
    layered = [rule for rule in table if LAYER in rule.megatron]
    return before + [rule.at(layer) for layer in range(size.layers) for rule in layered] + after
