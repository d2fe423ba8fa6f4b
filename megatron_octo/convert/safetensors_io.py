"""Weights as safetensors: read lazily from a directory, written shard by shard as tensors arrive.

Only safetensors is read. Pickled weights can run code when they are opened, so they are refused unopened.
"""

from __future__ import annotations

import json
import os
import struct
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megatron_octo.convert.rules import Shape
from megatron_octo.errors import DataError
from megatron_octo.files import write_json

if TYPE_CHECKING:
    from torch import Tensor

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
SHARD_BYTES = 5 * 10**9
"""Largest shard by default, as `transformers` writes them."""

_PICKLED = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl")
_DTYPE_NAMES = {"float32": "F32", "bfloat16": "BF16", "float16": "F16"}


class SafetensorsDirectory:
    """The weights of one Hugging Face directory; use as a context manager.

    Args:
        directory: holds `model.safetensors`, or shards and `model.safetensors.index.json`.

    Raises:
        DataError: no weights, pickled weights only, a shard missing or damaged, or index and shards disagree.
    """

    def __init__(self, directory: Path) -> None:
        self.where = str(directory)
        self._directory = directory
        self._stack = ExitStack()
        self._file_of: dict[str, Any] = {}
        self._shapes: dict[str, Shape] = {}
        self.dtypes: dict[str, str] = {}
        """safetensors' name of each tensor's dtype, e.g. "BF16"."""
        try:
            self._open()
        except BaseException:
            self._stack.close()
            raise

    def __enter__(self) -> SafetensorsDirectory:
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def shapes(self) -> Mapping[str, Shape]:
        """Shape of every tensor, from the files' headers."""
        return self._shapes

    def read(self, name: str) -> Tensor:
        """One tensor, on CPU."""
        return self._file_of[name].get_tensor(name)

    def _open(self) -> None:
        listed = _weight_map(self._directory)
        for shard in sorted(set(listed.values())) if listed else [SINGLE_FILE]:
            self._open_shard(shard, listed)
        absent = [name for name in listed or () if name not in self._file_of]
        if absent:
            raise DataError(
                f"{self._directory / INDEX_FILE}: lists {absent[0]}, which no shard holds",
                "the index and the shards must agree", "copy the directory again",
            )  # fmt: skip

    def _open_shard(self, shard: str, listed: Mapping[str, str] | None) -> None:
        path = self._directory / shard
        opened = self._stack.enter_context(_open_safetensors(path))
        for name in opened.keys():  # noqa: SIM118 - not a mapping
            if name in self._file_of:
                raise DataError(f"{path}: holds {name}, which another shard holds too", "each tensor is stored once")
            if listed is not None and listed.get(name) != shard:
                raise DataError(f"{path}: holds {name}, which {INDEX_FILE} does not place there")
            view = opened.get_slice(name)
            self._file_of[name] = opened
            self._shapes[name] = tuple(view.get_shape())
            self.dtypes[name] = view.get_dtype()


@dataclass(frozen=True, slots=True)
class Planned:
    """A tensor to be written: name, shape and dtype (torch's name without the prefix, e.g. "bfloat16")."""

    name: str
    shape: Shape
    dtype: str

    @property
    def bytes(self) -> int:
        """Size on disk."""
        count = {"float32": 4}.get(self.dtype, 2)
        for length in self.shape:
            count *= length
        return count


def write_safetensors(
    directory: Path, plan: list[Planned], tensors: Iterable[tuple[str, Tensor]], shard_bytes: int = SHARD_BYTES
) -> list[str]:
    """Write tensors as they come, holding one at a time.

    Args:
        directory: exists; receives `model.safetensors`, or shards and their index.
        plan: every tensor in the order in which `tensors` yields them: the headers are written first.
        tensors: (name, tensor) pairs; a tensor is cast to the planned dtype.
        shard_bytes: a shard that would grow over this is closed; a larger tensor gets its own.

    Returns:
        The names of the files written.

    Raises:
        DataError: a dtype safetensors files of ours do not hold.
        ValueError: the stream does not follow the plan.
    """
    shards = _split(plan, shard_bytes)
    names = [SINGLE_FILE]
    if len(shards) > 1:
        names = [f"model-{number:05d}-of-{len(shards):05d}.safetensors" for number in range(1, len(shards) + 1)]
    stream = iter(tensors)
    for file_name, shard in zip(names, shards, strict=True):
        _write_shard(directory / file_name, shard, stream)
    if next(stream, None) is not None:
        raise ValueError("more tensors than planned")
    if len(shards) == 1:
        return names
    weight_map = {item.name: name for name, shard in zip(names, shards, strict=True) for item in shard}
    index = {"metadata": {"total_size": sum(item.bytes for item in plan)}, "weight_map": weight_map}
    write_json(directory / INDEX_FILE, index)
    return [*names, INDEX_FILE]


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object.

    Raises:
        DataError: missing, not JSON, or not an object.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise DataError(f"{path}: missing", fix="check the path, or copy the directory again") from None
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise DataError(f"{path}: not readable as JSON ({error})") from None
    if not isinstance(content, dict):
        raise DataError(f"{path}: holds {type(content).__name__}", "it must be a JSON object")
    return content


def _weight_map(directory: Path) -> dict[str, str] | None:
    """Tensor name -> file of a sharded directory, None for one with a single file."""
    if not directory.is_dir():
        raise DataError(f"{directory}: no such directory", fix="name a Hugging Face model directory")
    if (directory / INDEX_FILE).is_file():
        listed = read_json(directory / INDEX_FILE).get("weight_map")
        if not isinstance(listed, dict) or not listed:
            raise DataError(f"{directory / INDEX_FILE}: has no weight_map")
        outside = [name for name in listed.values() if not isinstance(name, str) or Path(name).name != name]
        if outside:
            raise DataError(f"{directory / INDEX_FILE}: names {outside[0]!r}", "shards lie beside their index")
        return listed
    if (directory / SINGLE_FILE).is_file():
        return None
    pickled = sorted(path.name for pattern in _PICKLED for path in directory.glob(pattern))
    if pickled:
        raise DataError(
            f"{directory}: holds pickled weights ({pickled[0]}) and no safetensors",
            "opening a pickle can run code", "save the model again with safe_serialization=True",
        )  # fmt: skip
    raise DataError(f"{directory}: holds neither {SINGLE_FILE} nor {INDEX_FILE}", fix="name a model directory")


def _open_safetensors(path: Path) -> Any:
    from safetensors import SafetensorError, safe_open

    if not path.is_file():
        raise DataError(f"{path}: missing", f"{INDEX_FILE} names it", "copy the directory again, whole")
    try:
        return safe_open(path, framework="pt")
    except (SafetensorError, OSError) as error:
        raise DataError(f"{path}: not a safetensors file ({error})", fix="copy the file again") from None


def _split(plan: list[Planned], shard_bytes: int) -> list[list[Planned]]:
    shards: list[list[Planned]] = [[]]
    for item in plan:
        if shards[-1] and sum(held.bytes for held in shards[-1]) + item.bytes > shard_bytes:
            shards.append([])
        shards[-1].append(item)
    return shards


def _write_shard(path: Path, shard: list[Planned], stream: Iterator[tuple[str, Tensor]]) -> None:
    with path.open("wb") as file:
        file.write(_header(shard))
        for planned in shard:
            name, tensor = next(stream, (None, None))
            if name is None or tensor is None:
                raise ValueError(f"the stream ended where {planned.name} was planned")
            if name != planned.name or tuple(tensor.shape) != planned.shape:
                raise ValueError(f"{name} {list(tensor.shape)} came where {planned.name} {planned.shape} was planned")
            file.write(_raw(tensor, planned.dtype))
        file.flush()
        os.fsync(file.fileno())


def _header(shard: list[Planned]) -> bytes:
    """The format's head: length (8 bytes, little-endian), JSON padded with blanks to a multiple of 8."""
    entries: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for item in shard:
        if item.dtype not in _DTYPE_NAMES:
            raise DataError(f"{item.name}: dtype {item.dtype}", f"weights are one of {', '.join(_DTYPE_NAMES)}")
        ends = [offset, offset + item.bytes]
        entries[item.name] = {"dtype": _DTYPE_NAMES[item.dtype], "shape": list(item.shape), "data_offsets": ends}
        offset += item.bytes
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text


def _raw(tensor: Tensor, dtype: str) -> memoryview:
    import torch

    cast = tensor.detach().to(device="cpu", dtype=getattr(torch, dtype)).contiguous()
    return cast.flatten().view(torch.uint8).numpy().data
