"""A forward pass of a model that is never whole in memory: each tensor comes when its module runs and goes after it.

The model is built with empty parameters (on torch's "meta" device) and real buffers, such as RoPE tables. So a pass
needs the memory of the largest tensor, the embedding, and not of all of them.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING

from megatron_octo.checkpoint.tensors import BLOCK_BYTES, Shape, TensorSource, row_blocks

if TYPE_CHECKING:
    from torch import Tensor
    from torch.nn import Module


@contextmanager
def empty_parameters() -> Iterator[None]:
    """Modules built inside have parameters without memory; everything else they make is real."""
    from accelerate import init_empty_weights

    with init_empty_weights(include_buffers=False):
        yield


def needed_shapes(model: Module, names: Mapping[str, str]) -> dict[str, Shape]:
    """Shape of every tensor a model is loaded from, by the name it has in its source.

    Args:
        model: built, on any device.
        names: name of each parameter in the source, by its name in the model; tied ones share a name.
    """
    return {stored: tuple(model.get_parameter(name).shape) for name, stored in names.items()}


@contextmanager
def streaming(
    model: Module, names: Mapping[str, str], source: TensorSource, device: str, kept: Collection[str] = ()
) -> Iterator[None]:
    """Let a model built with empty parameters run, in fp32, with each weight in memory while its module runs.

    Args:
        model: built within `empty_parameters`.
        names: name of each parameter in the source, by its name in the model; tied ones share a name.
        source: where weights come from; must hold every name with its parameter's shape.
        device: where the model computes.
        kept: parameters that stay for the whole pass, because other modules use them too.
    """
    by_module: dict[Module, dict[str, str]] = defaultdict(dict)
    for name, stored in names.items():
        owner = model if name in kept else model.get_submodule(name.rpartition(".")[0])
        by_module[owner][name] = stored
    with ExitStack() as hooks:
        for module, own in by_module.items():
            hooks.enter_context(_loaded_while_running(module, model, own, source, device))
        yield


@contextmanager
def _loaded_while_running(
    module: Module, model: Module, names: Mapping[str, str], source: TensorSource, device: str
) -> Iterator[None]:
    """Fill the named parameters of a model before one of its modules runs, and empty them after it."""
    import torch

    places = [(*_place(model, name), stored) for name, stored in names.items()]
    empty = [owner._parameters[attribute] for owner, attribute, _ in places]

    def fill(*_: object) -> None:
        for owner, attribute, stored in places:
            values = _read_float(source, stored).to(device)
            owner._parameters[attribute] = torch.nn.Parameter(values, requires_grad=False)

    def drop(*_: object) -> None:
        for (owner, attribute, _), parameter in zip(places, empty, strict=True):
            owner._parameters[attribute] = parameter

    before, after = module.register_forward_pre_hook(fill, prepend=True), module.register_forward_hook(drop)
    try:
        yield
    finally:
        before.remove()
        after.remove()


def _place(model: Module, name: str) -> tuple[Module, str]:
    """The module that owns a parameter, and its name there."""
    owner, _, attribute = name.rpartition(".")
    return model.get_submodule(owner), attribute


def _read_float(source: TensorSource, name: str) -> Tensor:
    """A whole tensor in fp32; of its stored form no more than a block is held."""
    import torch

    shape, dtype = source.shapes()[name], getattr(torch, source.dtype(name))
    values = torch.empty(shape)
    for start, rows in row_blocks(shape, dtype.itemsize, BLOCK_BYTES // 4):
        block = values[start : start + rows]
        if dtype == torch.float32:
            source.fill(name, start, block)
        else:
            stored = torch.empty(block.shape, dtype=dtype)
            source.fill(name, start, stored)
            block.copy_(stored)
    return values
