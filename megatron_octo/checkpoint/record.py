"""Where the values of a tensor that torch saved lie in its file: found without loading it or running its pickle.

`torch.save` writes an uncompressed zip archive: a pickle that describes the tensor, and one record of plain bytes.
"""

from __future__ import annotations

import io
import math
import pickle
import struct
import zipfile
from typing import IO, TYPE_CHECKING, Any, NamedTuple

import torch

from megatron_octo.errors import OctoError
from megatron_octo.locations import read_range

if TYPE_CHECKING:
    from megatron_octo.locations import Location

_HEADER = struct.Struct("<26xHH")
"""A zip entry's own header ends with the lengths of its name and of its padding, which both follow it."""

_STORAGES = {
    "FloatStorage": torch.float32,
    "BFloat16Storage": torch.bfloat16,
    "HalfStorage": torch.float16,
    "DoubleStorage": torch.float64,
    "LongStorage": torch.int64,
    "IntStorage": torch.int32,
    "ByteStorage": torch.uint8,
    "BoolStorage": torch.bool,
}
_LONGEST_PICKLE = 1 << 20
_END = 1 << 12


class Unreadable(Exception):
    """Why an archive does not hold the one tensor it should."""


def find_values(file: Location, start: int, length: int, shape: tuple[int, ...], dtype: torch.dtype) -> int:
    """Position of a saved tensor's first value in a file of many; they follow each other in row-major order.

    Args:
        file: a local or a remote file.
        start: where the archive begins that `torch.save` wrote for this tensor.
        length: of the archive, in bytes.
        shape: the shape the tensor must have.
        dtype: the dtype it must have.

    Raises:
        Unreadable: it is damaged, compressed, names code it should not, or holds another tensor.
        DataError: the file ends before.
        OSError: it cannot be read.
    """
    try:
        archive = io.BufferedReader(_Window(file, start, length))
        with zipfile.ZipFile(archive) as entries:
            records = {entry.filename.partition("/")[2]: entry for entry in entries.infolist()}
        order = records.get("byteorder")
        if order is not None and _content(archive, order) != b"little":
            raise Unreadable("its bytes are not little-endian")
        description = _Description(io.BytesIO(_content(archive, records["data.pkl"]))).load()
        values = records[f"data/{description.storage.key}"]
        first = _start(archive, values)
        found = (tuple(description.shape), description.storage.dtype)
        if found != (shape, dtype):
            raise Unreadable(f"it holds {_words(*found)}, listed is {_words(shape, dtype)}")
        if description.start or not _row_major(shape, tuple(description.strides)):
            raise Unreadable("its values are not in row-major order")
    except (Unreadable, OctoError, OSError):
        raise
    except Exception as error:  # damage to an archive or a pickle shows in every way there is
        raise Unreadable(f"it is not one saved tensor ({str(error) or type(error).__name__})") from None
    if values.file_size != math.prod(shape) * dtype.itemsize:
        raise Unreadable(f"it holds {values.file_size} bytes of values for {_words(shape, dtype)}")
    return start + first


class _Window(io.RawIOBase):
    """A run of a file's bytes as a file. What describes a tensor lies at both ends; each is read once."""

    def __init__(self, file: Location, start: int, length: int) -> None:
        self._file, self._start, self._length, self._position = file, start, length, 0
        tail = max(0, length - _END)
        self._ends = [(0, self._bytes(0, min(_END, length))), (tail, self._bytes(tail, length - tail))]

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        origin = {io.SEEK_SET: 0, io.SEEK_CUR: self._position, io.SEEK_END: self._length}[whence]
        if origin + offset < 0:
            raise ValueError("it points before its start")
        self._position = origin + offset
        return self._position

    def readinto(self, buffer: Any) -> int:
        count = max(0, min(len(buffer), self._length - self._position))
        for at, content in self._ends:
            if at <= self._position and self._position + count <= at + len(content):
                found = content[self._position - at :][:count]
                break
        else:
            found = self._bytes(self._position, count)
        buffer[:count] = found
        self._position += count
        return count

    def _bytes(self, position: int, count: int) -> bytearray:
        content = bytearray(count)
        read_range(self._file, self._start + position, memoryview(content))
        return content


class _Storage(NamedTuple):
    dtype: torch.dtype
    key: str


class _Tensor(NamedTuple):
    storage: _Storage
    start: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]


class _Description(pickle.Unpickler):
    """Reads the pickle of a saved tensor as plain values; nothing that it names is imported or called."""

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) == ("torch._utils", "_rebuild_tensor_v2"):
            return lambda storage, start, shape, strides, *_: _Tensor(storage, start, shape, strides)
        if (module, name) == ("collections", "OrderedDict"):
            return dict
        if module == "torch" and name in _STORAGES:
            return _STORAGES[name]
        raise pickle.UnpicklingError(f"it names {module}.{name}")

    def persistent_load(self, pid: Any) -> Any:
        kind, dtype, key, _device, _length = pid
        if kind != "storage" or not isinstance(dtype, torch.dtype):
            raise pickle.UnpicklingError("it refers to something that is not a tensor's storage")
        return _Storage(dtype, key)


def _start(archive: IO[bytes], entry: zipfile.ZipInfo) -> int:
    if entry.compress_type != zipfile.ZIP_STORED:
        raise Unreadable("it is compressed")
    archive.seek(entry.header_offset)
    return entry.header_offset + _HEADER.size + sum(_HEADER.unpack(archive.read(_HEADER.size)))


def _content(archive: IO[bytes], entry: zipfile.ZipInfo) -> bytes:
    # Read here and not by zipfile: checksums may be switched off where a seal covers the file.
    if entry.file_size > _LONGEST_PICKLE:
        raise Unreadable(f"its {entry.filename} is {entry.file_size} bytes long")
    archive.seek(_start(archive, entry))
    return archive.read(entry.file_size)


def _row_major(shape: tuple[int, ...], strides: tuple[int, ...]) -> bool:
    expected = 1
    for length, stride in zip(reversed(shape), reversed(strides), strict=True):
        if length != 1 and stride != expected:
            return False
        expected *= length
    return True


def _words(shape: tuple[int, ...], dtype: torch.dtype) -> str:
    return f"{list(shape)} {str(dtype).removeprefix('torch.')}"
