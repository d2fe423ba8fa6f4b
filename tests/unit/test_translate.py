"""Our settings against megatron-core's own configuration classes, whose checks run when they are built."""

from __future__ import annotations

import itertools

import pytest
import torch
from precision_tools import run

from megatron_octo.config.check import check_run
from megatron_octo.config.precision import Fp8Config
from megatron_octo.config.run import RunConfig
from megatron_octo.model.translate import Kernels, ddp_config, optimizer_config, transformer_config

pytestmark = pytest.mark.timeout(120)

RECIPES = ("delayed", "tensorwise", "blockwise")
FORMATS = ("hybrid", "e4m3")


@pytest.fixture(autouse=True)
def fused_rope(monkeypatch):
    """megatron-core refuses fused RoPE where TransformerEngine is not there; stand in for its presence."""
    from megatron_octo.runtime.quick_import import import_megatron

    import_megatron()
    from megatron.core.models.common.embeddings import rope_utils

    monkeypatch.setattr(rope_utils, "fused_apply_rotary_pos_emb", lambda *_: None)


def layers_of(asked: RunConfig):
    return transformer_config(
        asked.model, asked.parallel, asked.dtype, asked.recompute, Kernels("transformer_engine", asked.fp8)
    )


@pytest.mark.parametrize(("recipe", "form"), itertools.product(RECIPES, FORMATS))
def test_each_recipe_reaches_the_layers_the_reduction_and_the_optimizer(recipe, form):
    asked = run(fp8={"recipe": recipe, "format": form})
    config = layers_of(asked)
    assert (config.fp8, config.fp8_recipe, config.transformer_impl) == (form, recipe, "transformer_engine")
    assert (config.fp8_param, config.fp8_dot_product_attention, config.first_last_layers_bf16) == (False,) * 3
    assert config.fp8_wgrad and config.bf16 and config.params_dtype == torch.bfloat16
    assert config.apply_rope_fusion and config.bias_activation_fusion and config.cross_entropy_loss_fusion
    assert optimizer_config(asked.optimizer, 1e-3, "bf16", asked.parallel, asked.fp8).fp8_recipe == recipe
    assert not ddp_config(asked.parallel, asked.fp8).fp8_param_gather


OPTIONS = {
    "margin": ({"recipe": "delayed", "margin": 2}, {"fp8_margin": 2}),
    "history": ({"recipe": "delayed", "amax_history": 64}, {"fp8_amax_history_len": 64}),
    "history by default": ({"recipe": "delayed"}, {"fp8_amax_history_len": 1024, "fp8_amax_compute_algo": "max"}),
    "amax": ({"recipe": "delayed", "amax": "most_recent"}, {"fp8_amax_compute_algo": "most_recent"}),
    "attention": ({"attention": True}, {"fp8_dot_product_attention": True}),
    "parameters": ({"parameters": True}, {"fp8_param": True}),
    "first layers": (
        {"bf16_first_layers": 2},
        {"first_last_layers_bf16": True, "num_layers_at_start_in_bf16": 2, "num_layers_at_end_in_bf16": 0},
    ),
    "last layers": (
        {"recipe": "blockwise", "bf16_last_layers": 1},
        {"first_last_layers_bf16": True, "num_layers_at_start_in_bf16": 0, "num_layers_at_end_in_bf16": 1},
    ),
}


@pytest.mark.parametrize("name", OPTIONS)
def test_each_option_has_its_name_in_megatron_core(name):
    fp8, expected = OPTIONS[name]
    asked = run(fp8=fp8)
    check_run(asked)
    config = layers_of(asked)
    assert {field: getattr(config, field) for field in expected} == expected


def test_every_field_of_ours_changes_something_there():
    """A new field that nobody translates would be ignored: this fails until it is."""
    plain = vars(layers_of(run(fp8={"recipe": "delayed"})))
    other = {
        "recipe": "tensorwise",
        "format": "e4m3",
        "margin": 1,
        "amax_history": 2,
        "amax": "most_recent",
        "wgrad": False,
        "bf16_first_layers": 1,
        "bf16_last_layers": 1,
        "parameters": True,
        "attention": True,
    }
    assert set(other) | {"sentinel"} == set(Fp8Config.model_fields)
    for field, value in other.items():
        recipe = "tensorwise" if field.startswith("bf16") else "delayed"
        base = plain if recipe == "delayed" else vars(layers_of(run(fp8={"recipe": recipe})))
        changed = vars(layers_of(run(fp8={"recipe": recipe, field: value})))
        assert any(changed[name] != base[name] for name in base if name.startswith(("fp8", "num_layers_at", "first_l")))


def test_parameters_in_fp8_are_gathered_in_fp8():
    asked = run(fp8={"parameters": True, "recipe": "blockwise"}, parallel={"data": 2})
    reduction = ddp_config(asked.parallel, asked.fp8)
    assert reduction.fp8_param_gather and reduction.use_distributed_optimizer


def test_which_layers_megatron_core_then_keeps_in_bf16():
    from megatron.core.fp8_utils import is_first_last_bf16_layer

    config = layers_of(run(fp8={"bf16_first_layers": 2, "bf16_last_layers": 1}))
    kept = [number for number in range(8) if is_first_last_bf16_layer(config, number)]
    assert kept == [0, 1, 7]


def test_overlap_of_tensor_parallel_messages():
    asked = run(parallel={"tensor": 2, "sequence": True, "tp_comm_overlap": True})
    assert layers_of(asked).tp_comm_overlap
    assert not layers_of(run(parallel={"tensor": 2, "sequence": True})).tp_comm_overlap


def test_local_layers_fuse_nothing_and_know_no_fp8():
    asked = run(fp8=None)
    config = transformer_config(asked.model, asked.parallel, asked.dtype)
    assert (config.fp8, config.transformer_impl, config.apply_rope_fusion) == (None, "local", False)
    assert optimizer_config(asked.optimizer, 1e-3, "bf16", asked.parallel).fp8_recipe is None


@pytest.mark.parametrize(
    ("fp8", "parallel", "words"),
    [
        ({"recipe": "delayed", "bf16_first_layers": 1}, {}, "Delayed scaling does not support"),
        ({"bf16_first_layers": 3}, {"pipeline": 4}, "num_layers_at_start_in_bf16"),
        ({"bf16_last_layers": 3}, {"pipeline": 4}, "num_layers_at_end_in_bf16"),
    ],
)
def test_what_megatron_core_refuses_is_refused_by_us_first(fp8, parallel, words):
    from megatron_octo.errors import ConfigError

    asked = run(fp8=fp8, parallel=parallel)
    with pytest.raises(ValueError, match=words):
        layers_of(asked)
    with pytest.raises(ConfigError):
        check_run(asked)
