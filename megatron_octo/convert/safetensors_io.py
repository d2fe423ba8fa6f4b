"""Weights in safetensors files: a directory of them as a source of tensors, and a writer that takes any source.

The files' headers are read by our own code, because rows are read by offset, from this machine or from a URL, and
nothing is mapped: mapped pages count as this process's memory. A header is believed only where all of it fits.
"""

from __future__ import annotations

import io
import json
import math
import os
import struct
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megatron_octo.checkpoint.tensors import BLOCK_BYTES, Shape, TensorSource, row_blocks
from megatron_octo.convert.shards import gather
from megatron_octo.errors import DataError
from megatron_octo.files import SmallWrites, write_json
from megatron_octo.locations import Location, reaching, read_range
from megatron_octo.publish import Partial

if TYPE_CHECKING:
    from torch import Tensor

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
SHARD_BYTES = 5 * 10**9
"""Largest shard by default, as `transformers` writes them."""
ITEM_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}
"""The dtypes of weights, with the bytes of one element."""

_HEADER_LIMIT = 100_000_000
_LFS_POINTER = b"version "
"""How the small file begins that Git keeps where the weights are stored elsewhere."""
_DTYPES = {"F32": "float32", "BF16": "bfloat16", "F16": "float16"}
_DTYPE_CODES = {dtype: code for code, dtype in _DTYPES.items()}
_PICKLED = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
_AGAIN = "copy the file again"


@dataclass(frozen=True, slots=True)
class Stored:
    """Where a tensor's bytes lie."""

    file: Location
    start: int
    """Offset of its first byte in the file."""
    shape: Shape
    dtype: str

    @property
    def row_bytes(self) -> int:
        """Bytes of one row."""
        return ITEM_BYTES[self.dtype] * math.prod(self.shape[1:])

    @property
    def end(self) -> int:
        """Offset behind its last byte."""
        return self.start + ITEM_BYTES[self.dtype] * math.prod(self.shape)


class SafetensorsDirectory:
    """The weights of one Hugging Face directory, a source of tensors. It keeps no file open.

    Args:
        directory: holds `model.safetensors`, or shards and `model.safetensors.index.json`.

    Raises:
        DataError: no weights, pickled weights only, a shard missing or damaged, or index and shards disagree.
        EnvironmentProblem: a remote directory cannot be reached.
    """

    def __init__(self, directory: Location) -> None:
        self.where = str(directory)
        with reaching(directory):
            _refuse_pickled(directory)
            self._stored = gather(directory, SINGLE_FILE, INDEX_FILE, read_header)
        self._shapes = {name: stored.shape for name, stored in self._stored.items()}

    def shapes(self) -> Mapping[str, Shape]:
        """Shape of every tensor, shard by shard, in the order of their bytes."""
        return self._shapes

    def dtype(self, name: str) -> str:
        """Dtype of a tensor, torch's name without the prefix."""
        return self._stored[name].dtype

    def fill(self, name: str, start: int, out: Tensor) -> None:
        """Read rows `start` to `start + len(out)` of a tensor into `out`, see `TensorSource.fill`."""
        stored = self._stored[name]
        read_range(stored.file, stored.start + start * stored.row_bytes, raw_bytes(out))


def raw_bytes(tensor: Tensor) -> memoryview:
    """A contiguous CPU tensor's memory, to be read from or written into."""
    import torch

    return tensor.view(-1).view(torch.uint8).numpy().data


def read_header(path: Location) -> dict[str, Stored]:
    """Find the tensors of a safetensors file.

    Args:
        path: the file: 8 bytes of length (little-endian), that many bytes of JSON, then the tensors' bytes.

    Returns:
        The tensors by name, in the order of their bytes.

    Raises:
        DataError: anything in its header that does not fit the file exactly; names the tensor.
    """
    size = path.stat().st_size
    head = bytearray(8)
    if size >= len(head):
        read_range(path, 0, memoryview(head))
    if head == _LFS_POINTER:
        raise DataError(f"{path}: a Git LFS pointer and not the weights", fix="git lfs pull, or download the file")
    length = struct.unpack("<Q", head)[0]
    if not 2 <= length <= min(size - 8, _HEADER_LIMIT):
        limit = f"the file has {size} bytes, and a header at most {_HEADER_LIMIT}"
        raise DataError(f"{path}: not a safetensors file (a header of {length} bytes)", limit, _AGAIN)
    text = bytearray(length)
    read_range(path, 8, memoryview(text))
    found = {name: _stored(path, 8 + length, name, entry) for name, entry in _entries(path, text).items()}
    found = dict(sorted(found.items(), key=lambda item: (item[1].start, item[1].end)))
    end, before = 8 + length, "the header"
    for name, stored in found.items():
        if stored.start != end:
            fault = "overlaps with" if stored.start < end else "lies behind a hole after"
            raise DataError(f"{path}: {name} {fault} {before}", "tensors lie one behind the other", _AGAIN)
        end, before = stored.end, name
    if end != size:
        fault = f"{before} ends at byte {end}, the file at {size}"
        raise DataError(f"{path}: {fault}", "the last tensor ends where the file does", _AGAIN)
    return found


def write_safetensors(partial: Partial, source: TensorSource, shard_bytes: float = SHARD_BYTES) -> list[str]:
    """Write all tensors of a source in its order, a block at a time.

    Args:
        partial: receives `model.safetensors`, or shards and their index. A shard that is finished there is kept.
        source: float32, bfloat16 or float16 tensors.
        shard_bytes: a shard that would grow over this is closed; a larger tensor gets its own.

    Returns:
        The names of the files.

    Raises:
        DataError: a dtype that weights do not have; nothing is written.
    """
    sizes = {name: _size(source, name) for name in source.shapes()}
    shards = _split(sizes, shard_bytes)
    names = [SINGLE_FILE]
    if len(shards) > 1:
        names = [f"model-{number:05d}-of-{len(shards):05d}.safetensors" for number in range(1, len(shards) + 1)]
    for file_name, shard in zip(names, shards, strict=True):
        if partial.finished(file_name) is None:
            _write_shard(partial.directory / file_name, source, {name: sizes[name] for name in shard})
            partial.finish(file_name, {"tensors": len(shard)})
    if len(shards) == 1:
        return names
    weight_map = {name: file_name for file_name, shard in zip(names, shards, strict=True) for name in shard}
    index = {"metadata": {"total_size": sum(sizes.values())}, "weight_map": weight_map}
    write_json(partial.directory / INDEX_FILE, index)
    return [*names, INDEX_FILE]


def _refuse_pickled(directory: Location) -> None:
    """Tell that weights are there, but pickled; without opening them."""
    if (directory / SINGLE_FILE).is_file() or (directory / INDEX_FILE).is_file() or not directory.is_dir():
        return
    pickled = sorted(path.name for path in directory.iterdir() if path.name.endswith(_PICKLED))
    if pickled:
        raise DataError(
            f"{directory}: holds pickled weights ({pickled[0]}) and no safetensors",
            "opening a pickle can run code",
            "save the model again with safe_serialization=True, or import it: octo convert from-hf --allow-pickle",
        )  # fmt: skip


def _entries(path: Location, text: bytearray) -> dict[str, Any]:
    """The header's JSON without its metadata; a name that comes twice is an error."""

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) < len(pairs):
            names = [name for name, _ in pairs]
            twice = next(name for name in names if names.count(name) > 1)
            raise DataError(f"{path}: its header names {twice} twice", "each tensor is stored once", _AGAIN)
        return found

    try:
        entries = json.loads(text.decode("utf-8"), object_pairs_hook=unique)
    except (ValueError, RecursionError) as error:
        raise DataError(f"{path}: not a safetensors file (its header is not JSON: {error})", fix=_AGAIN) from None
    if not isinstance(entries, dict):
        raise DataError(f"{path}: not a safetensors file (its header is no JSON object)", fix=_AGAIN)
    entries.pop("__metadata__", None)
    return entries


def _stored(path: Location, base: int, name: str, entry: Any) -> Stored:
    fields = entry if isinstance(entry, dict) else {}
    code, shape, ends = fields.get("dtype"), fields.get("shape"), fields.get("data_offsets")
    if not (isinstance(code, str) and _are_counts(shape) and _are_counts(ends) and len(ends) == 2):
        raise DataError(f"{path}: the header's entry of {name} is damaged", "it has dtype, shape, data_offsets", _AGAIN)
    if code not in _DTYPES:
        raise DataError(f"{path}: {name} has dtype {code!r}", f"weights are one of {', '.join(_DTYPES)}")
    stored = Stored(path, base + ends[0], tuple(shape), _DTYPES[code])
    if stored.end != base + ends[1]:
        raise DataError(f"{path}: {name} {shape} {code} does not fill bytes {ends[0]} to {ends[1]}", fix=_AGAIN)
    return stored


def _are_counts(value: Any) -> bool:
    return isinstance(value, list) and all(type(item) is int and item >= 0 for item in value)


def _size(source: TensorSource, name: str) -> int:
    """Bytes of a tensor."""
    dtype = source.dtype(name)
    if dtype not in ITEM_BYTES:
        raise DataError(f"{source.where}: {name} has dtype {dtype}", f"weights are one of {', '.join(ITEM_BYTES)}")
    return ITEM_BYTES[dtype] * math.prod(source.shapes()[name])


def _split(sizes: Mapping[str, int], shard_bytes: float) -> list[list[str]]:
    shards: list[list[str]] = [[]]
    held = 0
    for name, size in sizes.items():
        if shards[-1] and held + size > shard_bytes:
            shards.append([])
            held = 0
        shards[-1].append(name)
        held += size
    return shards


def _write_shard(path: Path, source: TensorSource, sizes: Mapping[str, int]) -> None:
    with io.BufferedWriter(SmallWrites(path, "wb")) as file:
        file.write(_header(source, sizes))
        for rows in _blocks(source, sizes):
            file.write(raw_bytes(rows))
        file.flush()
        os.fsync(file.fileno())


def _blocks(source: TensorSource, names: Iterable[str]) -> Iterator[Tensor]:
    """The tensors' rows in order. All blocks lie in the same memory: fresh pages cost more time than the copy."""
    import torch

    buffer = torch.empty(0, dtype=torch.uint8)
    for name in names:
        shape, dtype = source.shapes()[name], source.dtype(name)
        for start, count in row_blocks(shape, ITEM_BYTES[dtype]):
            size = ITEM_BYTES[dtype] * count * math.prod(shape[1:])
            if size > len(buffer):
                buffer = torch.empty(max(size, BLOCK_BYTES), dtype=torch.uint8)
            rows = buffer[:size].view(getattr(torch, dtype)).view(count, *shape[1:])
            source.fill(name, start, rows)
            yield rows


def _header(source: TensorSource, sizes: Mapping[str, int]) -> bytes:
    """The format's head, its JSON padded with blanks to a multiple of 8 bytes."""
    entries: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for name, size in sizes.items():
        shape, code = list(source.shapes()[name]), _DTYPE_CODES[source.dtype(name)]
        entries[name] = {"dtype": code, "shape": shape, "data_offsets": [offset, offset + size]}
        offset += size
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text
