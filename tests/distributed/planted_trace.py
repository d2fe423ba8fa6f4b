"""A rank of a trace with a fault that megatron-core runs without an error; which one, PLANTED says."""

from __future__ import annotations

import os
from typing import Any

import megatron_octo.train.loop  # noqa: F401  # first: it imports megatron-core the quick way
from megatron_octo.model import layers, translate
from megatron_octo.train import setup, trace


def batched_messages() -> None:
    """Two interleaved stages send and receive in batches, where messages change places."""
    layout = translate._layout
    translate._layout = lambda parallel: {**layout(parallel), "overlap_p2p_comm": False, "batch_p2p_comm": True}


def unreduced_norm() -> None:
    """Under sequence parallelism each rank keeps the gradient of norms for its own part of the sequence."""
    plain = layers.RMSNorm.__init__

    def unmarked(norm: Any, *arguments: Any, **options: Any) -> None:
        plain(norm, *arguments, **options)
        norm.weight.sequence_parallel = False

    layers.RMSNorm.__init__ = unmarked


def shared_bucket() -> None:
    """Tied embeddings lie in a bucket with others, so that first and last stage shard them differently."""
    wrap = trace.wrap

    def forgetful(run: Any, models: list[Any], bucket: int | None = None) -> Any:
        for model in models:
            for weight in model.parameters():
                weight.shared_embedding = False
        return wrap(run, models, bucket)

    trace.wrap = forgetful


FAULTS = {fault.__name__: fault for fault in (batched_messages, unreduced_norm, shared_bucket)}

if __name__ == "__main__":
    assert setup.wrap is trace.wrap
    FAULTS[os.environ["PLANTED"]]()
    trace.main()
