"""Hugging Face's config.json <-> ModelConfig, in the spellings of transformers 4 and 5.

transformers 4 writes `rope_theta`, `rope_scaling` and `torch_dtype`; transformers 5 writes
`rope_parameters` (theta inside) and `dtype`. Both are read; both are written, and each version ignores
what it does not know. What megatron-core 0.16.1 cannot express is refused, never dropped.
"""

from __future__ import annotations

from typing import Any

from megatron_octo.config.load import parse_config
from megatron_octo.config.run import ModelConfig
from megatron_octo.errors import ConfigError

_WHERE = "config.json"
_REQUIRED = {
    "layers": "num_hidden_layers",
    "hidden": "hidden_size",
    "heads": "num_attention_heads",
    "ffn": "intermediate_size",
    "vocabulary": "vocab_size",
}
_MUST_BE = {
    "hidden_act": ("silu",),
    "attention_bias": (False, None),
    "mlp_bias": (False, None),
    "attention_dropout": (0.0, None),
    "quantization_config": (None,),
}
_LLAMA3 = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
_DTYPES = {"fp32": "float32", "bf16": "bfloat16"}


def from_hf_config(values: dict[str, Any]) -> ModelConfig:
    """Read a Llama's config.json.

    Args:
        values: its content. Keys it leaves out have the defaults of transformers' LlamaConfig.

    Returns:
        The model.

    Raises:
        ConfigError: another architecture, a missing size, or a setting that cannot be trained faithfully.
    """
    _check_family(values)
    missing = [key for key in _REQUIRED.values() if values.get(key) is None]
    if missing:
        raise ConfigError(f"{_WHERE}: key '{missing[0]}' is missing", "the model's sizes are needed", "add it")
    sizes = {name: values[key] for name, key in _REQUIRED.items()}
    rope = _read_rope(values)
    own_dimension = values.get("head_dim")
    derived = sizes["hidden"] // sizes["heads"] if sizes["heads"] else None
    return parse_config(
        ModelConfig,
        {
            **sizes,
            **rope,
            "kv_groups": values.get("num_key_value_heads") or sizes["heads"],
            "head_dim": None if own_dimension == derived else own_dimension,
            "tied_embeddings": bool(values.get("tie_word_embeddings", False)),
            "norm_epsilon": values.get("rms_norm_eps", 1e-6),
            "init_std": values.get("initializer_range", 0.02),
            "max_positions": values.get("max_position_embeddings", 2048),
        },
        _WHERE,
    )


def to_hf_config(
    model: ModelConfig, dtype: str, *, bos: int | None = None, eos: int | None = None, pad: int | None = None
) -> dict[str, Any]:
    """Write a config.json that transformers 4 and 5, vLLM and OpenRLHF read.

    Args:
        model: the model.
        dtype: "fp32" or "bf16", the type of the saved tensors.
        bos: id of the token that begins a text, if there is one.
        eos: id of the token that ends a document.
        pad: id used to fill batches.

    Returns:
        Plain values, ready for json.
    """
    scaling = None
    if model.rope_scaling is not None:
        scaling = {"rope_type": "llama3", **model.rope_scaling.model_dump()}
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        **{key: getattr(model, name) for name, key in _REQUIRED.items()},
        "num_key_value_heads": model.kv_groups,
        "head_dim": model.dim,
        "hidden_act": "silu",
        "attention_bias": False,
        "attention_dropout": 0.0,
        "mlp_bias": False,
        "rms_norm_eps": model.norm_epsilon,
        "initializer_range": model.init_std,
        "max_position_embeddings": model.max_positions,
        "tie_word_embeddings": model.tied_embeddings,
        "rope_theta": model.rope_theta,
        "rope_scaling": scaling,
        "rope_parameters": {**(scaling or {"rope_type": "default"}), "rope_theta": model.rope_theta},
        "torch_dtype": _DTYPES[dtype],
        "dtype": _DTYPES[dtype],
        "bos_token_id": bos,
        "eos_token_id": eos,
        "pad_token_id": pad,
        "use_cache": True,
    }


def _check_family(values: dict[str, Any]) -> None:
    architectures = values.get("architectures") or ["LlamaForCausalLM"]
    if values.get("model_type") != "llama" or architectures != ["LlamaForCausalLM"]:
        raise ConfigError(
            f"{_WHERE}: model_type = {values.get('model_type')!r}, architectures = {architectures!r}",
            "only LlamaForCausalLM can be converted",
            "start from a Llama, e.g. meta-llama/Llama-3.2-1B",
        )
    for key, allowed in _MUST_BE.items():
        if values.get(key, allowed[0]) not in allowed:
            raise ConfigError(
                f"{_WHERE}: {key} = {values[key]!r}",
                f"only {allowed[0]!r} can be trained faithfully here",
                "convert a model without it",
            )


def _read_rope(values: dict[str, Any]) -> dict[str, Any]:
    rope = values.get("rope_parameters") or values.get("rope_scaling") or {}
    theta = rope.get("rope_theta") or values.get("rope_theta") or 10_000.0
    kind = rope.get("rope_type", rope.get("type", "default"))
    for place in (rope, values):
        if place.get("partial_rotary_factor", 1.0) not in (1.0, None):
            raise ConfigError(
                f"{_WHERE}: partial_rotary_factor = {place['partial_rotary_factor']!r}", "Llama rotates all"
            )
    if kind == "default":
        return {"rope_theta": theta}
    if kind != "llama3":
        raise ConfigError(
            f"{_WHERE}: rope type = {kind!r}",
            "megatron-core 0.16.1 as used here knows 'default' and 'llama3'",
            "convert a model with one of these",
        )
    for key, fixed in _LLAMA3.items():
        if rope.get(key) != fixed:
            raise ConfigError(
                f"{_WHERE}: rope {key} = {rope.get(key)!r}",
                f"megatron-core 0.16.1 fixes it at {fixed}: other values would be rotated wrongly",
                "only the factor may differ from Llama 3's",
            )
    return {"rope_theta": theta, "rope_scaling": {"factor": rope.get("factor")}}
