"""Faults planted in Hugging Face tensors by hand, each named; and no name where there is none."""

from __future__ import annotations

import pytest
import torch

from megatron_octo.checkpoint.tensors import read
from megatron_octo.convert.diagnose import diagnose
from megatron_octo.convert.rules import Geometry
from megatron_octo.convert.tables import TABLES, source_shapes, stored_rules
from megatron_octo.convert.views import AsMegatron, same_bits

LAYER, MEGATRON = "model.layers.1.", "decoder.layers.1."
QKV, FC1 = MEGATRON + "self_attention.linear_qkv.weight", MEGATRON + "mlp.linear_fc1.weight"
Q, K, V = (f"{LAYER}self_attn.{part}_proj.weight" for part in "qkv")
GATE, UP, DOWN = (f"{LAYER}mlp.{part}_proj.weight" for part in ("gate", "up", "down"))
OUT, EMBEDDING = LAYER + "self_attn.o_proj.weight", "model.embed_tokens.weight"

Tensors = dict[str, torch.Tensor]


class Memory:
    where = "memory"

    def __init__(self, tensors: Tensors) -> None:
        self.tensors = tensors

    def shapes(self) -> dict[str, tuple[int, ...]]:
        return {name: tuple(tensor.shape) for name, tensor in self.tensors.items()}

    def dtype(self, name: str) -> str:
        return str(self.tensors[name].dtype).removeprefix("torch.")

    def fill(self, name: str, start: int, out: torch.Tensor) -> None:
        out.copy_(self.tensors[name][start : start + len(out)])


def _size(heads: int = 8, groups: int = 4) -> Geometry:
    return Geometry(layers=3, hidden=32, heads=heads, groups=groups, dim=4, ffn=24, vocabulary=40, padded=64, tied=True)


def _model(family: str = "llama", size: Geometry | None = None, dtype: torch.dtype = torch.float32) -> Tensors:
    torch.manual_seed(1)
    shapes = source_shapes(TABLES[family], size or _size())
    return {name: torch.randn(shape).to(dtype) for name, shape in shapes.items()}


def _diagnose(
    right: Tensors, wrong: Tensors, name: str, family: str = "llama", size: Geometry | None = None
) -> str | None:
    """The fault of one Megatron tensor, `right` being what the checkpoint was made of."""
    table, size = TABLES[family], size or _size()
    rule = next(rule for rule in stored_rules(table, size) if rule.megatron == name)
    there = AsMegatron(table, size, Memory(right))
    checkpoint = Memory({name: read(there, name) for name in there.shapes()})
    return diagnose(rule, size, checkpoint, AsMegatron(table, size, Memory(wrong)))


def _heads(tensor: torch.Tensor, order: list[int], dim: int = 4) -> torch.Tensor:
    """Blocks of `dim` rows in another order."""
    return tensor.view(len(order), -1, *tensor.shape[1:])[order].reshape(tensor.shape)


@pytest.mark.parametrize("family", sorted(TABLES))
def test_equal_tensors_have_no_fault_and_padding_is_not_read(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    ends, fill = [], Memory.fill

    def watched(self: Memory, name: str, start: int, out: torch.Tensor) -> None:
        if name == "embedding.word_embeddings.weight":
            ends.append(start + len(out))
        fill(self, name, start, out)

    model, size = _model(family), _size()
    there = AsMegatron(TABLES[family], size, Memory(model))
    checkpoint = Memory({name: read(there, name) for name in there.shapes()})
    checkpoint.tensors["embedding.word_embeddings.weight"][size.vocabulary :] = 7.0  # trained, and in no directory
    monkeypatch.setattr(Memory, "fill", watched)
    for rule in stored_rules(TABLES[family], size):
        assert diagnose(rule, size, checkpoint, there) is None
    assert ends == [size.vocabulary]


def test_query_and_key_swapped() -> None:
    size = _size(heads=4, groups=4)
    model = _model(size=size)
    swapped = {**model, Q: model[K], K: model[Q]}
    assert _diagnose(model, swapped, QKV, size=size) == "query and key swapped"


def test_a_block_cut_in_another_order_under_gqa() -> None:
    """An export that takes each group's rows for [k | q heads | v]."""
    model, size = _model(), _size()
    fused = read(AsMegatron(TABLES["llama"], size, Memory(model)), QKV).view(4, 4, 4, 32)
    wrong = {**model, K: fused[:, 0].reshape(16, 32), Q: fused[:, 1:3].reshape(32, 32)}
    assert _diagnose(model, wrong, QKV) == "query and key swapped"
    wrong = {**model, K: fused[:, 3].reshape(16, 32), V: fused[:, 2].reshape(16, 32)}
    assert _diagnose(model, wrong, QKV) == "key and value swapped"
    wrong = {**model, V: fused[:, 0].reshape(16, 32), K: fused[:, 3].reshape(16, 32), Q: fused[:, 1:3].reshape(32, 32)}
    assert _diagnose(model, wrong, QKV) == "query, key and value in another order"


def test_a_fused_tensor_cut_without_regard_to_groups() -> None:
    model = _model()
    fused = read(AsMegatron(TABLES["llama"], _size(), Memory(model)), QKV)
    wrong = {**model, **dict(zip((Q, K, V), fused.split([32, 16, 16]), strict=True))}
    assert _diagnose(model, wrong, QKV) == "query, key and value not grouped by KV group"
    assert _diagnose(wrong, model, QKV) == "query, key and value not grouped by KV group"


def test_groups_and_heads_permuted() -> None:
    model, order = _model(), [2, 0, 1, 3]
    wrong = {**model, **{name: _heads(model[name], order) for name in (Q, K, V)}}
    assert _diagnose(model, wrong, QKV) == "KV groups permuted"
    wrong = {**model, **{name: _heads(model[name], order) for name in (K, V)}}
    assert _diagnose(model, wrong, QKV) == "KV groups permuted (of key and value)"
    wrong = {**model, Q: _heads(model[Q], [1, 0, 2, 3, 4, 5, 6, 7])}
    assert _diagnose(model, wrong, QKV) == "query heads permuted"


def test_permuted_groups_of_a_bias_with_equal_values() -> None:
    """Rows of a vector are single values, which repeat."""
    model = _model("qwen2")
    biases = [f"{LAYER}self_attn.{part}_proj.bias" for part in "qkv"]
    model |= {name: torch.arange(len(model[name])).remainder(5).float() for name in biases}
    wrong = {**model, **{name: _heads(model[name], [1, 0, 2, 3]) for name in biases}}
    told = _diagnose(model, wrong, MEGATRON + "self_attention.linear_qkv.bias", "qwen2")
    assert told == "KV groups permuted"


def test_the_other_rope_order() -> None:
    model = _model()
    wrong = dict(model)
    for name in (Q, K):
        wrong[name] = model[name].view(-1, 2, 2, 32).transpose(1, 2).reshape(model[name].shape)
    assert "the other RoPE order" in (_diagnose(model, wrong, QKV) or "")


def test_gate_and_up_swapped_or_interleaved() -> None:
    model = _model()
    assert _diagnose(model, {**model, GATE: model[UP], UP: model[GATE]}, FC1) == "gate and up swapped"
    woven = torch.stack((model[GATE], model[UP]), dim=1).flatten(0, 1)
    assert _diagnose(model, {**model, GATE: woven[:24], UP: woven[24:]}, FC1) == "gate and up interleaved"


def test_transposed_square_and_reshaped() -> None:
    model, name = _model(), MEGATRON + "self_attention.linear_proj.weight"
    assert _diagnose(model, {**model, OUT: model[OUT].T.contiguous()}, name) == "transposed"
    shape = model[DOWN].shape
    for reshaped in (model[DOWN].T.reshape(shape), model[DOWN].reshape(shape[::-1]).T.contiguous()):
        assert _diagnose(model, {**model, DOWN: reshaped}, MEGATRON + "mlp.linear_fc2.weight") == "transposed"
    assert _diagnose(model, {**model, Q: model[Q].T.contiguous()}, QKV) == f"{Q}: transposed"


def test_rows_of_another_layer_of_all_or_one_part() -> None:
    model = _model()
    later = {name: model[name.replace(".1.", ".2.")] for name in (Q, K, V)}
    assert _diagnose(model, {**model, **later}, QKV) == "rows of another layer (2)"
    assert _diagnose(model, {**model, UP: model[UP.replace(".1.", ".0.")]}, FC1) == f"{UP}: rows of another layer (0)"


def test_zeros() -> None:
    model = _model("qwen3")
    norm = LAYER + "self_attn.q_norm.weight"
    zeros = {**model, norm: torch.zeros_like(model[norm]), K: torch.zeros_like(model[K])}
    assert _diagnose(model, zeros, MEGATRON + "self_attention.q_layernorm.weight", "qwen3") == "all zeros"
    assert _diagnose(model, zeros, QKV, "qwen3") == f"{K}: all zeros"
    partly = {**model, EMBEDDING: model[EMBEDDING].clone()}
    partly[EMBEDDING][37:] = 0
    assert _diagnose(model, partly, "embedding.word_embeddings.weight", "qwen3") == "3 of 40 rows are zeros"


def test_lost_precision_in_the_same_dtype() -> None:
    model, name = _model(), MEGATRON + "mlp.linear_fc2.weight"
    for dtype, words in ((torch.bfloat16, "bfloat16"), (torch.float16, "float16")):
        rounded = {**model, DOWN: model[DOWN].to(dtype).float()}
        assert _diagnose(model, rounded, name) == f"precision lost: rounded to {words}"


def test_rounded_once_is_right_and_twice_is_not() -> None:
    model, name = _model(), MEGATRON + "mlp.linear_fc2.weight"
    once = {name: tensor.bfloat16() for name, tensor in model.items()}
    assert _diagnose(model, once, name) is None
    twice = {**once, DOWN: model[DOWN].half().bfloat16()}
    assert not same_bits(twice[DOWN], once[DOWN])
    assert _diagnose(model, twice, name) == "rounded to bfloat16 twice, through float16"
    assert _diagnose(once, twice, name) == "rounded to bfloat16 twice: values off by one in the last place"
    cut = {**once, DOWN: (model[DOWN].view(torch.int32) & -65536).view(torch.float32).bfloat16()}
    assert _diagnose(model, cut, name) == "precision lost: cut to bfloat16 instead of rounded"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_one_bit_one_byte_one_value(dtype: torch.dtype) -> None:
    model = _model(dtype=dtype)
    for mask, words in ((0x40, "bit"), (0x41, "byte"), (0x0141, "value")):
        wrong = {**model, K: model[K].clone()}
        bits = wrong[K].view(torch.int32 if dtype == torch.float32 else torch.int16)
        bits[3, 5] ^= mask
        assert _diagnose(model, wrong, QKV) == f"{K}: one {words} differs (row 3, column 5)"


def test_values_that_are_not_finite() -> None:
    model = _model()
    wrong = {**model, DOWN: model[DOWN].clone()}
    wrong[DOWN][4] = float("nan")
    assert _diagnose(model, wrong, MEGATRON + "mlp.linear_fc2.weight") == "holds values that are not finite"


def test_rows_in_another_order_and_a_fault_without_a_name() -> None:
    model, name = _model(), "embedding.word_embeddings.weight"
    assert _diagnose(model, {**model, EMBEDDING: model[EMBEDDING].flip(0)}, name) == "rows in another order"
    assert _diagnose(model, {**model, EMBEDDING: torch.randn(40, 32)}, name) is None
    wrong = {**model, GATE: torch.randn(24, 32), UP: torch.zeros(24, 32)}
    assert _diagnose(model, wrong, FC1) == f"{UP}: all zeros"
