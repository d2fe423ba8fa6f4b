"""A torch_dist writer that stays inside the process.

megatron-core's own writer starts a manager process and forks one worker per file. If a worker dies the
rank waits without end, and a killed rank leaves the manager behind. Torch's own file-system writer stores
the same format, brings an error of one rank to all ranks, and synchronises each file to disk.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch.distributed.checkpoint as torch_checkpoint
from megatron.core.dist_checkpointing.strategies.base import SaveShardedStrategy
from megatron.core.dist_checkpointing.strategies.torch import (
    MCoreSavePlanner,
    _replace_state_dict_keys_with_sharded_keys,
    mcore_to_pyt_state_dict,
)

BACKEND, VERSION = "torch_dist", 1


class InProcessWriter(SaveShardedStrategy):
    """Saves the sharded part of a state dict with torch.distributed.checkpoint, one file per rank."""

    def __init__(self) -> None:
        super().__init__(BACKEND, VERSION)

    @property
    def can_handle_sharded_objects(self) -> bool:
        """Objects (for example FP8 scaling state) travel in the same files as tensors."""
        return True

    def save(self, sharded_state_dict: dict[str, Any], checkpoint_dir: str | Path) -> None:
        """Write this rank's shards; collective.

        Raises:
            torch.distributed.checkpoint.api.CheckpointException: on every rank, if any rank failed.
        """
        by_key, _, _ = _replace_state_dict_keys_with_sharded_keys(sharded_state_dict, True)
        torch_checkpoint.save(
            mcore_to_pyt_state_dict(by_key, False),
            storage_writer=torch_checkpoint.FileSystemWriter(checkpoint_dir),
            planner=MCoreSavePlanner(dedup_replicated_tensors=False, flatten_state_dict=False),
        )
