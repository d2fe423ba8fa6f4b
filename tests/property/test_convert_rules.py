"""Every rule moves rows and undoes itself, for any geometry, and a view gives the same rows in blocks of any size."""

from __future__ import annotations

from collections.abc import Mapping

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_octo.checkpoint.tensors import TensorSource, read
from megatron_octo.convert.rules import FusedQKV, GatedPair, Geometry, Rename, Rule, Tied, VocabPadded, expand
from megatron_octo.convert.tables import TABLES, megatron_shapes, source_shapes
from megatron_octo.convert.views import AsHuggingFace, AsMegatron, same_bits

QKV = FusedQKV("qkv", query="q", key="k", value="v")
QKV_BIAS = FusedQKV("qkv", query="q", key="k", value="v", axes=())
GATED = GatedPair("fc1", gate="gate", up="up")
EMBEDDING = VocabPadded("embedding", "embed")
HEAD = Tied("head", "lm_head", to="embed")
NORM = Rename("norm", "ln", ("hidden",))
RULES = (QKV, QKV_BIAS, GATED, EMBEDDING, HEAD, NORM)

DTYPES = st.sampled_from((torch.float32, torch.bfloat16, torch.float16))
FAMILIES = st.sampled_from(sorted(TABLES))


@st.composite
def geometries(draw: st.DrawFn) -> Geometry:
    groups, vocabulary = draw(st.integers(1, 5)), draw(st.integers(1, 40))
    return Geometry(
        layers=draw(st.integers(1, 3)),
        hidden=draw(st.integers(1, 9)),
        heads=groups * draw(st.integers(1, 4)),
        groups=groups,
        dim=draw(st.integers(1, 6)),
        ffn=draw(st.integers(1, 11)),
        vocabulary=vocabulary,
        padded=vocabulary + draw(st.integers(0, 20)),
        tied=draw(st.booleans()),
    )


class Memory:
    """Tensors by name, counting how often each row is read."""

    where = "memory"

    def __init__(self, tensors: Mapping[str, torch.Tensor]) -> None:
        self.tensors = dict(tensors)
        self.reads = {name: torch.zeros(len(tensor), dtype=torch.int64) for name, tensor in tensors.items()}

    def shapes(self) -> dict[str, tuple[int, ...]]:
        return {name: tuple(tensor.shape) for name, tensor in self.tensors.items()}

    def dtype(self, name: str) -> str:
        return str(self.tensors[name].dtype).removeprefix("torch.")

    def fill(self, name: str, start: int, out: torch.Tensor) -> None:
        assert out.is_contiguous() and out.dtype == self.tensors[name].dtype
        assert start + len(out) <= len(self.tensors[name])
        out.copy_(self.tensors[name][start : start + len(out)])
        self.reads[name][start : start + len(out)] += 1


def _random(shapes: Mapping[str, tuple[int, ...]], seed: int, dtype: torch.dtype = torch.float32) -> Memory:
    """Random bits: every pattern a file may hold, NaN and negative zero among them."""
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for name, shape in shapes.items():
        raw = torch.randint(0, 256, (*shape[:-1], shape[-1] * dtype.itemsize), dtype=torch.uint8, generator=generator)
        tensors[name] = raw.view(dtype)
    return Memory(tensors)


def _all(source: TensorSource) -> dict[str, torch.Tensor]:
    return {name: read(source, name) for name in source.shapes()}


@given(geometries(), FAMILIES, DTYPES, st.integers(0, 100))
@settings(max_examples=120, deadline=None)
def test_export_undoes_import_bit_for_bit_and_reads_each_row_once(
    size: Geometry, family: str, dtype: torch.dtype, seed: int
) -> None:
    table = TABLES[family]
    source = _random(source_shapes(table, size), seed, dtype)
    megatron = Memory(_all(AsMegatron(table, size, source)))
    assert megatron.shapes() == megatron_shapes(table, size)
    back = _all(AsHuggingFace(table, size, megatron))
    assert list(back) == list(source.tensors)
    assert all(same_bits(back[name], source.tensors[name]) for name in back)
    assert all(bool((reads == 1).all()) for reads in source.reads.values())


@given(geometries(), FAMILIES, DTYPES, st.integers(0, 100))
@settings(max_examples=120, deadline=None)
def test_import_undoes_export_up_to_padding_which_becomes_zero(
    size: Geometry, family: str, dtype: torch.dtype, seed: int
) -> None:
    table = TABLES[family]
    source = _random(megatron_shapes(table, size), seed, dtype)
    again = _all(AsMegatron(table, size, AsHuggingFace(table, size, source)))
    assert list(again) == list(source.tensors)
    padded = {r.megatron for r in table if isinstance(r, VocabPadded)}
    for name, tensor in again.items():
        rows = size.vocabulary if name in padded else len(tensor)
        assert same_bits(tensor[:rows], source.tensors[name][:rows])
        assert not tensor[rows:].view(torch.uint8).any()
        assert source.reads[name].tolist() == [1] * rows + [0] * (len(tensor) - rows)


@given(geometries(), FAMILIES, st.integers(0, 100), st.integers(1, 50))
@settings(max_examples=60, deadline=None)
def test_blocks_of_any_size_give_the_same_rows(size: Geometry, family: str, seed: int, step: int) -> None:
    table = TABLES[family]
    there = AsMegatron(table, size, _random(source_shapes(table, size), seed))
    back = AsHuggingFace(table, size, _random(megatron_shapes(table, size), seed))
    for view in (there, back):
        for name, shape in view.shapes().items():
            blocks = [read(view, name, at, min(step, shape[0] - at)) for at in range(0, shape[0], step)]
            assert same_bits(torch.cat(blocks), read(view, name))


@given(geometries(), st.sampled_from(RULES))
@settings(max_examples=150, deadline=None)
def test_rows_cover_each_side_exactly_once(size: Geometry, rule: Rule) -> None:
    seen: dict[int, list[int]] = {index: [] for index in range(len(rule.sources))}
    zeros = 0
    for rows in rule.rows(size):
        assert rows.count > 0
        if rows.source is None:
            zeros += rows.count
        else:
            seen[rows.source] += range(rows.start, rows.start + rows.count)
    for index, shape in enumerate(rule.source_shapes(size)):
        assert sorted(seen[index]) == list(range(shape[0]))
    assert sum(map(len, seen.values())) == rule.shared_rows(size)
    assert rule.shared_rows(size) + zeros == rule.megatron_shape(size)[0]


@given(geometries())
@settings(max_examples=60, deadline=None)
def test_shapes_are_those_of_the_two_libraries(size: Geometry) -> None:
    """Written out from the definition of the layers, not from the rules."""
    query, small = size.heads * size.dim, size.groups * size.dim
    assert QKV.megatron_shape(size) == (query + 2 * small, size.hidden)
    assert QKV.source_shapes(size) == ((query, size.hidden), (small, size.hidden), (small, size.hidden))
    assert QKV_BIAS.megatron_shape(size) == (query + 2 * small,)
    assert QKV_BIAS.source_shapes(size) == ((query,), (small,), (small,))
    assert GATED.megatron_shape(size) == (2 * size.ffn, size.hidden)
    assert GATED.source_shapes(size) == ((size.ffn, size.hidden), (size.ffn, size.hidden))
    for rule in (EMBEDDING, HEAD):
        assert rule.megatron_shape(size) == (size.padded, size.hidden)
        assert rule.source_shapes(size) == ((size.vocabulary, size.hidden),)
    assert NORM.megatron_shape(size) == NORM.source_shapes(size)[0] == (size.hidden,)
    for table, name, shape in (
        ("qwen2", "q_proj.bias", (query,)),
        ("qwen2", "k_proj.bias", (small,)),
        ("qwen2", "v_proj.bias", (small,)),
        ("qwen3", "q_norm.weight", (size.dim,)),
        ("qwen3", "k_norm.weight", (size.dim,)),
    ):
        assert source_shapes(TABLES[table], size)[f"model.layers.0.self_attn.{name}"] == shape
    output = Rename("proj", "o_proj", ("hidden", "attention"))
    assert output.megatron_shape(size) == output.source_shapes(size)[0] == (size.hidden, query)


@given(geometries())
@settings(max_examples=60, deadline=None)
def test_every_query_head_shares_its_groups_block(size: Geometry) -> None:
    """The rows of Megatron's tensor name their head: groups one after the other, each [its q heads | k | v]."""
    per_group = size.heads // size.groups
    query = torch.arange(size.heads).repeat_interleave(size.dim)
    key = 100 + torch.arange(size.groups).repeat_interleave(size.dim)
    fused = read(AsMegatron((QKV_BIAS,), size, Memory({"q": query, "k": key, "v": key + 100})), "qkv")
    expected = []
    for group in range(size.groups):
        owners = [*range(group * per_group, (group + 1) * per_group), 100 + group, 200 + group]
        expected += [owner for owner in owners for _ in range(size.dim)]
    assert fused.tolist() == expected


def test_the_gate_lies_above_the_other_projection() -> None:
    """`linear_fc1` is split in two halves, and the first goes through the activation."""
    size = Geometry(layers=1, hidden=1, heads=1, groups=1, dim=1, ffn=3, vocabulary=1, padded=1, tied=False)
    halves = Memory({"gate": torch.ones(3, 1), "up": torch.full((3, 1), 2.0)})
    assert read(AsMegatron((GATED,), size, halves), "fc1").flatten().tolist() == [1, 1, 1, 2, 2, 2]


# Tensors of a layer and those outside, by family: 2 norms, 3 of attention's input, its output, 3 of the MLP.
@pytest.mark.parametrize(("family", "per_layer"), [("llama", 9), ("qwen2", 12), ("qwen3", 11)])
@given(size=geometries())
@settings(max_examples=30, deadline=None)
def test_a_table_names_each_tensor_once_and_in_layer_order(family: str, per_layer: int, size: Geometry) -> None:
    rules = expand(TABLES[family], size)
    names = [name for rule in rules for name in (rule.megatron, *rule.sources)]
    assert len(names) == len(set(names))
    assert not any("{" in name for name in names)
    assert len(source_shapes(TABLES[family], size)) == per_layer * size.layers + (2 if size.tied else 3)
    layers = [int(rule.megatron.split(".")[2]) for rule in rules if ".layers." in rule.megatron]
    assert layers == sorted(layers)
    assert rules[0].megatron.startswith("embedding") and rules[-1].megatron == "output_layer.weight"
