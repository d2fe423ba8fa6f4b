"""Process groups, device and seeds of a run: set up once, passed on as one frozen object."""

from __future__ import annotations

import os
import random
from dataclasses import dataclass
from datetime import timedelta
from typing import TYPE_CHECKING

from megatron_octo.config.layout import ParallelConfig
from megatron_octo.errors import ConfigError, EnvironmentProblem
from megatron_octo.runtime import cpu_twin
from megatron_octo.runtime.launch import LISTENER

if TYPE_CHECKING:
    import torch
    from torch.distributed import ProcessGroup


@dataclass(frozen=True)
class Runtime:
    """Where this process stands.

    Args:
        rank: of this process among `world_size`.
        world_size: processes of the run.
        device: where tensors live.
        data_rank: which share of the batch this rank reads, of `data_size`; the ranks of one
            tensor, pipeline and context group read the same share.
        data_size: data-parallel size.
        pipeline_rank: stage of this rank, of `pipeline_size`.
        pipeline_size: pipeline stages.
        tensor_group: ranks that share each layer.
        pipeline_group: ranks that hold consecutive stages.
        context_group: ranks that share each sequence.
        data_group: ranks with the same weights and different samples.
        data_context_group: data and context together: over these gradients and losses are summed.
    """

    rank: int
    world_size: int
    device: torch.device
    data_rank: int
    data_size: int
    pipeline_rank: int
    pipeline_size: int
    tensor_group: ProcessGroup
    pipeline_group: ProcessGroup
    context_group: ProcessGroup
    data_group: ProcessGroup
    data_context_group: ProcessGroup

    @property
    def is_first_stage(self) -> bool:
        """Whether this rank holds the embedding (any of its chunks)."""
        return self.pipeline_rank == 0

    @property
    def is_last_stage(self) -> bool:
        """Whether this rank computes losses (any of its chunks)."""
        return self.pipeline_rank == self.pipeline_size - 1

    @property
    def is_reporter(self) -> bool:
        """Whether this is the one rank that writes metrics: the first of those that know the loss."""
        return self.is_last_stage and self.data_context_group.rank() == 0 and self.tensor_group.rank() == 0


def initialize(parallel: ParallelConfig, seed: int, timeout_minutes: float = 10) -> Runtime:
    """Join the run: process groups of the layout, device, seeds, and the CPU twin where there is no CUDA.

    Reads RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR and MASTER_PORT as torchrun sets them; without
    them this process is the whole world. A world that already exists is kept.

    Args:
        parallel: the layout.
        seed: of every generator (torch, numpy, random and megatron-core's trackers).
        timeout_minutes: a collective that takes longer is a failure.

    Returns:
        Where this process stands.

    Raises:
        ConfigError: the world has another size than the layout needs.
        EnvironmentProblem: the processes cannot meet (port in use, address unknown, time out).
    """
    return _enter(parallel, seed, timeout_minutes)


def initialize_single(seed: int, timeout_minutes: float = 10) -> Runtime:
    """Make this process a world of its own, whatever torchrun's variables say; no port is used."""
    import torch.distributed as dist

    cpu_twin.install()
    if not dist.is_initialized():
        _start(timedelta(minutes=timeout_minutes), store=dist.HashStore(), rank=0, world_size=1)
    return _enter(ParallelConfig(), seed, timeout_minutes)


def shutdown(keep_world: bool = False) -> None:
    """Leave the groups; with `keep_world` only the layout goes and another `initialize` may follow."""
    import torch.distributed as dist
    from megatron.core import parallel_state

    parallel_state.destroy_model_parallel()
    if not keep_world and dist.is_initialized():
        dist.destroy_process_group()


def meeting_place() -> torch.distributed.Store:
    """The store in which the ranks of this world met, by a client of its own: one serves one thread at a time."""
    import torch.distributed as dist

    return dist.PrefixStore("octo", dist.distributed_c10d._get_default_store().clone())


def _enter(parallel: ParallelConfig, seed: int, timeout_minutes: float) -> Runtime:
    import torch
    import torch.distributed as dist

    cpu_twin.install()
    world_size = dist.get_world_size() if dist.is_initialized() else int(os.environ.get("WORLD_SIZE", "1"))
    if world_size != parallel.processes:
        raise ConfigError(
            f"the layout {parallel.label} needs {parallel.processes} processes, {world_size} were started",
            "tensor x pipeline x context x data processes are needed exactly",
            f"start {parallel.processes} processes (--nproc {parallel.processes}) or change parallel.*",
        )
    timeout = timedelta(minutes=timeout_minutes)
    if not dist.is_initialized():
        _join_world(timeout)
    _split_world(parallel, timeout_minutes)
    _seed_all(seed)
    return _describe(torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else "cpu")


def _join_world(timeout: timedelta) -> None:
    import torch.distributed as dist

    if "WORLD_SIZE" not in os.environ:
        _start(timeout, store=dist.HashStore(), rank=0, world_size=1)
        return
    missing = [name for name in ("RANK", "MASTER_ADDR", "MASTER_PORT") if name not in os.environ]
    if missing:
        raise EnvironmentProblem(
            f"WORLD_SIZE is set but {', '.join(missing)} is not",
            "the processes of a run find each other by these variables",
            "start the run with --nproc or torchrun",
        )
    meeting = f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
    try:
        server = _take_over_listener(timeout)
        _start(timeout)
        del server  # the world's own store has joined it
    except (dist.DistError, RuntimeError, ValueError, OSError) as error:
        reason = " ".join(str(error).split())[:200]
        raise EnvironmentProblem(
            f"rank {os.environ['RANK']} cannot meet the others at {meeting} ({reason})",
            "rank 0 listens there, all others call it",
            "choose a free port that every process can reach",
        ) from None


def _take_over_listener(timeout: timedelta) -> object:
    """Serve the meeting place on the socket our launcher handed to rank 0; the store that torch makes there joins."""
    import torch.distributed as dist

    descriptor = os.environ.pop(LISTENER, None)
    if descriptor is None:
        return None
    return dist.TCPStore(
        os.environ["MASTER_ADDR"],
        int(os.environ["MASTER_PORT"]),
        is_master=True,
        timeout=timeout,
        wait_for_workers=False,
        multi_tenant=True,
        master_listen_fd=int(descriptor),
    )


def _start(timeout: timedelta, **where: object) -> None:
    import torch
    import torch.distributed as dist

    if torch.cuda.is_available():
        torch.cuda.set_device(_local_device(torch.cuda.device_count()))
    dist.init_process_group("nccl" if torch.cuda.is_available() else "gloo", timeout=timeout, **where)


def _local_device(count: int) -> int:
    """The GPU of this process among the `count` of its machine: one for each."""
    rank = int(os.environ.get("LOCAL_RANK", "0"))
    if rank >= count:
        raise EnvironmentProblem(
            f"local rank {rank} has no GPU: this machine shows {count}",
            "every process of a machine needs a GPU of its own",
            "start as many processes as there are GPUs, change parallel.*, or hide the GPUs: CUDA_VISIBLE_DEVICES=''",
        )
    return rank


def _split_world(parallel: ParallelConfig, timeout_minutes: float) -> None:
    from megatron.core import parallel_state

    parallel_state.initialize_model_parallel(
        tensor_model_parallel_size=parallel.tensor,
        pipeline_model_parallel_size=parallel.pipeline,
        virtual_pipeline_model_parallel_size=parallel.virtual_pipeline,
        context_parallel_size=parallel.context,
        distributed_timeout_minutes=timeout_minutes,
    )


def _seed_all(seed: int) -> None:
    import numpy
    import torch
    from megatron.core import parallel_state, tensor_parallel

    # Stages differ so that, with dropout, they would not drop alike: megatron-core's convention.
    own = seed + 100 * parallel_state.get_pipeline_model_parallel_rank()
    random.seed(own)
    numpy.random.seed(own % 2**32)
    torch.manual_seed(own)
    tensor_parallel.model_parallel_cuda_manual_seed(own)


def _describe(device: torch.device | str) -> Runtime:
    import torch
    import torch.distributed as dist
    from megatron.core import parallel_state as state

    return Runtime(
        rank=dist.get_rank(),
        world_size=dist.get_world_size(),
        device=torch.device(device),
        data_rank=state.get_data_parallel_rank(),
        data_size=state.get_data_parallel_world_size(),
        pipeline_rank=state.get_pipeline_model_parallel_rank(),
        pipeline_size=state.get_pipeline_model_parallel_world_size(),
        tensor_group=state.get_tensor_model_parallel_group(),
        pipeline_group=state.get_pipeline_model_parallel_group(),
        context_group=state.get_context_parallel_group(),
        data_group=state.get_data_parallel_group(),
        data_context_group=state.get_data_parallel_group(with_context_parallel=True),
    )
