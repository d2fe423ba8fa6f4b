"""config.json in both spellings, and what is refused."""

from __future__ import annotations

import pytest

from megatron_octo.config.model import ModelConfig
from megatron_octo.errors import ConfigError
from megatron_octo.model.hugging_face import from_hf_config, to_hf_config

SCALING = {
    "rope_type": "llama3",
    "factor": 32.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
# The published config.json of Llama-3.2-1B, as transformers 4 wrote it.
FOUR = {
    "architectures": ["LlamaForCausalLM"],
    "attention_bias": False,
    "attention_dropout": 0.0,
    "bos_token_id": 128000,
    "eos_token_id": 128001,
    "head_dim": 64,
    "hidden_act": "silu",
    "hidden_size": 2048,
    "initializer_range": 0.02,
    "intermediate_size": 8192,
    "max_position_embeddings": 131072,
    "mlp_bias": False,
    "model_type": "llama",
    "num_attention_heads": 32,
    "num_hidden_layers": 16,
    "num_key_value_heads": 8,
    "pretraining_tp": 1,
    "rms_norm_eps": 1e-05,
    "rope_scaling": SCALING,
    "rope_theta": 500000.0,
    "tie_word_embeddings": True,
    "torch_dtype": "bfloat16",
    "use_cache": True,
    "vocab_size": 128256,
}
FIVE = {key: value for key, value in FOUR.items() if key not in ("rope_scaling", "rope_theta", "torch_dtype")} | {
    "rope_parameters": {**SCALING, "rope_theta": 500000.0},
    "dtype": "bfloat16",
}
LLAMA_1B = ModelConfig(
    layers=16, hidden=2048, heads=32, kv_groups=8, ffn=8192, vocabulary=128256, rope_scaling={"factor": 32.0}
)


QWEN = {
    key: value
    for key, value in FOUR.items()
    if key not in ("attention_bias", "mlp_bias", "pretraining_tp", "rope_scaling")
} | {"sliding_window": 4096, "use_sliding_window": False}
QWEN2 = {**QWEN, "architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2"}
QWEN3 = {**QWEN, "architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3", "attention_bias": False}
FAMILIES = ["llama", "qwen2", "qwen3"]


def changed(**changes) -> ModelConfig:
    return ModelConfig(**{**LLAMA_1B.model_dump(), **changes})


@pytest.mark.parametrize("values", [FOUR, FIVE], ids=["transformers 4", "transformers 5"])
def test_both_spellings_are_read(values):
    assert from_hf_config(values) == LLAMA_1B


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("changes", [{}, {"rope_scaling": None}, {"tied_embeddings": False}, {"head_dim": 128}])
def test_round_trip(family, changes):
    model = changed(family=family, **changes)
    assert from_hf_config(to_hf_config(model, "bfloat16", eos=1)) == model


def test_a_head_dimension_that_says_nothing_new_is_no_difference():
    assert changed(head_dim=64) == LLAMA_1B
    assert changed(head_dim=64).dim == LLAMA_1B.dim == 64
    assert changed(head_dim=128).dim == 128
    assert changed(head_dim=64, hidden=2000, family="qwen3").dim == 64  # only a Llama's width is a multiple of heads


def test_what_qwen2_does_not_read_is_not_held_against_it():
    assert from_hf_config({**QWEN2, "attention_bias": True}) == from_hf_config(QWEN2)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("changes", [{}, {"rope_scaling": None}])
def test_transformers_reads_what_is_written(family, changes):
    from transformers import AutoConfig

    model = changed(family=family, **changes)
    theirs = AutoConfig.for_model(**to_hf_config(model, "float32", bos=0, eos=[1, 3], pad=2))
    assert (theirs.bos_token_id, theirs.eos_token_id, theirs.pad_token_id) == (0, [1, 3], 2)
    assert str(theirs.dtype).removeprefix("torch.") == "float32"
    assert theirs.rope_parameters["rope_theta"] == 500_000.0
    assert theirs.rope_parameters["rope_type"] == ("default" if changes else "llama3")
    assert from_hf_config(theirs.to_dict()) == model


@pytest.mark.parametrize("family", FAMILIES)
def test_what_is_left_out_is_what_transformers_takes(family):
    """The shortest file a family has means the same to transformers' class and to us."""
    from transformers import AutoConfig

    names = {"llama": "Llama", "qwen2": "Qwen2", "qwen3": "Qwen3"}
    sizes = {"num_hidden_layers": 2, "hidden_size": 2048, "num_attention_heads": 64, "intermediate_size": 16}
    values = {"architectures": [f"{names[family]}ForCausalLM"], "model_type": family, "vocab_size": 9, **sizes}
    assert from_hf_config(values) == from_hf_config(AutoConfig.for_model(**values).to_dict())


@pytest.mark.parametrize("spelling", ["rope_scaling", "rope_parameters"])
@pytest.mark.parametrize(
    ("key", "value"), [("low_freq_factor", 2.0), ("high_freq_factor", 8.0), ("original_max_position_embeddings", 4096)]
)
def test_scaling_that_megatron_cannot_express_is_refused(spelling, key, value):
    values = {**FOUR, "rope_scaling": None, spelling: {**SCALING, key: value}}
    with pytest.raises(ConfigError, match=key):
        from_hf_config(values)


@pytest.mark.parametrize("spelling", ["rope_scaling", "rope_parameters"])
@pytest.mark.parametrize(
    ("rope", "said"),
    [
        ({"type": "linear", "factor": 2.0}, "rope type = 'linear'"),
        ({"rope_type": "dynamic", "factor": 2.0}, "rope type = 'dynamic'"),
        ({"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768}, "rope type = 'yarn'"),
        ({"rope_type": "longrope", "short_factor": [1.0], "long_factor": [1.0]}, "rope type = 'longrope'"),
        ({"type": "mrope", "rope_type": "default"}, "rope type = 'default and mrope'"),
        ({"rope_type": "default", "mrope_section": [16, 24, 24]}, "rope mrope_section"),
        ({"full_attention": {"rope_type": "default"}}, "rope full_attention"),
        ({"rope_type": 3}, "rope type = '3'"),
        ({**SCALING, "attention_factor": 1.1}, "rope attention_factor"),
        ({**SCALING, "factor": None}, "rope_scaling.factor"),
        ({**SCALING, "partial_rotary_factor": 0.5}, "partial_rotary_factor = 0.5"),
        ({**SCALING, "rope_theta": 1e6}, "rope_theta = 500000.0"),
        ("llama3", "= 'llama3'"),
    ],
)
def test_other_rotations_are_refused(spelling, rope, said):
    with pytest.raises(ConfigError, match=f"config.json: .*{said}"):
        from_hf_config({**FOUR, "rope_scaling": None, spelling: rope})


def test_two_spellings_must_agree():
    both = {**FOUR, "rope_parameters": {**SCALING, "rope_theta": 500000.0}}
    assert from_hf_config(both) == LLAMA_1B
    both["rope_parameters"] = {**both["rope_parameters"], "factor": 8.0}
    with pytest.raises(ConfigError, match="rotate differently"):
        from_hf_config(both)


@pytest.mark.parametrize(
    ("values", "changes"),
    [
        (FOUR, {"model_type": "qwen2"}),
        (FOUR, {"model_type": "mixtral"}),
        (FOUR, {"model_type": ["llama"]}),
        (FOUR, {"architectures": ["LlamaForSequenceClassification"]}),
        (QWEN3, {"model_type": "qwen3_moe", "architectures": ["Qwen3MoeForCausalLM"]}),
        (QWEN2, {"model_type": "qwen2_5_vl"}),
        (FOUR, {"attention_bias": True}),
        (QWEN3, {"attention_bias": True}),
        (FOUR, {"mlp_bias": True}),
        (QWEN2, {"mlp_bias": True}),
        (FOUR, {"hidden_act": "gelu"}),
        (FOUR, {"attention_dropout": 0.1}),
        (FOUR, {"quantization_config": {"bits": 4}}),
        (FOUR, {"num_local_experts": 8}),
        (QWEN3, {"num_experts": 128}),
        (QWEN2, {"use_mrope": True}),
        (QWEN2, {"dual_chunk_attention_config": {"chunk_size": 262144}}),
        (QWEN2, {"sliding_window": 512, "use_sliding_window": True}),
        (QWEN3, {"sliding_window": 512, "use_sliding_window": True}),
        (FOUR, {"sliding_window": 512}),
        (QWEN3, {"layer_types": ["full_attention"] * 15 + ["sliding_attention"]}),
        (QWEN3, {"layer_types": ["full_attention"] * 3}),
        (FOUR, {"partial_rotary_factor": 0.5}),
        (FOUR, {"original_max_position_embeddings": 4096}),
        (FOUR, {"hidden_size": None}),
        (FOUR, {"hidden_size": 2050}),
        (QWEN2, {"hidden_size": 2050, "head_dim": None}),
        (QWEN3, {"head_dim": 63}),
        (FOUR, {"num_key_value_heads": 5}),
        (FOUR, {"num_key_value_heads": 0}),
        (FOUR, {"rope_theta": 0}),
        (FOUR, {"tie_word_embeddings": "perhaps"}),
        (FOUR, {"vocab_size": -1}),
        (FOUR, {"num_attention_heads": 0}),
    ],
    ids=lambda part: part.get("model_type", "?") if "vocab_size" in part and len(part) > 3 else next(iter(part)),
)
def test_what_cannot_be_trained_is_refused(values, changes):
    from_hf_config(values)
    ours = {
        "hidden_size": "hidden", "num_key_value_heads": "kv_groups", "tie_word_embeddings": "tied_embeddings",
        "vocab_size": "vocabulary", "num_attention_heads": "heads", "head_dim": "head dimension",
    }  # fmt: skip
    key = next(iter(changes))
    with pytest.raises(ConfigError, match=f"^config.json: .*({key}|{ours.get(key, key)})"):
        from_hf_config({**values, **changes})
