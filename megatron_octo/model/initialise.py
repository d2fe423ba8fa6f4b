"""Initial weights as a pure function of (seed, parameter): the same model in every layout.

Each parameter is drawn whole from a generator of its own, seeded by its global name, and this rank
keeps its tensor-parallel share. So neither the tensor, pipeline nor data-parallel size changes a value.
"""

from __future__ import annotations

import hashlib
import math
import re
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from megatron_octo.config.model import ModelConfig

if TYPE_CHECKING:
    from megatron.core.models.gpt import GPTModel


@dataclass(frozen=True)
class Drawing:
    """How one kind of weight is drawn.

    Args:
        dim: dimension split over tensor-parallel ranks.
        residual: it writes into the residual stream, so its spread is scaled by 1 / sqrt(2 layers)
            (GPT-2's rule, megatron-core's default).
        parts: equal blocks along `dim` that are split one by one (gate and up of SwiGLU are two).
        padded: rows beyond the vocabulary are zero.
    """

    dim: int
    residual: bool = False
    parts: int = 1
    padded: bool = False


DRAWINGS = {
    "embedding.word_embeddings.weight": Drawing(0, padded=True),
    "output_layer.weight": Drawing(0, padded=True),
    "self_attention.linear_qkv.weight": Drawing(0),
    "self_attention.linear_proj.weight": Drawing(1, residual=True),
    "mlp.linear_fc1.weight": Drawing(0, parts=2),
    "mlp.linear_fc2.weight": Drawing(1, residual=True),
}
"""Kinds of weights by the end of their name; norms are not drawn but set to one, and biases to zero."""

_NORM = re.compile(r"(layernorm\.weight|layer_norm_weight)$")
_LAYER = re.compile(r"^decoder\.layers\.(\d+)\.")


def initialise(chunk: GPTModel, model: ModelConfig, seed: int | None) -> None:
    """Set every parameter of a chunk.

    Args:
        chunk: a GPTModel as built on this rank.
        model: its sizes.
        seed: of the weights; None sets all of them to zero.

    Raises:
        ValueError: a parameter that no rule covers.
    """
    group = chunk.pg_collection.tp
    with torch.no_grad():
        for name, weight in chunk.named_parameters():
            if seed is None or name.endswith(".bias"):
                weight.zero_()
            elif _NORM.search(name):
                weight.fill_(1.0)
            else:
                _draw(weight, _global_name(chunk, name), model, seed, (group.rank(), group.size()))


def _global_name(chunk: GPTModel, name: str) -> str:
    """The parameter's name in the whole model: layers counted over all stages, tied output named as embedding."""
    if name == "output_layer.weight" and chunk.share_embeddings_and_output_weights:
        return "embedding.word_embeddings.weight"
    found = _LAYER.match(name)
    if found is None:
        return name
    number = chunk.decoder.layers[int(found[1])].layer_number - 1
    return f"decoder.layers.{number}.{name[found.end() :]}"


def _draw(weight: torch.Tensor, name: str, model: ModelConfig, seed: int, place: tuple[int, int]) -> None:
    drawing = next((rule for end, rule in DRAWINGS.items() if name.endswith(end)), None)
    if drawing is None:
        raise ValueError(f"no rule to initialise the parameter {name}")
    rank, size = place
    shape = list(weight.shape)
    shape[drawing.dim] *= size
    digest = hashlib.sha256(f"{seed}:{name}".encode()).digest()
    generator = torch.Generator(weight.device).manual_seed(int.from_bytes(digest[:8], "big") >> 1)
    std = model.init_std / math.sqrt(2 * model.layers) if drawing.residual else model.init_std
    whole = torch.empty(shape, dtype=torch.float32, device=weight.device).normal_(0.0, std, generator=generator)
    if drawing.padded:
        whole[model.vocabulary :] = 0.0
    parts = whole.chunk(drawing.parts, dim=drawing.dim)
    share = torch.cat([part.chunk(size, dim=drawing.dim)[rank] for part in parts], dim=drawing.dim)
    weight.copy_(share)
    if hasattr(weight, "_high_precision_init_val"):
        # A weight kept in FP8. The optimizer takes its fp32 master from what TransformerEngine remembered of the
        # weight before it was rounded, and at that moment it was not drawn yet.
        weight._high_precision_init_val = share.to(weight.dtype).cpu()
