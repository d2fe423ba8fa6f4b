"""Counts against hand-made figures."""

from __future__ import annotations

import pytest

from megatron_octo.config.model import ModelConfig
from megatron_octo.model.facts import flops_per_token

LLAMA_1B = ModelConfig(layers=16, hidden=2048, heads=32, kv_groups=8, ffn=8192, vocabulary=128256)


def test_flops_are_six_per_weight_and_causal_attention():
    tiny = ModelConfig(layers=1, hidden=4, heads=2, kv_groups=1, ffn=8, vocabulary=10, tied_embeddings=False)
    matrices = 4 * 2 * (2 + 1 + 1 + 2) + 3 * 4 * 8 + 10 * 4
    keys = (1 + 2 + 3) / 3  # three tokens see one, two and three keys
    products = 2 * 2 * 4 * keys  # scores and values, 2 FLOPs each, over 2 heads of 2
    assert flops_per_token(tiny, 3) == pytest.approx(6 * matrices + 3 * products)


@pytest.mark.parametrize("family", ["qwen2", "qwen3"])
def test_biases_and_head_norms_are_no_matrix_products(family):
    assert flops_per_token(LLAMA_1B.model_copy(update={"family": family}), 512) == flops_per_token(LLAMA_1B, 512)


def test_tying_does_not_change_the_work():
    untied = LLAMA_1B.model_copy(update={"tied_embeddings": False})
    assert flops_per_token(untied, 8192) == flops_per_token(LLAMA_1B, 8192)
