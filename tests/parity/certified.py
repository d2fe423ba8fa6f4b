"""Tiny models of every kind as checkpoint and as certified directory, for the tests of certificates."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from convert_models import write_hf, write_tokenizer
from safetensors.torch import load_file, save_file

from megatron_octo.checkpoint.tensors import Shape, read
from megatron_octo.config.model import ModelConfig
from megatron_octo.convert.certificate import certify, write_certificate
from megatron_octo.convert.hf_io import read_model, tokenizer_facts, write_configuration
from megatron_octo.convert.megatron_io import geometry
from megatron_octo.convert.safetensors_io import SafetensorsDirectory
from megatron_octo.convert.tables import table_of
from megatron_octo.convert.views import AsMegatron

KINDS: dict[str, dict[str, Any]] = {
    "tied": {},
    "untied": {"tie_word_embeddings": False, "num_key_value_heads": 8},
    "bf16": {"dtype": torch.bfloat16, "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0}},
    "qwen2": {"family": "qwen2"},
    "qwen3": {"family": "qwen3"},
}


class Memory:
    """Tensors in memory as a source."""

    where = "checkpoint"

    def __init__(self, tensors: Mapping[str, torch.Tensor]) -> None:
        self.held = dict(tensors)

    def shapes(self) -> dict[str, Shape]:
        return {name: tuple(tensor.shape) for name, tensor in self.held.items()}

    def dtype(self, name: str) -> str:
        return str(self.held[name].dtype).removeprefix("torch.")

    def fill(self, name: str, start: int, out: torch.Tensor) -> None:
        out.copy_(self.held[name][start : start + len(out)])


@dataclass
class MemoryOrigin:
    """What a certificate needs to know of a checkpoint, whose tensors are in memory."""

    model: ModelConfig
    tokenizer: Path | None
    held: Memory
    lineage: dict[str, Any] = field(default_factory=lambda: {"run": "tiny", "tokens": 640, "seal": "0" * 64})

    def tensors(self) -> Memory:
        return self.held


def origin_of(directory: Path, tokenizer: Path | None) -> MemoryOrigin:
    """The checkpoint a model directory would be imported as."""
    model = read_model(directory)
    tensors = AsMegatron(table_of(model.family), geometry(model), SafetensorsDirectory(directory))
    return MemoryOrigin(model, tokenizer, Memory({name: read(tensors, name) for name in tensors.shapes()}))


class World:
    """One model of each kind, made when first asked for."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.tokenizer = write_tokenizer(root / "tokenizer")
        self.origins: dict[str, MemoryOrigin] = {}
        self.certificates: dict[str, dict[str, Any]] = {}

    def make(self, kind: str) -> Path:
        """The certified directory of a kind."""
        directory = self.root / kind
        if kind not in self.origins:
            write_hf(directory, self.tokenizer, **KINDS[kind])
            origin = self.origins[kind] = origin_of(directory, self.tokenizer)
            dtype = SafetensorsDirectory(directory).dtype("model.norm.weight")
            write_configuration(directory, origin.model, dtype, tokenizer_facts(directory))
            self.certificates[kind] = certify(origin, directory, None)
            write_certificate(directory, self.certificates[kind])
        return directory

    def copy(self, kind: str, target: Path) -> Path:
        """A copy of the certified directory, to be damaged."""
        return Path(shutil.copytree(self.make(kind), target))


def change_weights(directory: Path, change: Callable[[dict[str, torch.Tensor]], None]) -> None:
    """Write a directory's weights anew with some of them changed."""
    tensors = load_file(directory / "model.safetensors")
    change(tensors)
    save_file(tensors, directory / "model.safetensors")
