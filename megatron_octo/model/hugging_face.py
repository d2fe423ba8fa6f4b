"""Hugging Face's config.json <-> ModelConfig, in the spellings of transformers 4 and 5.

transformers 4 writes `rope_theta`, `rope_scaling` and `torch_dtype`; transformers 5 writes
`rope_parameters` (theta inside) and `dtype`. Both are read; both are written, and each version ignores
what it does not know. What megatron-core 0.16.1 cannot express is refused, never dropped.
"""

from __future__ import annotations

import reprlib
from dataclasses import dataclass
from typing import Any

from megatron_octo.config.load import parse_config
from megatron_octo.config.model import ModelConfig
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
    "num_experts": (None,),
    "num_local_experts": (None,),
    "use_mrope": (False, None),
    "partial_rotary_factor": (1.0, None),
    "original_max_position_embeddings": (None, 8192),
    "dual_chunk_attention_config": (None,),
}
_LLAMA3 = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}


@dataclass(frozen=True)
class _Family:
    """What is particular about one family's config.json.

    Args:
        architecture: transformers' class of the causal language model.
        absent: what transformers takes for a key that is not there, where the families differ.
        written: keys of this family alone, with the one value they can have here.
        ignored: keys of `_MUST_BE` that transformers does not read in this family.
    """

    architecture: str
    absent: dict[str, Any]
    written: dict[str, Any]
    ignored: tuple[str, ...] = ()


_NO_WINDOW = {"use_sliding_window": False, "sliding_window": None}
_QWEN = {"num_key_value_heads": 32, "max_position_embeddings": 32768, "sliding_window": 4096}
_FAMILIES = {
    "llama": _Family(
        "LlamaForCausalLM", {"max_position_embeddings": 2048}, {"attention_bias": False, "mlp_bias": False}
    ),
    "qwen2": _Family("Qwen2ForCausalLM", _QWEN, _NO_WINDOW, ignored=("attention_bias",)),
    "qwen3": _Family("Qwen3ForCausalLM", {**_QWEN, "head_dim": 128}, {"attention_bias": False, **_NO_WINDOW}),
}


def from_hf_config(values: dict[str, Any]) -> ModelConfig:
    """Read the config.json of a Llama, Qwen2 (also Qwen2.5) or Qwen3.

    Args:
        values: its content. Keys it leaves out have the defaults of the family's class in transformers.

    Returns:
        The model.

    Raises:
        ConfigError: another architecture, a missing size, or a setting that cannot be trained faithfully.
    """
    family = _check_family(values)
    values = {**family.absent, **values}
    _check_settings(values, family)
    missing = [key for key in _REQUIRED.values() if values.get(key) is None]
    if missing:
        raise ConfigError(f"{_WHERE}: key '{missing[0]}' is missing", "the model's sizes are needed", "add it")
    sizes = {name: values[key] for name, key in _REQUIRED.items()}
    groups = values.get("num_key_value_heads")
    model = parse_config(
        ModelConfig,
        {
            "family": values["model_type"],
            **sizes,
            **_read_rope(values),
            "kv_groups": sizes["heads"] if groups is None else groups,
            "head_dim": values.get("head_dim"),
            "tied_embeddings": values.get("tie_word_embeddings") or False,
            "norm_epsilon": values.get("rms_norm_eps", 1e-6),
            "init_std": values.get("initializer_range", 0.02),
            "max_positions": values["max_position_embeddings"],
        },
        _WHERE,
    )
    _check_windows(values, model)
    return model


def to_hf_config(
    model: ModelConfig,
    dtype: str,
    *,
    bos: int | None = None,
    eos: int | list[int] | None = None,
    pad: int | None = None,
) -> dict[str, Any]:
    """Write a config.json that transformers 4 and 5, vLLM and OpenRLHF read.

    Args:
        model: the model.
        dtype: of the saved tensors, in torch's words: "float32", "bfloat16" or "float16".
        bos: id of the token that begins a text, if there is one.
        eos: id of the token that ends a document, or several that do.
        pad: id used to fill batches.

    Returns:
        Plain values, ready for json.
    """
    family = _FAMILIES[model.family]
    scaling = None
    if model.rope_scaling is not None:
        scaling = {"rope_type": "llama3", **model.rope_scaling.model_dump()}
    return {
        "architectures": [family.architecture],
        "model_type": model.family,
        **{key: getattr(model, name) for name, key in _REQUIRED.items()},
        "num_key_value_heads": model.kv_groups,
        "head_dim": model.dim,
        "hidden_act": "silu",
        **family.written,
        "attention_dropout": 0.0,
        "rms_norm_eps": model.norm_epsilon,
        "initializer_range": model.init_std,
        "max_position_embeddings": model.max_positions,
        "tie_word_embeddings": model.tied_embeddings,
        "rope_theta": model.rope_theta,
        "rope_scaling": scaling,
        "rope_parameters": {**(scaling or {"rope_type": "default"}), "rope_theta": model.rope_theta},
        "torch_dtype": dtype,
        "dtype": dtype,
        "bos_token_id": bos,
        "eos_token_id": eos,
        "pad_token_id": pad,
        "use_cache": True,
    }


def _refuse(key: str, value: Any, rule: str, fix: str = "convert a model without it") -> ConfigError:
    return ConfigError(f"{_WHERE}: {key} = {reprlib.repr(value)}", rule, fix)


def _check_family(values: dict[str, Any]) -> _Family:
    kind = values.get("model_type")
    family = _FAMILIES.get(kind) if isinstance(kind, str) else None
    architectures = values.get("architectures") or [family and family.architecture]
    if family is None or architectures != [family.architecture]:
        known = ", ".join(each.architecture for each in _FAMILIES.values())
        raise ConfigError(
            f"{_WHERE}: model_type = {kind!r}, architectures = {architectures!r}",
            f"only {known} can be converted",
            "start from one of these, e.g. meta-llama/Llama-3.2-1B or Qwen/Qwen2.5-1.5B",
        )
    return family


def _check_settings(values: dict[str, Any], family: _Family) -> None:
    for key, allowed in _MUST_BE.items():
        if key not in family.ignored and values.get(key, allowed[0]) not in allowed:
            raise _refuse(key, values[key], f"only {allowed[0]!r} can be trained faithfully here")


def _check_windows(values: dict[str, Any], model: ModelConfig) -> None:
    """Every layer must see the whole text. Qwen's files state a window that their switch leaves unused."""
    kinds, window = values.get("layer_types"), values.get("sliding_window")
    if kinds not in (None, ["full_attention"] * model.layers):
        raise _refuse("layer_types", kinds, f"each of the {model.layers} layers has 'full_attention' here")
    if window is not None and values.get("use_sliding_window", model.family == "llama"):
        raise _refuse("sliding_window", window, "every layer has full attention here")


def _read_rope(values: dict[str, Any]) -> dict[str, Any]:
    stated = {key: values[key] for key in ("rope_parameters", "rope_scaling") if values.get(key)}
    read = [_one_rope(key, rope, values.get("rope_theta")) for key, rope in stated.items()]
    if len(read) == 2 and read[0] != read[1]:
        raise _refuse(
            "rope_parameters", values["rope_parameters"], f"rope_scaling = {values['rope_scaling']!r} says otherwise",
            "remove the wrong one: transformers 4 and 5 would rotate differently",
        )  # fmt: skip
    return read[0] if read else _one_rope("rope_parameters", {}, values.get("rope_theta"))


def _one_rope(spelling: str, rope: Any, outer_theta: float | None) -> dict[str, Any]:
    """What `rope_parameters` or `rope_scaling` says, as fields of ModelConfig; theta may stand outside of it."""
    if not isinstance(rope, dict):
        raise _refuse(spelling, rope, "it is a mapping of RoPE settings")
    kind, *others = [rope[key] for key in ("rope_type", "type") if rope.get(key) is not None] or ["default"]
    if kind not in ("default", "llama3") or others not in ([], [kind]):
        known = "megatron-core 0.16.1 as used here knows 'default' and 'llama3'"
        raise _refuse("rope type", " and ".join(map(str, (kind, *others))), known, "convert a model with one of these")
    theta = next(value for value in (rope.get("rope_theta"), outer_theta, 10_000.0) if value is not None)
    if outer_theta not in (None, theta):
        raise _refuse("rope_theta", outer_theta, f"{spelling} says {theta!r}", "remove the wrong one")
    scaling = {key: value for key, value in rope.items() if key not in ("rope_type", "type", "rope_theta")}
    if scaling.pop("partial_rotary_factor", None) not in (1.0, None):
        raise _refuse("partial_rotary_factor", rope["partial_rotary_factor"], "the whole of a head is rotated here")
    factor = None
    if kind == "llama3":
        factor = {"factor": scaling.pop("factor", None)}
        for key, fixed in _LLAMA3.items():
            if scaling.pop(key, None) != fixed:
                raise _refuse(
                    f"rope {key}", rope.get(key),
                    f"megatron-core 0.16.1 fixes it at {fixed}: other values would be rotated wrongly",
                    "only the factor may differ from Llama 3's",
                )  # fmt: skip
    unknown = [key for key, value in scaling.items() if value is not None]
    if unknown:
        raise _refuse(f"rope {unknown[0]}", rope[unknown[0]], f"RoPE of type {kind!r} has no such setting here")
    return {"rope_theta": theta, "rope_scaling": factor}
