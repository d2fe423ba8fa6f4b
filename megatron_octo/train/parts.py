"""The parts of a model by name, whatever chunk and stage they are on."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

LAYER_PARTS = {
    "input_norm": "input_layernorm",
    "attention": "self_attention",
    "mlp_norm": "pre_mlp_layernorm",
    "mlp": "mlp",
}
"""Our name of a part of a layer -> megatron-core's."""


def parts(models: list[Any]) -> Iterator[tuple[str, torch.nn.Module]]:
    """The parts that this rank holds, in the order data runs through them.

    Args:
        models: unwrapped chunks (`TrainState.models`).

    Yields:
        Name and module: `embedding`; for layer n of the whole model, from 0, `layers.n`, `layers.n.input_norm`,
        `layers.n.attention`, `layers.n.mlp_norm`, `layers.n.mlp`; `final_norm`; `output`.
    """
    for model in models:
        if model.pre_process:
            yield "embedding", model.embedding
        for layer in model.decoder.layers:
            name = layer_name(layer)
            yield name, layer
            for part, attribute in LAYER_PARTS.items():
                yield f"{name}.{part}", getattr(layer, attribute)
        if model.post_process:
            yield "final_norm", model.decoder.final_layernorm
            yield "output", model.output_layer


def layer_name(layer: Any) -> str:
    """`layers.n`, n the place of a layer in the whole model, from 0."""
    return f"layers.{layer.layer_number - 1}"


def first_tensor(output: Any) -> torch.Tensor:
    """What a part hands on: its output, or the first item of it (megatron-core returns biases beside)."""
    return output[0] if isinstance(output, tuple) else output
