"""Tensors in memory as a source, and torch_dist checkpoints cut as a parallel layout would cut them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path

import torch
from torch.distributed.checkpoint import DefaultSavePlanner, FileSystemWriter
from torch.distributed.checkpoint.filesystem import _StoragePrefix
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import SavePlan, TensorWriteData, WriteItem, WriteItemType

Box = tuple[tuple[int, ...], tuple[int, ...]]


class Held:
    """A source over tensors in memory; notes which names are read."""

    where = "memory"

    def __init__(self, tensors: Mapping[str, torch.Tensor]) -> None:
        self.tensors, self.asked = dict(tensors), []

    def shapes(self) -> dict[str, tuple[int, ...]]:
        return {name: tuple(tensor.shape) for name, tensor in self.tensors.items()}

    def dtype(self, name: str) -> str:
        return str(self.tensors[name].dtype).removeprefix("torch.")

    def fill(self, name: str, start: int, out: torch.Tensor) -> None:
        self.asked.append(name)
        out.copy_(self.tensors[name][start : start + len(out)])


class _Boxes(DefaultSavePlanner):
    def __init__(self, tensors: Mapping[str, torch.Tensor]) -> None:
        super().__init__()
        self.tensors = tensors

    def resolve_data(self, item: WriteItem) -> torch.Tensor:
        chunk = item.tensor_data.chunk
        cut = tuple(slice(o, o + s) for o, s in zip(chunk.offsets, chunk.sizes, strict=True))
        return self.tensors[item.index.fqn][cut].contiguous()


def store(directory: Path, tensors: Mapping[str, torch.Tensor], boxes: Mapping[str, Iterable[Box]]) -> None:
    """Write tensors with torch's own writer: the n-th (offsets, sizes) box of each by the n-th rank."""
    planner, writer = _Boxes(tensors), FileSystemWriter(str(directory))
    directory.mkdir(parents=True, exist_ok=True)
    ranks: dict[int, list[WriteItem]] = {}
    listed = {}
    for name, tensor in tensors.items():
        whole = TensorStorageMetadata(TensorProperties(dtype=tensor.dtype), tensor.shape, [])
        for rank, (offsets, sizes) in enumerate(boxes.get(name, [((0,) * tensor.dim(), tensor.shape)])):
            chunk = ChunkStorageMetadata(torch.Size(offsets), torch.Size(sizes))
            whole.chunks.append(chunk)
            data = TensorWriteData(chunk, whole.properties, tensor.shape)
            item = WriteItem(MetadataIndex(name, offsets), WriteItemType.SHARD, tensor_data=data)
            ranks.setdefault(rank, []).append(item)
        listed[name] = whole
    plans = [SavePlan(items, storage_data=_StoragePrefix(f"__{rank}_")) for rank, items in ranks.items()]
    writer.finish(Metadata(listed), [writer.write_data(plan, planner).wait() for plan in plans])
