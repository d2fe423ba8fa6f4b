"""A tiny Llama as a Hugging Face directory and as a checkpoint, written in milliseconds, for the tools' tests."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from megatron_octo.checkpoint.dist_write import write_model
from megatron_octo.config.model import ModelConfig
from megatron_octo.convert.megatron_io import geometry
from megatron_octo.convert.tables import source_shapes, table_of
from megatron_octo.convert.views import AsMegatron

MODEL = ModelConfig(
    layers=2, hidden=16, heads=4, kv_groups=2, ffn=24, vocabulary=40, tied_embeddings=True, max_positions=64
)  # Megatron pads the vocabulary to 128
CONFIG = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "num_hidden_layers": 2, "hidden_size": 16,
    "num_attention_heads": 4, "num_key_value_heads": 2, "intermediate_size": 24, "vocab_size": 40,
    "tie_word_embeddings": True, "rms_norm_eps": 1e-5, "rope_theta": 500000.0, "max_position_embeddings": 64,
}  # fmt: skip


class Held:
    """Tensors in memory as a source."""

    where = "memory"

    def __init__(self, tensors: dict[str, torch.Tensor]) -> None:
        self.tensors = tensors

    def shapes(self) -> dict[str, tuple[int, ...]]:
        return {name: tuple(tensor.shape) for name, tensor in self.tensors.items()}

    def dtype(self, name: str) -> str:
        return str(self.tensors[name].dtype).removeprefix("torch.")

    def fill(self, name: str, start: int, out: torch.Tensor) -> None:
        out.copy_(self.tensors[name][start : start + len(out)])


def tensors_of(seed: int = 0, model: ModelConfig = MODEL) -> dict[str, torch.Tensor]:
    """Random weights under Hugging Face names."""
    generator = torch.Generator().manual_seed(seed)
    shapes = source_shapes(table_of(model.family), geometry(model))
    return {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}


def write_directory(directory: Path, tensors: dict[str, torch.Tensor] | None = None, **changes: Any) -> Path:
    """A Hugging Face directory without a tokenizer."""
    directory.mkdir(parents=True)
    (directory / "config.json").write_text(json.dumps({**CONFIG, **changes}))
    save_file(tensors or tensors_of(), directory / "model.safetensors")
    return directory


def write_checkpoint(
    directory: Path,
    tensors: dict[str, torch.Tensor] | None = None,
    model: ModelConfig = MODEL,
    dropped: str | None = None,
    extras: Callable[[Path], None] | None = None,
    **facts: Any,
) -> Path:
    """A sealed checkpoint of tensors under Hugging Face names, one of Megatron's left out if asked for."""
    view = AsMegatron(table_of(model.family), geometry(model), Held(tensors or tensors_of(model=model)))
    held = {name: torch.empty(shape, dtype=getattr(torch, view.dtype(name))) for name, shape in view.shapes().items()}
    for name, tensor in held.items():
        view.fill(name, 0, tensor)
    held.pop(dropped or "", None)
    directory.parent.mkdir(parents=True, exist_ok=True)
    said = {"model": model.model_dump(mode="json"), "tokens": 70, **facts}
    write_model(directory, Held(held), said, {"test": str(directory)}, extras=extras)
    return directory
