"""The CPU twin: the one place where megatron-core 0.16.1 is changed so that it runs without CUDA.

Every change is a row of the tables below with its reason. A patched call raises on a CPU-only torch
without its patch, so a program that already runs is not altered. The exceptions, each stated in its
row: seeding (a silent no-op before), `Tensor.type()` (answered differently to megatron-core's optimizer
only) and what torch's AdamW needs in the distributed optimizer (`runtime.adam`), whose saving and resuming is broken
or silently wrong without it.
"""

from __future__ import annotations

import functools
import logging
import sys
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch.utils._device import _device_constructors

from megatron_octo.runtime.adam import RESUME
from megatron_octo.runtime.patches import Patch, apply
from megatron_octo.runtime.quick_import import import_megatron

_CPU = torch.device("cpu")
_OPTIMIZER = "megatron.core.optimizer"
_RANDOM = "megatron.core.tensor_parallel.random"


def _on_cpu(factory: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    """Build tensors in main memory where CUDA or pinned memory is asked for."""

    @functools.wraps(factory)
    def build(*arguments: Any, **options: Any) -> torch.Tensor:
        if options:
            if options.get("device") == "cuda":
                options["device"] = _CPU
            if options.get("pin_memory"):
                options["pin_memory"] = False
        return factory(*arguments, **options)

    return build


def _stay(_: Any) -> Callable[..., torch.Tensor]:
    return lambda tensor, *_arguments, **_options: tensor


def _answer(value: Any) -> Callable[[Any], Callable[..., Any]]:
    return lambda _original: lambda *_arguments, **_options: value


def _cuda_type_name(original: Callable[..., Any]) -> Callable[..., Any]:
    """Tell megatron-core's optimizer the type name of the CUDA tensor this one stands for."""

    @functools.wraps(original)
    def type_name(tensor: torch.Tensor, *arguments: Any, **options: Any) -> Any:
        answer = original(tensor, *arguments, **options)
        if isinstance(answer, str) and sys._getframe(1).f_globals.get("__name__", "").startswith(_OPTIMIZER):
            return answer.replace("torch.", "torch.cuda.", 1)
        return answer

    return type_name


def _get_state(_: Any) -> Callable[..., torch.Tensor]:
    return lambda *_arguments, **_options: torch.get_rng_state()


def _set_state(_: Any) -> Callable[..., None]:
    return lambda state, *_arguments, **_options: torch.set_rng_state(state)


def _seed(_: Any) -> Callable[..., Any]:
    return lambda seed: torch.default_generator.manual_seed(int(seed))


_DEVICE = (
    Patch(
        "torch.cuda",
        "current_device",
        _answer(_CPU),
        "raises; the device of pipeline messages, tensor-parallel buffers, rotary angles and gradient buffers",
    ),
    Patch(
        "torch.cuda", "synchronize", _answer(None), "raises; called after pipeline messages and in checkpoint saving"
    ),
    Patch(
        "torch",
        "tensor",
        _on_cpu,
        "device='cuda' raises in clip_grads, optimizer and utils; pin_memory=True in rope_utils (context parallelism)",
    ),
    Patch("torch", "zeros", _on_cpu, "device='cuda' raises in the schedules' token count and in clip_grads"),
    Patch("torch", "ones", _on_cpu, "device='cuda' raises in transformer/utils (causal mask)"),
    Patch("torch", "empty", _on_cpu, "device='cuda' raises in dist_checkpointing/exchange_utils"),
    Patch("torch", "empty_like", _on_cpu, "device='cuda' raises in dist_checkpointing/exchange_utils"),
    Patch(
        "torch:Tensor",
        "cuda",
        _stay,
        "raises; called by tied embeddings, rope_utils, grad scaler and dist_checkpointing/exchange_utils",
    ),
    Patch(
        "torch:Tensor",
        "type",
        _cuda_type_name,
        "does not raise itself; megatron-core's optimizer compares the answer with 'torch.cuda.FloatTensor' and "
        "raises on any other, so modules under megatron.core.optimizer, and only they, are told the CUDA name",
    ),
)

_RNG = (
    Patch("torch.cuda", "get_rng_state", _get_state, "raises; CudaRNGStatesTracker.add reads it"),
    Patch("torch.cuda.random", "get_rng_state", _get_state, "raises; tensor_parallel.random reads it here"),
    Patch(
        "torch.cuda",
        "manual_seed",
        _seed,
        "silent no-op without CUDA; model_parallel_cuda_manual_seed would store the same state under every name",
    ),
    Patch(_RANDOM, "_get_cuda_rng_state", _get_state, "raises; megatron-core's own reader of the generator"),
    Patch(
        _RANDOM,
        "_set_cuda_rng_state",
        _set_state,
        "queues a callback that never runs without CUDA; the tracker's states would not be restored",
    ),
)

PATCHES: tuple[Patch, ...] = _DEVICE + _RNG + RESUME
"""Everything `install` changes."""

_EXPECTED_WARNINGS = (
    r".*(Apex|Transformer Engine).*not installed",
    r"full scope is deprecated",
    r"Warning: tp_group is None",
    r".*torch\.distributed\.(reduce_scatter_tensor|all_gather_into_tensor)` is deprecated",
)
"""What megatron-core says on every CPU machine and nobody can act on."""


def install() -> bool:
    """Make megatron-core run on this machine if it has no CUDA device.

    Call it before megatron-core is used; calling it again does nothing.

    Returns:
        True if the patches are in place (now or from an earlier call); False where CUDA is present,
        in which case nothing was touched.
    """
    if torch.cuda.is_available():
        return False
    _install()
    return True


@functools.cache
def _install() -> None:
    # torch lists its tensor factories when `torch.device(...)` is first used as a context, and keeps the list. It
    # must list the originals: wrappers hide them, the context no longer reaches them, and transformers, which
    # builds models on "meta", loads them with uninitialised RoPE frequencies and no error.
    _device_constructors()
    for message in _EXPECTED_WARNINGS:
        warnings.filterwarnings("ignore", message=message)
    import_megatron()
    apply(PATCHES)
    # The tracker's context sees the CPU generator move, which is what standing in for CUDA's means.
    logging.getLogger(_RANDOM).addFilter(lambda record: "CPU RNG state changed" not in record.getMessage())


def describe() -> str:
    """The table of patches as text: a line each, what is replaced and why."""
    return "\n".join(f"{patch.target.replace(':', '.')}.{patch.name}: {patch.reason}" for patch in PATCHES)
