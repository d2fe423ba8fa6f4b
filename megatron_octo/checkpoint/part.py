"""One rank's part of a checkpoint: what it holds, a copy of it in host memory, and how it gets into files.

megatron-core's own writer starts a manager process and forks one worker per file. If a worker dies the rank waits
without end, and a killed rank leaves the manager behind. Torch's file-system writer stores the same format inside the
process; here it runs in whatever thread calls it, and nothing but `write_parts` speaks with other ranks.
"""

from __future__ import annotations

import dataclasses
import io
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from megatron.core.dist_checkpointing.core import CheckpointingConfig, save_config
from megatron.core.dist_checkpointing.strategies.torch import (
    MCoreSavePlanner,
    _replace_state_dict_keys_with_sharded_keys,
    mcore_to_pyt_state_dict,
)
from torch.distributed.checkpoint.filesystem import _StoragePrefix
from torch.distributed.checkpoint.metadata import MetadataIndex
from torch.distributed.checkpoint.planner import SavePlan, WriteItem
from torch.distributed.checkpoint.storage import WriteResult

from megatron_octo.checkpoint.dist import METADATA
from megatron_octo.checkpoint.hashing import HashingWriter, cause_raised, without_checksums
from megatron_octo.checkpoint.together import on_all_ranks, on_rank_zero

BACKEND, VERSION = "torch_dist", 1
COMMON = "common.pt"


class HostCopies:
    """Host memory that the snapshots of one run share: the first one makes it, later ones find it there.

    On a GPU it is page-locked, so that copies run at the full speed of the bus.
    """

    def __init__(self) -> None:
        self._memory: list[torch.Tensor] = []

    def of(self, tensors: dict[MetadataIndex, torch.Tensor]) -> dict[MetadataIndex, torch.Tensor]:
        """Copy tensors, those that share their values (an fp32 weight is its own master weight) once."""
        copies: dict[tuple, torch.Tensor] = {}
        for tensor in tensors.values():
            if _place(tensor) not in copies:
                copy = self._room(len(copies), tensor)
                copy.copy_(tensor, non_blocking=True)
                copies[_place(tensor)] = copy
        if torch.cuda.is_available():
            torch.cuda.current_stream().synchronize()
        return {index: copies[_place(tensor)] for index, tensor in tensors.items()}

    def _room(self, number: int, like: torch.Tensor) -> torch.Tensor:
        if number == len(self._memory):
            self._memory.append(torch.empty(0, dtype=like.dtype))
        if self._memory[number].shape != like.shape or self._memory[number].dtype != like.dtype:
            # One storage each: torch's writer copies what shares a storage once more.
            self._memory[number] = torch.empty(like.shape, dtype=like.dtype, pin_memory=like.is_cuda)
        return self._memory[number]


class Written(NamedTuple):
    """What a rank tells after writing: its plan, where each item lies, and its file's name and BLAKE3."""

    plan: SavePlan
    results: list[WriteResult]
    file: str
    digest: str


class Part:
    """What this rank writes of one checkpoint.

    Args:
        sharded: megatron-core's description of the state, after factories.
        common: what is the same on every rank; rank 0 writes it.
    """

    def __init__(self, sharded: dict[str, Any], common: dict[str, Any]) -> None:
        by_key, _, _ = _replace_state_dict_keys_with_sharded_keys(sharded, True)
        self._planner = MCoreSavePlanner(dedup_replicated_tensors=False, flatten_state_dict=False)
        self._planner.set_up_planner(mcore_to_pyt_state_dict(by_key, False), None, is_coordinator=dist.get_rank() == 0)
        self._plan = self._planner.create_local_plan()
        self._common, self._values = io.BytesIO(), {}
        torch.save(common, self._common)  # now: the optimizer changes it in place

    def snapshot(self, memory: HostCopies) -> None:
        """Copy all values, so that what is written later is what they are now."""
        tensors = [item for item in self._plan.items if item.tensor_data is not None]
        self._values = memory.of({item.index: self._planner.resolve_data(item).detach() for item in tensors})

    def resolve_data(self, item: WriteItem) -> torch.Tensor | io.BytesIO:
        """Give an item's values to torch's writer."""
        copy = self._values.get(item.index)
        return self._planner.resolve_data(item) if copy is None else copy

    def write(self, directory: Path) -> Written:
        """Write this rank's file; its bytes are on disk when this returns.

        Raises:
            OSError: it could not be written.
        """
        prefix = f"__{dist.get_rank()}_"
        plan = dataclasses.replace(self._plan, storage_data=_StoragePrefix(prefix))
        writer = HashingWriter(directory)
        with without_checksums(), cause_raised():
            results = writer.write_data(plan, self).wait()
        return Written(plan, results, f"{prefix}0.distcp", writer.digest)

    def complete(self, directory: Path, parts: list[Written]) -> dict[str, str]:
        """Write what belongs to no single rank: the list of all tensors, the common state, the format. Rank 0 only.

        Returns:
            BLAKE3 of the big files, by name.

        Raises:
            OSError: a file could not be written.
        """
        _, metadata = self._planner.create_global_plan([part.plan for part in parts])
        writer = HashingWriter(directory)
        writer.finish(metadata, [part.results for part in parts])
        digests = {part.file: part.digest for part in parts} | {METADATA: writer.digest}
        (directory / COMMON).write_bytes(self._common.getbuffer())
        save_config(CheckpointingConfig(BACKEND, VERSION), str(directory))
        return digests


def write_parts(directory: Path, part: Part, group: Any = None) -> dict[str, str]:
    """Write all ranks' parts of a checkpoint; collective over all ranks.

    Args:
        directory: an empty directory every rank sees.
        part: this rank's.
        group: all ranks of the run; the default one if not given.

    Returns:
        BLAKE3 of the big files, by name.

    Raises:
        OSError: a file could not be written, for example because the disk is full; raised on every rank.
    """
    parts = on_all_ranks(lambda: part.write(directory), group)
    return on_rank_zero(lambda: part.complete(directory, parts), group)


def _place(tensor: torch.Tensor) -> tuple:
    return tensor.data_ptr(), tensor.dtype, tensor.shape, tensor.stride()
