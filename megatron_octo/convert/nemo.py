"""NeMo 2.x's `context`: which of its model classes the weights are for. Written and read without NeMo.

NeMo keeps two files there: `model.yaml` for people and `io.json`, from which it builds objects again. `io.json` is
fiddle's own description of NeMo's Python objects and is not written: NeMo restores weights without it
(`RestoreConfig`), but `llm.export_ckpt` and other commands that build the model from a checkpoint alone need it.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

from megatron_octo.config.model import ModelConfig
from megatron_octo.errors import ConfigError

_GPT = "nemo.collections.llm.gpt.model"
_CLASSES = {
    "llama": ("llama.LlamaModel", "llama.Llama3Config"),
    "qwen2": ("qwen2.Qwen2Model", "qwen2.Qwen2Config"),
    "qwen3": ("qwen3.Qwen3Model", "qwen3.Qwen3Config"),
}
_SCALED = "llama.Llama31Config"


def refuse(model: ModelConfig) -> None:
    """Stop where NeMo has no class for a model.

    Raises:
        ConfigError: names the setting.
    """
    if model.rope_scaling is not None and model.family != "llama":
        raise ConfigError(
            f"layout 'nemo': rope_scaling with family {model.family!r}",
            "NeMo scales RoPE only in its Llama classes",
            "use --layout megatron-bridge",
        )


def write_context(
    folder: Path, architecture: dict[str, Any], model: ModelConfig, dtype: str, assets: str | None
) -> None:
    """Write `model.yaml`.

    Args:
        folder: made if missing.
        architecture: the model in megatron-core's argument names.
        model: the same model.
        dtype: torch's name of the weights' dtype.
        assets: where the tokenizer will lie for good, if it is carried along.
    """
    kind, config = _CLASSES[model.family]
    scaling = model.rope_scaling
    scaled = {}
    if scaling is not None:
        config = _SCALED
        scaled = {
            "scale_factor": scaling.factor,
            "low_freq_factor": scaling.low_freq_factor,
            "high_freq_factor": scaling.high_freq_factor,
            "old_context_len": scaling.original_max_position_embeddings,
        }
    content = {
        "_target_": f"{_GPT}.{kind}",
        "config": {
            "_target_": f"{_GPT}.{config}",
            **architecture,
            **scaled,
            "params_dtype": {"_target_": f"torch.{dtype}", "_call_": False},
            "bf16": dtype == "bfloat16",
            "fp16": dtype == "float16",
        },
    }
    if assets:
        tokenizer = "nemo.collections.common.tokenizers.huggingface.auto_tokenizer.AutoTokenizer"
        content["tokenizer"] = {"_target_": tokenizer, "pretrained_model_name": assets}
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "model.yaml").write_text(yaml.safe_dump(content), encoding="utf-8")
