"""One rank that sets up real runs, one after another, and writes down what it holds of each.

Started by `launch` as `python -m bytes_worker RUN.yaml CASES.json OUT_DIR`; CASES maps a name to overrides.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path

import torch

import megatron_octo.train.loop  # noqa: F401  # first: it imports megatron-core the quick way
from megatron_octo.runtime import groups
from megatron_octo.train.api import load_run
from megatron_octo.train.setup import set_up
from megatron_octo.train.state import TrainState


def main() -> None:
    file, cases, out = sys.argv[1:]
    for name, overrides in json.loads(Path(cases).read_text()).items():
        run = load_run(Path(file), [*overrides, f"out={out}/{name}"])
        runtime = groups.initialize(run.parallel, run.seed, timeout_minutes=1)
        _, state = set_up(run, runtime)
        for chunk in state.chunks:
            chunk.zero_grad_buffer()
        state.optimizer.step()  # makes the moments
        (Path(out) / f"{name}-{runtime.rank}.json").write_text(
            json.dumps(held(state) | {"stage": runtime.pipeline_rank})
        )
        groups.shutdown(keep_world=True)
    torch.distributed.destroy_process_group()


def held(state: TrainState) -> dict[str, int]:
    """Parameters, and bytes of weights, gradient buffers and optimizer."""
    weights = [weight for model in state.models for weight in model.parameters()]
    buffers = [buffer for chunk in state.chunks for buffer in (*chunk.buffers, *chunk.expert_parallel_buffers)]
    return {
        "parameters": sum(weight.numel() for weight in weights),
        "weights": sum(weight.nbytes for weight in weights),
        "gradients": sum(buffer.grad_data.nbytes for buffer in buffers),
        "optimizer": sum(tensor.nbytes for tensor in kept(state, {weight.data_ptr() for weight in weights})),
    }


def kept(state: TrainState, weights: set[int]) -> Iterator[torch.Tensor]:
    """What the optimizer keeps: main weights where they are not the model's own, and both moments."""
    for one in state.optimizer.chained_optimizers:
        for group in one.optimizer.param_groups:
            for main in group["params"]:
                if main.dtype == torch.float32 and state.run.dtype == "bf16":
                    yield main
                yield from (value for key, value in one.optimizer.state[main].items() if key != "step")


if __name__ == "__main__":
    main()
