"""Every rule of a mapping table undoes itself, for any geometry."""

from __future__ import annotations

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_octo.convert.llama import LLAMA
from megatron_octo.convert.rules import FusedQKV, GatedPair, Geometry, Rename, Tied, VocabPadded, expand
from megatron_octo.convert.walk import export_tensors, import_tensors, megatron_shapes, source_shapes

QKV = FusedQKV("qkv", query="q", key="k", value="v")
QKV_BIAS = FusedQKV("qkv", query="q", key="k", value="v", axes=())
GATED = GatedPair("fc1", gate="gate", up="up")
EMBEDDING = VocabPadded("embedding", "embed")
HEAD = Tied("head", "lm_head", to="embed")
NORM = Rename("norm", "ln", ("hidden",))
RULES = (QKV, QKV_BIAS, GATED, EMBEDDING, HEAD, NORM)


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


def _random(shape: tuple[int, ...], seed: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


class Tensors:
    """Tensors by name, counting how often each is read."""

    where = "memory"

    def __init__(self, tensors: dict[str, torch.Tensor]) -> None:
        self.tensors, self.reads = tensors, dict.fromkeys(tensors, 0)

    def shapes(self) -> dict[str, tuple[int, ...]]:
        return {name: tuple(tensor.shape) for name, tensor in self.tensors.items()}

    def read(self, name: str) -> torch.Tensor:
        self.reads[name] += 1
        return self.tensors[name]


@given(geometries(), st.sampled_from(RULES), st.integers(0, 100))
@settings(max_examples=150, deadline=None)
def test_export_undoes_import(size: Geometry, rule: Rename, seed: int) -> None:
    sources = [_random(shape, seed + index) for index, shape in enumerate(rule.source_shapes(size))]
    megatron = rule.import_(sources, size)
    assert tuple(megatron.shape) == rule.megatron_shape(size)
    for before, after in zip(sources, rule.export(megatron, size), strict=True):
        assert torch.equal(before, after)


@given(geometries(), st.sampled_from(RULES), st.integers(0, 100))
@settings(max_examples=150, deadline=None)
def test_import_undoes_export_up_to_padding(size: Geometry, rule: Rename, seed: int) -> None:
    megatron = _random(rule.megatron_shape(size), seed)
    sources = rule.export(megatron, size)
    assert [tuple(source.shape) for source in sources] == list(rule.source_shapes(size))
    again = rule.import_(sources, size)
    assert torch.equal(rule.comparable(again, size), rule.comparable(megatron, size))
    if isinstance(rule, VocabPadded):
        assert not again[size.vocabulary :].any()


@given(geometries())
@settings(max_examples=60, deadline=None)
def test_every_query_head_shares_its_groups_block(size: Geometry) -> None:
    """The rows of Megatron's tensor name their head: groups one after the other, each [its q heads | k | v]."""
    per_group = size.heads // size.groups
    query = torch.arange(size.heads).repeat_interleave(size.dim)
    key = 100 + torch.arange(size.groups).repeat_interleave(size.dim)
    fused = QKV_BIAS.import_([query, key, key + 100], size)
    expected = []
    for group in range(size.groups):
        owners = [*range(group * per_group, (group + 1) * per_group), 100 + group, 200 + group]
        expected += [owner for owner in owners for _ in range(size.dim)]
    assert fused.tolist() == expected


@given(geometries(), st.integers(0, 100))
@settings(max_examples=50, deadline=None)
def test_walking_there_and_back_is_the_identity_and_reads_each_tensor_once(size: Geometry, seed: int) -> None:
    shapes = source_shapes(LLAMA, size)
    source = Tensors({name: _random(shape, seed + index) for index, (name, shape) in enumerate(shapes.items())})
    megatron = Tensors(dict(import_tensors(LLAMA, size, source)))
    assert megatron.shapes() == megatron_shapes(LLAMA, size)
    back = dict(export_tensors(LLAMA, size, megatron))
    assert list(back) == list(shapes)
    assert all(torch.equal(back[name], source.tensors[name]) for name in shapes)
    assert set(source.reads.values()) == {1} == set(megatron.reads.values())


@given(geometries())
@settings(max_examples=30, deadline=None)
def test_the_llama_table_names_each_tensor_once(size: Geometry) -> None:
    rules = expand(LLAMA, size)
    names = [name for rule in rules for name in (rule.megatron, *rule.sources)]
    assert len(names) == len(set(names))
    assert not any("{" in name for name in names)
    assert len(source_shapes(LLAMA, size)) == 9 * size.layers + (2 if size.tied else 3)
