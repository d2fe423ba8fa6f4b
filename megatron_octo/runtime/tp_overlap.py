"""Buffers of TransformerEngine's overlap of tensor-parallel messages with matrix products.

megatron-core switches the overlap on in the layers; the buffers they then ask for are the trainer's to make.
"""

from __future__ import annotations

from typing import Any

from megatron_octo.config.run import RunConfig
from megatron_octo.errors import EnvironmentProblem


def start(run: RunConfig) -> None:
    """Make the buffers; collective over all ranks, after the process groups and before the first forward pass.

    Raises:
        EnvironmentProblem: the GPUs of a tensor-parallel group cannot reach each other's memory in the way it needs.
    """
    import torch
    from transformer_engine.pytorch import UserBufferQuantizationMode, initialize_ub

    wanted = buffers(run)
    modes = [UserBufferQuantizationMode[name] for name in wanted.pop("modes")]
    try:
        initialize_ub(**wanted, quantization_modes=modes, dtype=torch.bfloat16, bootstrap_backend="nccl")
    except AssertionError as error:
        raise EnvironmentProblem(
            "parallel.tp_comm_overlap cannot run on this machine",
            " ".join(str(error).split())[:300],
            "set UB_SKIPMC=1 in the environment, or remove parallel.tp_comm_overlap",
        ) from error


def buffers(run: RunConfig) -> dict[str, Any]:
    """What TransformerEngine is asked for.

    Returns:
        shape: [s b / CP, h], tokens of a whole micro-batch (not of a rank's share of it) by hidden size;
        tp_size; modes: FP8 where layers run in it, NONE where some run, or may run, in BF16.
    """
    tokens = run.data.sequence_length * run.batch.micro_batch // run.parallel.context
    modes = ["NONE"]
    if run.fp8 is not None:
        in_bf16 = run.fp8.bf16_first_layers + run.fp8.bf16_last_layers > 0 or run.fp8.sentinel is not None
        modes = ["FP8", "NONE"] if in_bf16 else ["FP8"]
    return {"shape": [tokens, run.model.hidden], "tp_size": run.parallel.tensor, "modes": modes}
