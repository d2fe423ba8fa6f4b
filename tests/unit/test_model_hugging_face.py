"""config.json in both spellings, and what is refused."""

from __future__ import annotations

import pytest

from megatron_octo.config.run import ModelConfig
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


@pytest.mark.parametrize("values", [FOUR, FIVE], ids=["transformers 4", "transformers 5"])
def test_both_spellings_are_read(values):
    assert from_hf_config(values) == LLAMA_1B


@pytest.mark.parametrize("changes", [{}, {"rope_scaling": None}, {"tied_embeddings": False}, {"head_dim": 128}])
def test_round_trip(changes):
    model = LLAMA_1B.model_copy(update=changes)
    assert from_hf_config(to_hf_config(model, "bf16", eos=1)) == model


@pytest.mark.parametrize("changes", [{}, {"rope_scaling": None}])
def test_transformers_reads_what_is_written(changes):
    from transformers import LlamaConfig

    model = LLAMA_1B.model_copy(update=changes)
    theirs = LlamaConfig(**to_hf_config(model, "fp32", bos=0, eos=1, pad=2))
    assert (theirs.bos_token_id, theirs.eos_token_id, theirs.pad_token_id) == (0, 1, 2)
    assert str(theirs.dtype).removeprefix("torch.") == "float32"
    assert theirs.rope_parameters["rope_theta"] == 500_000.0
    assert theirs.rope_parameters["rope_type"] == ("default" if changes else "llama3")
    assert from_hf_config(theirs.to_dict()) == model


@pytest.mark.parametrize("spelling", ["rope_scaling", "rope_parameters"])
@pytest.mark.parametrize(
    ("key", "value"), [("low_freq_factor", 2.0), ("high_freq_factor", 8.0), ("original_max_position_embeddings", 4096)]
)
def test_scaling_that_megatron_cannot_express_is_refused(spelling, key, value):
    values = {**FOUR, "rope_scaling": None, spelling: {**SCALING, key: value}}
    with pytest.raises(ConfigError, match=key):
        from_hf_config(values)


@pytest.mark.parametrize(
    "changes",
    [
        {"model_type": "qwen2"},
        {"architectures": ["LlamaForSequenceClassification"]},
        {"attention_bias": True},
        {"mlp_bias": True},
        {"hidden_act": "gelu"},
        {"attention_dropout": 0.1},
        {"quantization_config": {"bits": 4}},
        {"rope_scaling": {"type": "linear", "factor": 2.0}},
        {"rope_scaling": {"rope_type": "yarn", "factor": 2.0}},
        {"rope_scaling": {**SCALING, "factor": None}},
        {"partial_rotary_factor": 0.5},
        {"hidden_size": None},
        {"num_key_value_heads": 5},
        {"vocab_size": -1},
        {"num_attention_heads": 0},
    ],
    ids=lambda changes: next(iter(changes)),
)
def test_what_cannot_be_trained_is_refused(changes):
    with pytest.raises(ConfigError, match="config.json"):
        from_hf_config({**FOUR, **changes})
