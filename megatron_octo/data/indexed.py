"""Megatron's indexed datasets: a pair of files, tokens in `.bin` and where each document lies in `.idx`.

Writing goes through megatron-core's own builder, so the bytes are those of Megatron-LM's tool. Reading the header here
needs neither torch nor megatron, and checks what megatron's reader does not: that the two files belong together.
"""

from __future__ import annotations

import contextlib
import hashlib
import math
import struct
import warnings
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from megatron_octo.errors import DataError
from megatron_octo.files import flush_to_disk, hash_file

_MAGIC = b"MMIDIDX\x00\x00"
_HEADER = struct.Struct("<9sQBQQ")  # magic, version, dtype code, sequences, document marks
_DTYPES = {1: np.uint8, 2: np.int8, 3: np.int16, 4: np.int32, 5: np.int64, 8: np.uint16}

_STRETCHES, _STRETCH = 64, 4096


@dataclass(frozen=True)
class Index:
    """What an `.idx` file says, after it was checked against its `.bin`.

    Args:
        prefix: path of the pair without suffix.
        dtype: type of one stored token.
        lengths: tokens of each document, int32 [documents].
        pointers: byte offset of each document in the `.bin`, int64 [documents].
    """

    prefix: Path
    dtype: np.dtype[Any]
    lengths: np.ndarray
    pointers: np.ndarray

    @property
    def documents(self) -> int:
        """Number of documents."""
        return len(self.lengths)

    @property
    def tokens(self) -> int:
        """Tokens of all documents, their end marks included."""
        return int(self.lengths.sum(dtype=np.int64))

    def all_tokens(self) -> np.ndarray:
        """Every stored token in file order, [tokens], mapped and not read."""
        if not self.tokens:
            return np.empty(0, self.dtype)
        return np.memmap(bin_path(self.prefix), dtype=self.dtype, mode="r")

    def document(self, number: int) -> np.ndarray:
        """Tokens of one document, [length]."""
        first = int(self.pointers[number]) // self.dtype.itemsize
        return self.all_tokens()[first : first + int(self.lengths[number])]


def bin_path(prefix: Path) -> Path:
    """The token file of a pair."""
    return Path(f"{prefix}.bin")


def idx_path(prefix: Path) -> Path:
    """The index file of a pair."""
    return Path(f"{prefix}.idx")


class IndexedWriter:
    """Writes one pair under temporary names and publishes it when both files are complete.

    Use as a context manager: what was not published when it ends is deleted.

    Args:
        prefix: path of the pair without suffix; its directory must exist.
        vocabulary: entries of the tokenizer; below 65,500 a token takes two bytes, else four, as in Megatron-LM.
    """

    def __init__(self, prefix: Path, vocabulary: int) -> None:
        megatron = import_indexed_dataset()
        self.prefix = prefix
        self.documents = self.tokens = 0
        self._counts: Counter[int] = Counter()
        self._temporary = Path(f"{prefix}.partial")
        self._builder = megatron.IndexedDatasetBuilder(
            str(bin_path(self._temporary)), dtype=megatron.DType.optimal_dtype(vocabulary)
        )

    def __enter__(self) -> IndexedWriter:
        return self

    def __exit__(self, *error: object) -> None:
        for path in (bin_path, idx_path):
            path(self._temporary).unlink(missing_ok=True)
        with contextlib.suppress(OSError):  # what is left in its buffer may not fit on the disk, and is of no use
            self._builder.data_file.close()

    def add(self, tokens: list[int]) -> None:
        """Append one document, end mark included."""
        self._builder.add_document(tokens, [len(tokens)])
        self.documents += 1
        self.tokens += len(tokens)
        self._counts.update(tokens)

    @property
    def largest_token(self) -> int:
        """The highest token id written."""
        return max(self._counts)

    @property
    def unigram_entropy(self) -> float:
        """Nats per token of a reader who knows only how often each token occurs: the loss to fall below."""
        shares = (count / self.tokens for count in self._counts.values())
        return -sum(share * math.log(share) for share in shares)

    def publish(self) -> None:
        """Write the index, flush both files to disk and give them their names; the `.idx` last."""
        self._builder.finalize(str(idx_path(self._temporary)))
        for path in (bin_path, idx_path):
            flush_to_disk(path(self._temporary))
        idx_path(self.prefix).unlink(missing_ok=True)  # an old index must never stand beside new tokens
        bin_path(self._temporary).replace(bin_path(self.prefix))
        idx_path(self._temporary).replace(idx_path(self.prefix))


def write_indexed(prefix: Path, documents: Iterable[list[int]], vocabulary: int) -> IndexedWriter:
    """Write a whole pair at once; returns the finished writer with its counts."""
    with IndexedWriter(prefix, vocabulary) as writer:
        for document in documents:
            writer.add(document)
        writer.publish()
    return writer


def read_index(prefix: Path) -> Index:
    """Read an index and check it against its token file.

    Args:
        prefix: path of the pair without suffix.

    Returns:
        The index, with lengths and pointers in memory.

    Raises:
        DataError: a file is missing, the index is empty, truncated or not an index, or the pair does not fit together.
    """
    path, raw = idx_path(prefix), _read_pair(prefix)
    if len(raw) < _HEADER.size:
        raise _damaged(path, f"{len(raw)} bytes are too few for an index")
    magic, version, code, count, marks = _HEADER.unpack_from(raw)
    if magic != _MAGIC:
        raise _damaged(path, "it does not start with the mark of a Megatron index")
    if version != 1 or code not in _DTYPES:
        raise _damaged(path, f"version {version} with token type {code} is unknown")
    expected = _HEADER.size + count * (4 + 8) + marks * 8
    if len(raw) != expected:
        raise _damaged(path, f"{len(raw)} bytes, but its {count} documents need {expected}")
    offset = _HEADER.size
    lengths = np.frombuffer(raw, np.int32, count, offset)
    pointers = np.frombuffer(raw, np.int64, count, offset + 4 * count)
    ends = np.frombuffer(raw, np.int64, marks, offset + 12 * count)
    index = Index(prefix, np.dtype(_DTYPES[code]), lengths, pointers)
    _check_contents(index, ends)
    return index


def _read_pair(prefix: Path) -> bytes:
    for path in (bin_path(prefix), idx_path(prefix)):
        if not path.is_file():
            named = prefix.suffix in (".bin", ".idx")
            raise DataError(
                f"{path} {'is not a file' if path.exists() else 'does not exist'}",
                "an indexed dataset is a pair .bin and .idx",
                f"name it without suffix: {prefix.with_suffix('')}" if named else _where_to_look(prefix),
            )
    return idx_path(prefix).read_bytes()


def _where_to_look(prefix: Path) -> str:
    start = "" if prefix.is_absolute() else f"; a relative path starts from here, {Path.cwd()}"
    return f"build it with `octo data build`, or mend the path{start}"


def _check_contents(index: Index, ends: np.ndarray) -> None:
    path, count, size = idx_path(index.prefix), index.documents, index.dtype.itemsize
    if count and int(index.lengths.min()) < 0:
        raise _damaged(path, "it holds a negative document length")
    ends_of_documents = np.cumsum(index.lengths, dtype=np.int64) * size
    if not np.array_equal(index.pointers, ends_of_documents - index.lengths.astype(np.int64) * size):
        raise _damaged(path, "its document positions do not follow from its document lengths")
    if not np.array_equal(ends, np.arange(count + 1)):
        raise _damaged(path, "its document marks do not run from 0 to the number of documents")
    stored, expected = bin_path(index.prefix).stat().st_size, index.tokens * size
    if stored != expected:
        raise _damaged(
            bin_path(index.prefix), f"{stored} bytes, but {path.name} counts {index.tokens} tokens in {expected} bytes"
        )


def _damaged(path: Path, reason: str) -> DataError:
    return DataError(f"{path} is damaged: {reason}", "it must be exactly what was written", "build it again")


def inspect(prefix: Path, first: int = 3, tokenizer: Path | None = None) -> dict[str, Any]:
    """Facts about a pair, for people.

    Args:
        prefix: path of the pair without suffix.
        first: how many documents to show.
        tokenizer: directory to decode with; by default `tokenizer/` beside the pair, if there.

    Returns:
        documents, tokens, dtype, bytes, largest_token, shortest, longest and `first`: the first documents as text
        (as token ids where there is no tokenizer).

    Raises:
        DataError: the pair is missing or damaged.
    """
    index = read_index(prefix)
    directory = tokenizer or prefix.parent / "tokenizer"
    shown = [index.document(number).tolist() for number in range(min(first, index.documents))]
    if (directory / "tokenizer.json").is_file():
        from megatron_octo.data.encode import Encoder

        shown = [Encoder(directory).decode(tokens) for tokens in shown]
    tokens = index.all_tokens()
    return {
        "prefix": str(prefix),
        "documents": index.documents,
        "tokens": index.tokens,
        "dtype": index.dtype.name,
        "bytes": tokens.nbytes,
        "largest_token": int(tokens.max()) if len(tokens) else None,
        "shortest": int(index.lengths.min()) if index.documents else None,
        "longest": int(index.lengths.max()) if index.documents else None,
        "first": shown,
    }


def stray_token(tokens: np.ndarray, vocabulary: int) -> int | None:
    """A token that is no row of the model's embedding, too large or below 0; None if there is none."""
    if not len(tokens):
        return None
    largest, smallest = int(tokens.max()), int(tokens.min())
    return largest if largest >= vocabulary else smallest if smallest < 0 else None


def content_digest(index: Index) -> dict[str, str]:
    """What tells a dataset from another, wherever it lies.

    Returns:
        `index`: SHA-256 of the `.idx`, the lengths of all documents; and `tokens`: a `spot_digest` of the `.bin`, which
        shows another text or tokenizer: to read all tokens at each start would take hours.
    """
    return {"index": hash_file(idx_path(index.prefix)), "tokens": spot_digest(bin_path(index.prefix))}


def spot_digest(path: Path) -> str:
    """SHA-256 of 64 stretches of 4 KiB from all over a file: of other content, or with a hole from a copy in part."""
    digest, size = hashlib.sha256(), path.stat().st_size
    with path.open("rb") as file:
        for number in range(_STRETCHES):
            file.seek(max(0, size - _STRETCH) * number // (_STRETCHES - 1))
            digest.update(file.read(_STRETCH))
    return digest.hexdigest()


def import_indexed_dataset() -> Any:
    """Import megatron-core's indexed dataset module without its warnings about kernels that data does not need."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from megatron.core.datasets import indexed_dataset
    return indexed_dataset
