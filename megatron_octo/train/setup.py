"""From a configuration to a run that can take its first step: model, optimizer, data, loaded state."""

from __future__ import annotations

import dataclasses
import gc
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.distributed import DistributedDataParallel, finalize_model_grads
from megatron.core.optimizer import get_megatron_optimizer
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.transformer.module import Float16Module

from megatron_octo.checkpoint.save import load_checkpoint
from megatron_octo.checkpoint.store import naming_older
from megatron_octo.checkpoint.together import on_rank_zero
from megatron_octo.config.layout import ParallelConfig
from megatron_octo.config.run import RunConfig
from megatron_octo.data.index.digest import tokenizer_digest
from megatron_octo.data.mix.reader import build_train_dataset
from megatron_octo.model.build import build_chunks
from megatron_octo.model.translate import Kernels, ddp_config, optimizer_config
from megatron_octo.runtime import accelerator, adam, tp_overlap
from megatron_octo.runtime.groups import Runtime
from megatron_octo.train.change import check_data
from megatron_octo.train.data import Batches
from megatron_octo.train.needs import repeats
from megatron_octo.train.start import CACHE, Start, open_run
from megatron_octo.train.state import TrainState


@dataclass(frozen=True)
class Engine:
    """What does not change while a run trains.

    Args:
        runtime: rank, device and process groups.
        batches: the data of each step.
        forward_backward: Megatron's schedule for this layout.
    """

    runtime: Runtime
    batches: Batches
    forward_backward: Callable[..., list[torch.Tensor]]


def set_up(run: RunConfig, runtime: Runtime) -> tuple[Engine, TrainState]:
    """Build everything a run needs and load what it starts from; collective over all ranks.

    Raises:
        ConfigError: the run differs from the one that trained here before.
        CheckpointError: what it starts from is missing, unsealed, damaged or of another shape.
        DataError: a dataset of the mixture is missing, damaged, or not the one that was read before.
    """
    kernels = choose_kernels(run)
    start = on_rank_zero(lambda: open_run(run))
    run = start.run
    dataset = open_dataset(run, runtime, start)
    if runtime.rank == 0 and (note := repeats({name: facts["epochs"] for name, facts in dataset.facts.items()})):
        print(note, flush=True)  # into the log of the run
    check_data(run, start.data, dataset.digests)
    batches = Batches(run, runtime, dataset, start.first_window)
    seed = None if start.checkpoint else run.seed
    models = build_chunks(run.model, run.parallel, run.dtype, seed, run.recompute, kernels)
    chunks = wrap(run, models)
    optimizer = build_optimizer(run, chunks)
    memory = dict(start.memory)
    read = (start.data | dataset.digests, tokenizer_digest(run.data.tokenizer))
    state = TrainState(run, chunks, optimizer, start.root_tokens, start.lineage, start.step, memory, *read)
    if start.checkpoint is not None:
        with naming_older(start.checkpoint) if start.step else nullcontext():
            load_checkpoint(start.checkpoint, state.models, optimizer, moments=start.moments)
    gc.collect()
    gc.freeze()  # what exists now stays; the collector need not walk it during steps
    return Engine(runtime, batches, get_forward_backward_func()), state


def choose_kernels(run: RunConfig) -> Kernels:
    """Whose layers and optimizer this machine has for a run; the optimizer is made megatron-core's.

    Raises:
        EnvironmentProblem: the run asks for what is not here.
    """
    machine = accelerator.look()
    layers = accelerator.choose_layers(run, machine)
    adam.use(accelerator.choose_optimizer(run, machine))
    if dist.get_rank() == 0:
        for line in accelerator.notes(run, machine):
            print(line, flush=True)
    if run.parallel.tp_comm_overlap:
        tp_overlap.start(run)
    return Kernels(layers, run.fp8)


def wrap(run: RunConfig, models: list[Any], bucket: int | None = None) -> list[torch.nn.Module]:
    """Wrap model chunks for mixed precision and gradient reduction.

    Args:
        run: layout and dtype.
        models: this rank's model chunks.
        bucket: parameters that are reduced together where reduction overlaps; megatron-core's default suits real
            models (40M and more), of which a tiny one fills not even the first.
    """
    # A bad gradient is found after the step, on every rank at once and with a message (train.step).
    reduction = ddp_config(run.parallel, run.fp8)
    reduction = dataclasses.replace(reduction, check_for_nan_in_grad=False, bucket_size=bucket)
    chunks = []
    for index, model in enumerate(models):
        config = model.config
        inner = Float16Module(config, model) if run.dtype == "bf16" else model
        chunks.append(DistributedDataParallel(config, reduction, inner.to(_device()), disable_bucketing=index > 0))
    _let_overlap(run.parallel, chunks)
    if run.parallel.data * run.parallel.context == 1:
        _keep_to_itself(run.parallel, chunks)
    return chunks


def _keep_to_itself(parallel: ParallelConfig, chunks: list[Any]) -> None:
    """A single replica sums and gathers nothing: gloo would copy all gradients and weights to where they already are.

    NCCL knows that; and what overlaps keeps books of its messages, so it sends them.
    """
    if _device().type != "cpu" or parallel.overlap_grad_reduce or parallel.overlap_param_gather:
        return
    for group in (group for chunk in chunks for group in chunk.bucket_groups):
        group.start_grad_sync = group.start_param_sync = lambda **_: None


def _let_overlap(parallel: ParallelConfig, chunks: list[Any]) -> None:
    """Give the schedules what starts and holds back messages, as megatron-core's own trainer does.

    Gradients are held back until the last micro-batch. Pipeline stages after the first start their reduction when
    their backward pass is over; with a virtual pipeline all stages start reductions and gathers at the same moments.
    """

    def each(name: str) -> Any:
        methods = [getattr(chunk, name) for chunk in chunks]
        return methods if len(methods) > 1 else methods[0]

    for chunk in chunks:
        if parallel.overlap_grad_reduce:
            chunk.config.no_sync_func = each("no_sync")
            chunk.config.grad_sync_func = each("start_grad_sync")
        if chunk.ddp_config.align_param_gather:
            chunk.config.param_sync_func = each("start_param_sync")


def build_optimizer(run: RunConfig, chunks: list[torch.nn.Module]) -> Any:
    """Build Megatron's AdamW over model chunks and let their schedule use it."""
    config = optimizer_config(run.optimizer, run.schedule.learning_rate, run.dtype, run.parallel, run.fp8)
    optimizer = get_megatron_optimizer(config, chunks)
    for one in optimizer.chained_optimizers:
        if isinstance(one.optimizer, torch.optim.AdamW):  # one pass over the weights where it would make a dozen
            for group in one.optimizer.param_groups:
                group["fused"] = True
    for chunk in chunks:
        chunk.config.finalize_model_grads_func = finalize_model_grads
        chunk.config.grad_scale_func = optimizer.scale_loss
    return optimizer


def open_dataset(run: RunConfig, runtime: Runtime, start: Start) -> Any:
    """Open the mixtures; rank 0 first, so that files are checked and index arrays computed once."""
    windows = start.first_window + run.steps * run.batch.global_batch
    build = partial(build_train_dataset, run.data, windows, run.out / CACHE, start.blends)
    if runtime.world_size == 1:
        return build()
    return build(known=on_rank_zero(lambda: build().digests))


def _device() -> torch.device:
    return torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")
