"""Tiny checkpoints in each trainer's layout, with or without what only we add, for the tests of exchange with them."""

from __future__ import annotations

from pathlib import Path

import torch

from megatron_octo.checkpoint.dist_write import write_model
from megatron_octo.checkpoint.tensors import read
from megatron_octo.config.model import ModelConfig, RopeScaling
from megatron_octo.convert.layouts import layout_of
from megatron_octo.convert.megatron_io import find_checkpoint, geometry, read_origin
from megatron_octo.convert.tables import megatron_shapes, table_of

SIZES = {"layers": 3, "hidden": 32, "heads": 4, "kv_groups": 2, "head_dim": 16, "ffn": 48, "vocabulary": 130}
MODELS = {
    "llama": ModelConfig(family="llama", **SIZES, rope_scaling=RopeScaling(factor=8.0)),
    "qwen2": ModelConfig(family="qwen2", **SIZES),
    "qwen3": ModelConfig(family="qwen3", **SIZES, tied_embeddings=False),
}
EMBEDDING = "embedding.word_embeddings.weight"


class Numbered:
    """Weights that are all different; rows that pad the vocabulary are zero."""

    where = "numbered weights"

    def __init__(self, model: ModelConfig) -> None:
        self.tensors, first = {}, 0
        for name, shape in megatron_shapes(table_of(model.family), geometry(model)).items():
            count = torch.Size(shape).numel()
            self.tensors[name] = torch.arange(first, first + count, dtype=torch.float32).view(shape)
            first += count
        for name in {EMBEDDING, "output_layer.weight"} & self.tensors.keys():
            self.tensors[name][model.vocabulary :] = 0

    def shapes(self) -> dict[str, tuple[int, ...]]:
        return {name: tuple(tensor.shape) for name, tensor in self.tensors.items()}

    def dtype(self, name: str) -> str:
        return "float32"

    def fill(self, name: str, start: int, out: torch.Tensor) -> None:
        out.copy_(self.tensors[name][start : start + len(out)])


def written(out: Path, model: ModelConfig, layout_name: str, facts: dict[str, object] | None = None) -> Path:
    """A sealed checkpoint in a layout; `facts` are added to its `run.json`."""
    layout, weights = layout_of(layout_name), Numbered(model)
    write_model(
        out,
        weights,
        {"model": model.model_dump(mode="json"), "layout": layout_name, **(facts or {})},
        {"family": model.family},
        places=layout.places(weights.shapes()),
        extras=lambda directory: layout.write(directory, model, "float32"),
        into=layout.into,
        objects=layout.objects(model),
    )
    return out


def foreign(out: Path, model: ModelConfig, layout_name: str) -> Path:
    """As the trainer itself would have left it: without our seal and facts."""
    written(out, model, layout_name)
    for name in ("seal.json", "run.json"):
        (out / name).unlink()
    return out


def same_weights(checkpoint: Path, model: ModelConfig) -> bool:
    """Whether a checkpoint holds the numbered weights of a model."""
    tensors, wanted = read_origin(find_checkpoint(checkpoint)).tensors(), Numbered(model)
    assert tensors.shapes() == wanted.shapes()
    return all(torch.equal(read(tensors, name), wanted.tensors[name]) for name in wanted.tensors)
