"""Views: what they refuse before a row is read, tied heads, and other dtypes."""

from __future__ import annotations

import pytest
import torch

from megatron_octo.checkpoint import tensors as streams
from megatron_octo.checkpoint.tensors import read
from megatron_octo.convert.rules import Geometry
from megatron_octo.convert.tables import TABLES, cover, megatron_shapes, source_shapes, table_of
from megatron_octo.convert.views import AsHuggingFace, AsMegatron, Cast, same_bits
from megatron_octo.errors import ConfigError, DataError

LLAMA = TABLES["llama"]
EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"


class Memory:
    """Tensors by name, noting the largest piece asked for, in rows."""

    where = "memory"

    def __init__(self, tensors: dict[str, torch.Tensor]) -> None:
        self.tensors, self.largest, self.filled = tensors, 0, 0

    def shapes(self) -> dict[str, tuple[int, ...]]:
        return {name: tuple(tensor.shape) for name, tensor in self.tensors.items()}

    def dtype(self, name: str) -> str:
        return str(self.tensors[name].dtype).removeprefix("torch.")

    def fill(self, name: str, start: int, out: torch.Tensor) -> None:
        self.largest, self.filled = max(self.largest, len(out)), self.filled + 1
        out.copy_(self.tensors[name][start : start + len(out)])


def _size(tied: bool = False, family: str = "llama") -> Geometry:
    return Geometry(layers=2, hidden=8, heads=4, groups=2, dim=2, ffn=6, vocabulary=10, padded=16, tied=tied)


def _model(tied: bool = False, dtype: torch.dtype = torch.float32) -> Memory:
    torch.manual_seed(0)
    return Memory({name: torch.randn(shape).to(dtype) for name, shape in source_shapes(LLAMA, _size(tied)).items()})


def _refused(weights: Memory, tied: bool = False) -> str:
    with pytest.raises(DataError) as caught:
        AsMegatron(LLAMA, _size(tied), weights)
    return str(caught.value)


def test_a_missing_tensor_is_named_and_nothing_is_read() -> None:
    weights = _model()
    del weights.tensors["model.layers.1.mlp.up_proj.weight"]
    assert "missing model.layers.1.mlp.up_proj.weight" in _refused(weights)
    assert weights.filled == 0


def test_a_dropped_layer_is_told_and_the_list_kept_short() -> None:
    weights = _model()
    for name in [name for name in weights.tensors if ".layers.1." in name]:
        del weights.tensors[name]
    assert "missing model.layers.1.input_layernorm.weight" in (told := _refused(weights))
    assert "and 3 more" in told


def test_an_extra_tensor_is_named() -> None:
    weights = _model()
    weights.tensors["model.layers.0.self_attn.q_proj.bias"] = torch.zeros(8)
    assert "extra model.layers.0.self_attn.q_proj.bias" in _refused(weights)


def test_a_misshapen_tensor_is_told_with_both_shapes() -> None:
    weights = _model()
    weights.tensors[EMBEDDING] = torch.zeros(16, 8)
    assert f"misshapen {EMBEDDING} [16, 8] instead of [10, 8]" in _refused(weights)


def test_a_lost_bias_and_a_lost_norm_are_missing() -> None:
    size = _size()
    for family, lost in (("qwen2", "k_proj.bias"), ("qwen3", "k_norm.weight")):
        shapes = source_shapes(TABLES[family], size)
        found = {name: shape for name, shape in shapes.items() if not (lost in name and ".1." in name)}
        assert cover(shapes, found).missing == [f"model.layers.1.self_attn.{lost}"]


def test_parts_of_one_tensor_need_one_dtype() -> None:
    weights = _model()
    name = "model.layers.0.self_attn.k_proj.weight"
    weights.tensors[name] = weights.tensors[name].bfloat16()
    assert f"{name} is bfloat16" in _refused(weights)
    assert AsMegatron(LLAMA, _size(), Cast(weights, "float32")).shapes() == megatron_shapes(LLAMA, _size())


def test_the_megatron_side_is_covered_too() -> None:
    size = _size()
    stored = Memory({name: torch.zeros(shape) for name, shape in megatron_shapes(LLAMA, size).items()})
    stored.tensors["embedding.word_embeddings.weight"] = torch.zeros(10, 8)
    del stored.tensors["output_layer.weight"]
    with pytest.raises(DataError, match=r"missing output_layer.weight; misshapen embedding.* \[10, 8\] instead"):
        AsHuggingFace(LLAMA, size, stored)


def test_an_equal_copy_of_a_tied_head_is_left_out() -> None:
    weights = _model(tied=True)
    weights.tensors[HEAD] = weights.tensors[EMBEDDING].clone()
    assert "output_layer.weight" not in AsMegatron(LLAMA, _size(tied=True), weights).shapes()


def test_a_different_copy_of_a_tied_head_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """One bit in the last row, seen in blocks of one row, of which no more are ever held."""
    monkeypatch.setattr(streams.row_blocks, "__defaults__", (1,))
    weights = _model(tied=True)
    head = weights.tensors[EMBEDDING].clone()
    weights.tensors[HEAD] = head
    head[-1, -1] = torch.nextafter(head[-1, -1], torch.tensor(9.0))
    assert f"{HEAD} differs from {EMBEDDING}" in _refused(weights, tied=True)
    assert weights.largest == 1
    weights.tensors[HEAD] = weights.tensors[EMBEDDING].bfloat16()
    assert f"{HEAD} differs" in _refused(weights, tied=True)
    weights.tensors[HEAD] = weights.tensors[EMBEDDING][:9]
    assert f"{HEAD} differs" in _refused(weights, tied=True)


def test_an_unknown_family_is_refused_with_those_known() -> None:
    with pytest.raises(ConfigError, match="'mamba' cannot be converted; known are llama, qwen2, qwen3"):
        table_of("mamba")


@pytest.mark.parametrize("target", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("stored", ["float32", "bfloat16", "float16"])
def test_cast_rounds_as_torch_does_in_blocks_of_any_size(
    stored: str, target: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    values = torch.randn(37, 3).to(getattr(torch, stored))
    monkeypatch.setattr(streams.row_blocks, "__defaults__", (40,))
    view = Cast(Memory({"w": values}), target)
    assert view.dtype("w") == target
    assert same_bits(read(view, "w", 5, 30), values[5:35].to(getattr(torch, target)))


def test_cast_leaves_integers_and_what_has_the_dtype_alone() -> None:
    numbers, right = torch.arange(5), torch.randn(4).bfloat16()
    view = Cast(Memory({"n": numbers, "w": right}), "bfloat16")
    assert view.dtype("n") == "int64" and same_bits(read(view, "n"), numbers)
    assert same_bits(read(view, "w"), right)


def test_cast_refuses_values_that_become_infinite() -> None:
    view = Cast(Memory({"w": torch.tensor([1.0, 7e4])}), "float16")
    with pytest.raises(DataError, match="w has values beyond float16's range"):
        read(view, "w")
    inf = torch.tensor([float("inf")])
    assert bool(read(Cast(Memory({"w": inf}), "float16"), "w").isinf())


def test_views_stack() -> None:
    weights = _model(dtype=torch.bfloat16)
    there = Cast(AsMegatron(LLAMA, _size(), weights), "float32")
    back = Cast(AsHuggingFace(LLAMA, _size(), there), "bfloat16")
    assert all(same_bits(read(back, name), tensor) for name, tensor in weights.tensors.items())
    assert back.where == "memory"


def test_bits_are_compared_and_not_values() -> None:
    nan, zero = torch.tensor([float("nan")]), torch.tensor([0.0])
    assert same_bits(nan, nan.clone())
    assert not same_bits(zero, -zero)
    assert not same_bits(zero, zero.bfloat16())
