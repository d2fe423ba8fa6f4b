"""Logits of one model from both sides: Megatron's forward pass of a checkpoint, transformers' of a directory.

Both run in fp32, whatever the weights' dtype, one after the other: so rounding in matrix products hides no
fault and one model at a time is in memory. Dimensions: b batch (always 1), s sequence, v vocabulary.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megatron_octo.config.run import ModelConfig, ParallelConfig
from megatron_octo.convert.walk import TensorSource
from megatron_octo.errors import CheckpointError, DataError

if TYPE_CHECKING:
    import torch
    from torch import Tensor

SHORT_LENGTHS = (1, 7, 33, 128)
"""Prompt lengths every model is probed with."""
POSITIONS_COMPARED = 32
"""Last positions of each prompt whose logits are compared."""

_LONGEST = 2048
_LONG_COST = 2e12
"""Floating-point operations the long prompt may cost: 2048 tokens up to 0.5B parameters, 125 at 8B."""


@dataclass(frozen=True, slots=True)
class Outputs:
    """What one side says: logits `[positions compared, v]` of each prompt, and its RoPE frequencies `[dim / 2]`."""

    logits: list[Tensor]
    frequencies: Tensor


def probe_lengths(model: ModelConfig) -> list[int]:
    """Lengths of the prompts a model is probed with; the last is as long as is cheap."""
    from megatron_octo.model.facts import parameter_count

    affordable = int(_LONG_COST / (2 * parameter_count(model)))
    long = min(_LONGEST, max(affordable, SHORT_LENGTHS[-1]))
    return sorted({min(length, model.max_positions) for length in (*SHORT_LENGTHS, long)})


def probe_prompts(model: ModelConfig, lengths: list[int]) -> list[list[int]]:
    """Prompts of the given lengths: token ids drawn with a fixed seed, so that anyone can draw them again."""
    draw = random.Random(20506)
    return [[draw.randrange(model.vocabulary) for _ in range(length)] for length in lengths]


@contextmanager
def single_process() -> Iterator[None]:
    """A Megatron world of one process; one that exists already is used and left alone."""
    from megatron.core import parallel_state

    from megatron_octo.runtime.groups import initialize_single, shutdown

    if parallel_state.model_parallel_is_initialized():
        yield
        return
    initialize_single(seed=0)
    try:
        yield
    finally:
        shutdown()


def megatron_outputs(model: ModelConfig, weights: TensorSource, prompts: list[list[int]]) -> Outputs:
    """Run Megatron's forward pass on a checkpoint's own tensors.

    Args:
        model: the architecture.
        weights: the checkpoint; must hold exactly the model's tensors.
        prompts: token ids.

    Raises:
        CheckpointError: a parameter of the model is not in the checkpoint, or has another shape.
    """
    import torch

    from megatron_octo.model.build import build_gpt

    with single_process(), torch.no_grad():
        gpt = build_gpt(model, ParallelConfig(), "fp32", pre_process=True, post_process=True, seed=None).eval()
        load_parameters(gpt, weights)
        device = next(gpt.parameters()).device
        logits = []
        for prompt in prompts:
            tokens = torch.tensor([prompt], device=device)
            positions = torch.arange(len(prompt), device=device)[None]
            logits.append(_last(gpt(tokens, positions, None), model.vocabulary))
        return Outputs(logits, gpt.rotary_pos_emb.inv_freq.detach().float().cpu())


def load_parameters(gpt: Any, weights: TensorSource) -> None:
    """Copy a checkpoint into a whole model, tensor by tensor, by the keys megatron-core would save them under.

    Raises:
        CheckpointError: a parameter is not in the checkpoint, or has another shape.
    """
    from megatron.core.dist_checkpointing.mapping import ShardedTensor, ShardedTensorFactory

    stored = weights.shapes()
    for item in gpt.sharded_state_dict(metadata={"non_homogeneous_layers": True}).values():
        if not isinstance(item, ShardedTensor | ShardedTensorFactory):
            continue
        if tuple(item.data.shape) != stored.get(item.key):
            has = f"has shape {list(stored[item.key])}" if item.key in stored else "is missing"
            raise CheckpointError(f"{weights.where}: {item.key} {has}, the model needs {list(item.data.shape)}")
        item.data.copy_(weights.read(item.key))


def transformers_outputs(directory: Path, model: ModelConfig, prompts: list[list[int]]) -> Outputs:
    """Run transformers on a directory, as RL and evaluation will load it, but in fp32.

    Args:
        directory: a Hugging Face model directory.
        model: the architecture, for the width of the vocabulary.
        prompts: token ids.

    Raises:
        DataError: transformers cannot load the directory.
    """
    import torch
    from transformers import AutoModelForCausalLM

    device = "cuda" if torch.cuda.is_available() else "cpu"
    safe = {"local_files_only": True, "trust_remote_code": False, "use_safetensors": True}
    try:
        with _quiet():
            loaded = AutoModelForCausalLM.from_pretrained(str(directory), dtype=torch.float32, **safe).eval().to(device)
    except Exception as error:  # noqa: BLE001 - whatever a faulty directory makes transformers raise
        raise DataError(f"{directory}: transformers cannot load it ({' '.join(str(error).split())[:300]})") from None
    with torch.no_grad():
        outputs = (loaded(torch.tensor([prompt], device=device), use_cache=False).logits for prompt in prompts)
        logits = [_last(output, model.vocabulary) for output in outputs]
    return Outputs(logits, loaded.model.rotary_emb.inv_freq.detach().float().cpu())


@contextmanager
def _quiet() -> Iterator[None]:
    """No bars of transformers between ours."""
    from transformers.utils import logging

    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()


def _last(logits: torch.Tensor, vocabulary: int) -> Tensor:
    """[1, s, v or padded v] -> the last positions' [positions, v] in fp32 on CPU."""
    return logits[0, -POSITIONS_COMPARED:, :vocabulary].float().cpu()
