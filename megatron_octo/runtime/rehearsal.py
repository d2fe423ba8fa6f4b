"""One process that stands in for a rank of a world that was never started: for what a layout needs to know of itself.

torch's own fake process groups have the sizes and ranks of the real ones and send nothing, so megatron-core builds for
64 ranks what it would build there.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager

from megatron_octo.config.layout import ParallelConfig
from megatron_octo.runtime import cpu_twin


@contextmanager
def standing_at(parallel: ParallelConfig, rank: int) -> Iterator[None]:
    """Be one rank of a layout, with all its process groups, as long as the context is open.

    What is built inside lies on the meta device: shapes and types, no memory. Messages between ranks do nothing, so
    nothing can be computed. GPUs must be hidden from this process; it may not belong to a world already.

    Args:
        parallel: the layout.
        rank: of the world, below `parallel.processes`.
    """
    cpu_twin.install()
    import torch
    import torch.distributed as dist
    from megatron.core import parallel_state
    from torch.testing._internal.distributed.fake_pg import FakeStore

    hook = sys.excepthook  # torch puts "[rank N]:" before errors from now on
    dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=parallel.processes)
    try:
        parallel_state.initialize_model_parallel(
            tensor_model_parallel_size=parallel.tensor,
            pipeline_model_parallel_size=parallel.pipeline,
            virtual_pipeline_model_parallel_size=parallel.virtual_pipeline,
            context_parallel_size=parallel.context,
            create_gloo_process_groups=False,
        )
        with torch.device("meta"):
            yield
    finally:
        parallel_state.destroy_model_parallel()
        dist.destroy_process_group()
        sys.excepthook = hook


def first_rank_of_stage(parallel: ParallelConfig, stage: int) -> int:
    """A rank of a pipeline stage, by megatron-core's order: the pipeline is the outermost dimension."""
    return stage * (parallel.processes // parallel.pipeline)
