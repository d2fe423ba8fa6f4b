"""The rules a mapping table is made of: how one Megatron tensor and its Hugging Face tensors become each other.

A conversion moves rows and computes nothing. So a rule is data: names (with `{layer}` for the layer number), axis
names, and one list that says which rows of which Hugging Face tensor lie in the Megatron tensor, in order. Shapes
follow from that list, and import and export are its two readings (`views`). Axis names are those of `Geometry`:
hidden, attention (all query heads), dim (one head), ffn.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, fields, replace
from typing import TYPE_CHECKING, NamedTuple, Self

if TYPE_CHECKING:
    from megatron_octo.checkpoint.tensors import Shape
    from megatron_octo.config.model import ModelConfig

LAYER = "{layer}"
"""Placeholder for the layer number in the names of a table."""


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


class Rows(NamedTuple):
    """A run of rows of a Megatron tensor.

    Args:
        source: index into the rule's `sources`, or None for rows of zeros that only Megatron has.
        start: first row in that source.
        count: number of rows.
    """

    source: int | None
    start: int
    count: int


class _Rule:
    """What all rules share."""

    __slots__ = ()

    sources: tuple[str, ...]
    axes: tuple[str, ...]

    def rows(self, size: Geometry) -> list[Rows]:
        """The Megatron tensor from its first row to its last; all that distinguishes the rules."""
        raise NotImplementedError

    def rest(self, size: Geometry) -> Shape:
        """Sizes of the axes after the rows, the same on both sides."""
        return size.shape(self.axes)

    def megatron_shape(self, size: Geometry) -> Shape:
        """Shape of the Megatron tensor."""
        return (sum(piece.count for piece in self.rows(size)), *self.rest(size))

    def source_shapes(self, size: Geometry) -> tuple[Shape, ...]:
        """Shapes of the Hugging Face tensors, in the order of `sources`."""
        counts = [0] * len(self.sources)
        for piece in self.rows(size):
            if piece.source is not None:
                counts[piece.source] += piece.count
        return tuple((count, *self.rest(size)) for count in counts)

    def shared_rows(self, size: Geometry) -> int:
        """Number of leading rows of the Megatron tensor that Hugging Face has too; padding follows them."""
        return sum(piece.count for piece in self.rows(size) if piece.source is not None)

    def stored(self, size: Geometry) -> bool:
        """Whether a model of this geometry stores the tensor at all."""
        return True

    def at(self, layer: int) -> Self:
        """The same rule for one layer: `{layer}` replaced in every name."""
        names = {field.name: getattr(self, field.name) for field in fields(self)}  # type: ignore[arg-type]
        numbered = {key: name.replace(LAYER, str(layer)) for key, name in names.items() if isinstance(name, str)}
        return replace(self, **numbered)  # type: ignore[type-var]


@dataclass(frozen=True, slots=True)
class Rename(_Rule):
    """One tensor, the same in both worlds but for its name.

    Args:
        megatron: name in the Megatron checkpoint.
        source: name in the Hugging Face directory.
        axes: names of all its axes, the rows first.
    """

    megatron: str
    source: str
    axes: tuple[str, ...]

    @property
    def sources(self) -> tuple[str, ...]:
        """Hugging Face names."""
        return (self.source,)

    def rest(self, size: Geometry) -> Shape:
        """Sizes of the axes after the rows."""
        return size.shape(self.axes[1:])

    def rows(self, size: Geometry) -> list[Rows]:
        """All rows as they are."""
        return [Rows(0, 0, *size.shape(self.axes[:1]))]


@dataclass(frozen=True, slots=True)
class FusedQKV(_Rule):
    """Query, key and value in one tensor, group by group: [q heads of the group | k | v] for each KV group.

    Args:
        megatron: name in the Megatron checkpoint, `[(heads + 2 groups) * dim, ...]`.
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
        """Hugging Face names: query, key, value."""
        return (self.query, self.key, self.value)

    def rows(self, size: Geometry) -> list[Rows]:
        """For each KV group the rows of its query heads, of its key and of its value."""
        widths = (size.heads // size.groups * size.dim, size.dim, size.dim)
        return [Rows(part, group * width, width) for group in range(size.groups) for part, width in enumerate(widths)]


@dataclass(frozen=True, slots=True)
class GatedPair(_Rule):
    """The two input projections of a gated MLP, one above the other: [gate ; up].

    Args:
        megatron: name in the Megatron checkpoint, `[2 ffn, ...]`.
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
        """Hugging Face names: gate, up."""
        return (self.gate, self.up)

    def rows(self, size: Geometry) -> list[Rows]:
        """The gate's rows, then the other's."""
        return [Rows(0, 0, size.ffn), Rows(1, 0, size.ffn)]


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
        """Hugging Face names."""
        return (self.source,)

    def rows(self, size: Geometry) -> list[Rows]:
        """The rows of tokens, then those of none."""
        padding = size.padded - size.vocabulary
        return [Rows(0, 0, size.vocabulary)] + [Rows(None, 0, padding)] * bool(padding)


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
