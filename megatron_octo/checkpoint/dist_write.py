"""Writing weights as a sealed torch_dist checkpoint that megatron-core loads in any layout, a few rows at a time.

Torch's own writer makes the files; only the values of an item are asked for when its turn has come, so memory is one
block of rows, whatever the model. Each file is complete on its own, so a killed writing goes on after the last one.
"""

from __future__ import annotations

import io
import json
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any

import torch
from torch.distributed.checkpoint import DefaultSavePlanner
from torch.distributed.checkpoint.filesystem import _StorageInfo, _StoragePrefix
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import SavePlan, TensorWriteData, WriteItem, WriteItemType
from torch.distributed.checkpoint.storage import WriteResult

from megatron_octo.checkpoint.dist import METADATA, Place
from megatron_octo.checkpoint.hashing import HashingWriter, cause_raised, without_checksums
from megatron_octo.checkpoint.seal import SEAL, seal
from megatron_octo.checkpoint.store import write_facts
from megatron_octo.checkpoint.tensors import BLOCK_BYTES, TensorSource, row_blocks
from megatron_octo.errors import DataError
from megatron_octo.publish import Partial, publishing

if TYPE_CHECKING:
    from megatron_octo.locations import Location

FILE_BYTES = 2 * 2**30
"""About how much a file holds: what a killed writing loses at most."""

_FORMAT = {
    "sharded_backend": "torch_dist",
    "sharded_backend_version": 1,
    "common_backend": "torch",
    "common_backend_version": 1,
}


def write_model(
    target: Location,
    source: TensorSource,
    facts: dict[str, Any],
    made_from: dict[str, Any],
    places: Mapping[str, Place] | None = None,
    extras: Callable[[Path], None] | None = None,
    into: str = "",
    objects: Mapping[str, bytes] | None = None,
) -> None:
    """Write a sealed, weights-only checkpoint that megatron-core loads in any layout.

    Args:
        target: must not exist; it appears complete and sealed or not at all.
        source: tensors by megatron-core's parameter names.
        facts: what `run.json` shall say; step, run_tokens, tokens and moments are filled in.
        made_from: JSON values that decide what is written; a killed writing goes on only if they are the same.
        places: where to keep a tensor that does not go under its own name.
        extras: called with the directory before it is sealed, to add files or write some anew.
        into: folder of the directory for the torch_dist files, "" for the directory itself.
        objects: what to keep beside the tensors, each as `torch.save` wrote it, by its key.

    Raises:
        ConfigError: the target exists, or another process writes it.
        DataError: layers that are to be stacked differ in dtype or shape; nothing is begun.
        OctoError: the source cannot be read.
        OSError: a file could not be written, for example because the disk is full.
    """
    sizes = [FILE_BYTES, BLOCK_BYTES]  # decide which rows lie in which file
    rows = _Rows(source, places or {}, objects or {})
    with publishing(target, {**made_from, "sizes": sizes}, last=SEAL) as partial:
        directory = partial.directory / into
        directory.mkdir(parents=True, exist_ok=True)
        digests = _write_tensors(partial, directory, rows)
        torch.save({}, directory / "common.pt")
        (directory / "metadata.json").write_text(json.dumps(_FORMAT), encoding="utf-8")
        write_facts(partial.directory, {"step": 0, "run_tokens": 0, "tokens": 0, **facts, "moments": False})
        if extras is not None:
            extras(partial.directory)
        seal(partial.directory, partial.files(), digests)


class _Rows(DefaultSavePlanner):
    """Says which runs of rows there are to write, and reads each when torch's writer asks for it."""

    def __init__(self, source: TensorSource, places: Mapping[str, Place], objects: Mapping[str, bytes]) -> None:
        super().__init__()
        self._source, self._objects = source, objects
        self._origins: dict[MetadataIndex, tuple[str, int]] = {}
        # One block's memory serves all: the writer keeps a reference to every tensor until its file is complete.
        self._memory = bytearray()
        # Objects come first: so does torch's writer put them in a file.
        self.items = [WriteItem(MetadataIndex(key), WriteItemType.BYTE_IO) for key in objects]
        self.tensors: dict[str, TensorStorageMetadata] = {}
        depths = _depths(places)
        for name, shape in source.shapes().items():
            self._add(name, tuple(shape), places.get(name, Place(name)), depths)

    def _add(self, name: str, shape: tuple[int, ...], place: Place, depths: Mapping[str, int]) -> None:
        stacked = place.layer is not None
        properties = TensorProperties(dtype=getattr(torch, self._source.dtype(name)))
        size = torch.Size((depths[place.name], *shape) if stacked else shape)
        stored = self.tensors.setdefault(place.name, TensorStorageMetadata(properties, size, []))
        if (stored.size, stored.properties.dtype) != (size, properties.dtype):
            raise DataError(
                f"{self._source.where}: {name} is {_words(size[1:], properties.dtype)}, "
                f"in the layers before it is {_words(stored.size[1:], stored.properties.dtype)}",
                f"all layers lie in one tensor, {place.name}",
                "--layout octo keeps each layer's tensor as it is",
            )
        for start, rows in row_blocks(shape, properties.dtype.itemsize):
            offsets = (start, *(0 for _ in shape[1:]))
            sizes = (rows, *shape[1:])
            if stacked:
                offsets, sizes = (place.layer, *offsets), (1, *sizes)
            chunk = ChunkStorageMetadata(torch.Size(offsets), torch.Size(sizes))
            index = MetadataIndex(place.name, chunk.offsets)
            stored.chunks.append(chunk)
            self._origins[index] = (name, start)
            self.items.append(
                WriteItem(index, WriteItemType.SHARD, tensor_data=TensorWriteData(chunk, properties, size))
            )

    def resolve_data(self, write_item: WriteItem) -> torch.Tensor | io.BytesIO:
        """Read the rows of an item; they are valid until the next one is asked for."""
        if write_item.type is WriteItemType.BYTE_IO:
            return io.BytesIO(self._objects[write_item.index.fqn])
        name, start = self._origins[write_item.index]
        sizes, dtype = write_item.tensor_data.chunk.sizes, write_item.tensor_data.properties.dtype
        if len(self._memory) < _nbytes(write_item):
            self._memory = bytearray(max(BLOCK_BYTES, _nbytes(write_item)))
        values = torch.frombuffer(self._memory, dtype=dtype, count=sizes.numel()).view(sizes)
        stacked = values.dim() > len(self._source.shapes()[name])
        self._source.fill(name, start, values[0] if stacked else values)
        return values


def _write_tensors(partial: Partial, directory: Path, rows: _Rows) -> dict[str, str]:
    """Write what is not there yet, then the list of all tensors.

    Returns:
        BLAKE3 of each written file, by its name in the partial directory.
    """
    writer = HashingWriter(directory)
    results, digests = [], {}
    for number, items in enumerate(_files(rows.items)):
        plan = SavePlan(items, storage_data=_StoragePrefix(f"__{number}_"))
        file = f"__{number}_0.distcp"
        name = str(PurePosixPath((directory / file).relative_to(partial.directory)))
        noted = partial.finished(name)
        if noted is None:
            with without_checksums(), cause_raised():
                written = writer.write_data(plan, rows).wait()
            runs = [[result.storage_data.offset, result.storage_data.length] for result in written]
            noted = {"blake3": writer.digest, "runs": runs}
            partial.finish(name, noted)
        digests[name] = noted["blake3"]
        results.append(
            [
                WriteResult(item.index, length, _StorageInfo(file, offset, length))
                for item, (offset, length) in zip(items, noted["runs"], strict=True)
            ]
        )
    listed = {item.index.fqn: rows.tensors.get(item.index.fqn, BytesStorageMetadata()) for item in rows.items}
    writer.finish(Metadata(listed, planner_data={name: (name,) for name in listed}), results)
    digests[str(PurePosixPath((directory / METADATA).relative_to(partial.directory)))] = writer.digest
    return digests


def _files(items: list[WriteItem]) -> Iterator[list[WriteItem]]:
    """Share out items among files, in order."""
    file: list[WriteItem] = []
    size = 0
    for item in items:
        if file and size + _nbytes(item) > FILE_BYTES:
            yield file
            file, size = [], 0
        file.append(item)
        size += _nbytes(item)
    if file:
        yield file


def _nbytes(item: WriteItem) -> int:
    if item.tensor_data is None:
        return 0  # an object: some hundred bytes
    return item.tensor_data.chunk.sizes.numel() * item.tensor_data.properties.dtype.itemsize


def _words(shape: torch.Size, dtype: torch.dtype) -> str:
    return f"{list(shape)} {str(dtype).removeprefix('torch.')}"


def _depths(places: Mapping[str, Place]) -> dict[str, int]:
    """How many layers each stacked tensor holds."""
    depths: dict[str, int] = {}
    for place in places.values():
        if place.layer is not None:
            depths[place.name] = max(depths.get(place.name, 0), place.layer + 1)
    return depths
