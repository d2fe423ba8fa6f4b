"""Files of one JSON object a line: plain or compressed, here or behind a URL, told apart by line number."""

from __future__ import annotations

import io
import json
import math
import zlib
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import IO, Any

import orjson
import zstandard

from megatron_octo.data.corpora.render import BadRecord
from megatron_octo.errors import DataError, OctoError

_CHUNK = 1 << 20
_COMPRESSED = 1 << 14  # compressed bytes that are expanded in one go, to whatever they hold
_GZIP = 16 + zlib.MAX_WBITS  # zlib's word for gzip: with header and checksum
_BOM = b"\xef\xbb\xbf"


@contextmanager
def open_input(path: str) -> Iterator[IO[bytes]]:
    """Open a local file or a URL that fsspec knows, as it is, for reading.

    Raises:
        OSError: it cannot be read; of a URL, whatever went wrong, for each file system has errors of its own.
    """
    if "://" not in path:
        with open(path, "rb", buffering=_CHUNK) as file:
            yield file
        return
    import fsspec

    try:
        with fsspec.open(path, "rb") as file:
            yield file
    except (OctoError, EOFError, zlib.error, zstandard.ZstdError, OSError):
        raise
    except Exception as error:
        raise OSError(f"{type(error).__name__}: {error}") from None


def numbered_lines(path: str, part: tuple[int, int] | None = None, first: int = 0) -> Iterator[tuple[int, bytes]]:
    """Read a file line by line; memory for one line and a buffer.

    Args:
        path: compressed where its name ends in `.gz` or `.zst`.
        part: bytes of a plain file, first and one beyond the last: the lines that begin there are read.
        first: lines that begin before.

    Yields:
        Number of the line, from 1, and its bytes, less a byte order mark at the start of the file.

    Raises:
        DataError: the file is missing or unreadable, or compressed and cut short.
    """
    number = first
    try:
        with open_input(path) as raw:
            for number, line in enumerate(_lines(raw, path, part), first + 1):
                yield number, line.removeprefix(_BOM) if number == 1 else line
    except (OSError, EOFError, zlib.error, zstandard.ZstdError) as error:
        raise DataError(
            f"{path} cannot be read beyond line {number} ({error})",
            "a file that ends early may lack any number of documents",
            "fetch the file again",
        ) from None


def _lines(raw: IO[bytes], path: str, part: tuple[int, int] | None) -> Iterable[bytes]:
    if path.endswith(".gz"):
        return io.BufferedReader(_Expanded(raw, lambda: zlib.decompressobj(_GZIP), padding=b"\0"), _CHUNK)
    if path.endswith((".zst", ".zstd")):
        return io.BufferedReader(_Expanded(raw, lambda: zstandard.ZstdDecompressor().decompressobj()), _CHUNK)
    return raw if part is None else _lines_within(raw, part)


def _lines_within(raw: IO[bytes], part: tuple[int, int]) -> Iterator[bytes]:
    place = max(0, part[0] - 1)
    raw.seek(place)
    if part[0]:
        place += len(raw.readline())  # the end of a line of the part before
    while place < part[1] and (line := raw.readline()):
        place += len(line)
        yield line


class _Expanded(io.RawIOBase):
    """Frames of Zstandard or members of gzip, one after another.

    Unlike the libraries' own readers it notices that the last frame is cut or that there is none, and gives all that
    comes before.
    """

    def __init__(self, raw: IO[bytes], new_frame: Callable[[], Any], padding: bytes = b"") -> None:
        self._raw, self._new_frame, self._padding = raw, new_frame, padding
        self._frame: Any = None
        self._rest, self._left, self._ended = b"", memoryview(b""), False

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while not self._left and (compressed := self._next()):
            if self._frame is None:
                self._frame = self._new_frame()
            self._left = memoryview(self._frame.decompress(compressed))
            if self._frame.eof:
                self._rest, self._frame, self._ended = self._frame.unused_data, None, True
        count = min(len(buffer), len(self._left))
        buffer[:count], self._left = self._left[:count], self._left[count:]
        return count

    def _next(self) -> bytes:
        """Compressed bytes to go on with; none at a proper end."""
        found, self._rest = self._rest, b""
        while True:
            if not (found := found or self._raw.read(_COMPRESSED)):
                if self._frame is not None or not self._ended:
                    raise EOFError("it has 0 bytes" if self._frame is None else "its last frame is cut short")
                return b""
            if self._frame is None and self._ended:
                found = found.lstrip(self._padding)
            if found:
                return found


def parse_line(line: bytes, keys: tuple[tuple[str, bytes], ...] = ()) -> dict[str, Any]:
    """The object of a line.

    Args:
        line: one line, with or without its end.
        keys: names that must not stand twice, each with its bytes in quotes.

    Raises:
        BadRecord: it is empty, damaged, no object, or says one of the names twice.
    """
    try:
        record = orjson.loads(line)
    except ValueError as error:
        raise _what_is_wrong(line, error) from None
    if type(record) is not dict:
        raise BadRecord(f"a JSON {type(record).__name__} and not an object")
    for key, quoted in keys:
        if key in record and line.find(quoted) != line.rfind(quoted):
            _refuse_twice(line, key)
    return record


def text_of(record: dict[str, Any], name: str) -> str:
    """Take a text out of a record.

    Raises:
        BadRecord: the field is missing, no text, blank, or holds what no text file may hold.
    """
    if name not in record:
        raise BadRecord(f"no field {name!r}", f" (it has {', '.join(map(repr, record)) or 'none'})")
    text = record[name]
    if not isinstance(text, str):
        raise BadRecord(f"field {name!r} is {'null' if text is None else type(text).__name__} and not text")
    if not text or text.isspace():
        raise BadRecord(f"field {name!r} is empty")
    if "\0" in text:
        raise BadRecord(f"field {name!r} holds a NUL character")
    return text


def _refuse_twice(line: bytes, key: str) -> None:
    """Look closely at a line that seems to have a key twice; keys of objects within it do not count."""
    pairs: list[tuple[str, Any]] = json.loads(line, object_pairs_hook=lambda pairs: pairs)
    if sum(name == key for name, _ in pairs) > 1:
        raise BadRecord(f"field {key!r} stands twice")


def _what_is_wrong(line: bytes, error: ValueError) -> BadRecord:
    """Name what a fast parser refuses without saying where."""
    if not line.strip():
        return BadRecord("the line is empty")
    if b"\0" in line:
        return BadRecord("it holds a NUL byte", f", byte {line.index(0) + 1} of the line")
    odd: list[str] = []  # what Python's json writes and reads, and JSON does not know
    try:
        json.loads(
            line.decode("utf-8"),
            parse_constant=lambda name: odd.append(f"{name} is not JSON"),
            parse_float=lambda number: odd.append(f"{number[:20]} is too large") if math.isinf(float(number)) else None,
        )
    except UnicodeDecodeError as wrong:
        return BadRecord("not UTF-8", f" at byte {wrong.start + 1} of the line")
    except (ValueError, RecursionError) as wrong:
        return BadRecord("not JSON", f" ({wrong})")
    if odd:
        return BadRecord("not JSON", f" ({odd[0]})")
    if "surrogate" in str(error):
        return BadRecord("it holds half of a surrogate pair")
    return BadRecord("not JSON", f" ({error})")
