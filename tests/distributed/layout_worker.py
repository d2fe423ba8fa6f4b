"""One rank of the layout parity tests: a few real optimizer steps in each of several layouts, one after another.

Started by `launch` as `python -m layout_worker CASES.json OUT_DIR`; the reporting rank writes OUT_DIR/<name>.json.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from megatron.core.distributed import DistributedDataParallel, finalize_model_grads
from megatron.core.optimizer import get_megatron_optimizer
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.transformer.module import Float16Module
from megatron.core.utils import get_batch_on_this_cp_rank

from megatron_octo.config.layout import ParallelConfig
from megatron_octo.config.model import ModelConfig
from megatron_octo.config.run import OptimizerConfig
from megatron_octo.model.build import build_chunks
from megatron_octo.model.translate import ddp_config, optimizer_config
from megatron_octo.runtime.groups import Runtime, initialize, shutdown

MODEL = {
    "layers": 4,
    "hidden": 64,
    "heads": 8,
    "kv_groups": 4,
    "ffn": 176,
    "vocabulary": 200,
    "rope_scaling": {"factor": 8},
}

# Adam divides a gradient by its own size: with the usual 1e-8 a rounding error in a gradient near zero
# becomes a whole step, and layouts drift apart by 1e-6 a step for no fault of their own.
ADAM = OptimizerConfig(epsilon=1e-6)


@dataclass(frozen=True)
class Case:
    """A layout, and what is trained in it."""

    name: str
    parallel: ParallelConfig
    model: ModelConfig
    dtype: str = "fp32"
    steps: int = 5
    sequences: int = 8
    length: int = 64

    @classmethod
    def read(cls, name: str, values: dict) -> Case:
        values = dict(values)
        parallel = ParallelConfig(**values.pop("parallel", {}))
        return cls(name, parallel, ModelConfig(**{**MODEL, **values.pop("model", {})}), **values)


def samples(case: Case, step: int) -> dict[str, torch.Tensor]:
    """The global batch of one step: noisy repetitions, so that there is something to learn, and a loss mask."""
    fixed = torch.Generator().manual_seed(7)
    patterns = torch.randint(0, case.model.vocabulary, (4, case.length + 1), generator=fixed)
    fresh = torch.Generator().manual_seed(100 + step)
    tokens = patterns[torch.randint(0, 4, (case.sequences,), generator=fresh)]
    noise = torch.rand(tokens.shape, generator=fresh) < 0.1
    tokens = torch.where(noise, torch.randint(0, case.model.vocabulary, tokens.shape, generator=fresh), tokens)
    mask = (torch.rand(case.sequences, case.length, generator=fresh) < 0.9).float()
    positions = torch.arange(case.length)[None].expand(case.sequences, -1)
    return {"tokens": tokens[:, :-1], "labels": tokens[:, 1:], "loss_mask": mask, "position_ids": positions}


def micro_batches(case: Case, runtime: Runtime, step: int, size: int) -> Iterator[dict[str, torch.Tensor]]:
    share = case.sequences // runtime.data_size
    for start in range(runtime.data_rank * share, (runtime.data_rank + 1) * share, size):
        batch = {name: tensor[start : start + size].contiguous() for name, tensor in samples(case, step).items()}
        yield get_batch_on_this_cp_rank(batch) if case.parallel.context > 1 else batch


def forward(batches: Iterator[dict[str, torch.Tensor]], model: torch.nn.Module):
    batch = next(batches)
    output = model(batch["tokens"], batch["position_ids"], None, labels=batch["labels"])

    def loss(output: torch.Tensor):
        total = (output.float() * batch["loss_mask"]).sum()
        count = batch["loss_mask"].sum().int()
        return total, count, {"loss": torch.stack([total.detach(), count.float()])}

    return output, loss


class Training:
    """Model, optimizer and schedule of one case."""

    def __init__(self, case: Case, runtime: Runtime) -> None:
        self.case, self.runtime = case, runtime
        chunks = build_chunks(case.model, case.parallel, case.dtype, seed=5)
        config = chunks[0].config
        if case.dtype == "bf16":
            chunks = [Float16Module(config, chunk) for chunk in chunks]
        reduction = ddp_config(case.parallel)
        self.chunks = [
            DistributedDataParallel(config, reduction, chunk, disable_bucketing=number > 0)
            for number, chunk in enumerate(chunks)
        ]
        self.optimizer = get_megatron_optimizer(optimizer_config(ADAM, 3e-3, case.dtype, case.parallel), self.chunks)
        config.finalize_model_grads_func = finalize_model_grads
        config.grad_scale_func = self.optimizer.scale_loss
        self.schedule = get_forward_backward_func()

    def step(self, number: int, micro: int = 1) -> tuple[float | None, float]:
        """One optimizer step -> (mean loss per token where this rank knows it, gradient norm)."""
        for chunk in self.chunks:
            chunk.zero_grad_buffer()
        self.optimizer.zero_grad()
        several = len(self.chunks) > 1
        streams = [micro_batches(self.case, self.runtime, number, micro) for _ in self.chunks]
        losses = self.schedule(
            forward_step_func=forward,
            data_iterator=streams if several else streams[0],
            model=self.chunks if several else self.chunks[0],
            num_microbatches=self.case.sequences // self.runtime.data_size // micro,
            seq_length=self.case.length,
            micro_batch_size=micro,
            forward_only=False,
        )
        done, norm, _ = self.optimizer.step()
        assert done
        if not self.runtime.is_last_stage:
            return None, float(norm)
        total = torch.stack([loss["loss"] for loss in losses]).sum(0)
        torch.distributed.all_reduce(total, group=self.runtime.data_context_group)
        return (total[0] / total[1]).item(), float(norm)


def run_case(case: Case, out: Path | None = None) -> dict[str, list[float]]:
    """Train a case in the processes that are there; the result is complete on the last stage."""
    runtime = initialize(case.parallel, seed=3, timeout_minutes=1)
    try:
        training = Training(case, runtime)
        steps = [training.step(number) for number in range(case.steps)]
        result = {"losses": [loss for loss, _ in steps], "norms": [norm for _, norm in steps]}
        if out is not None and runtime.is_reporter:
            (out / f"{case.name}.json").write_text(json.dumps(result))
        return result
    finally:
        shutdown(keep_world=True)


def main() -> None:
    out = Path(sys.argv[2])
    for name, values in json.loads(Path(sys.argv[1]).read_text()).items():
        run_case(Case.read(name, values), out)
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
