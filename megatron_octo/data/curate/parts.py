"""What every step of a curation knows: its settings, its directories, and the shards it goes through."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import orjson
import xxhash
import zstandard
from datatrove.data import Document

from megatron_octo.config.curate import CurateConfig
from megatron_octo.data.corpora.read import Accounts, ShardReader
from megatron_octo.data.corpora.shard import Shard
from megatron_octo.data.engine.inputs import Version
from megatron_octo.data.engine.publish import RESULT, WORK
from megatron_octo.data.engine.stage import FILES
from megatron_octo.files import hash_file, replacing

_LEVEL = 3  # of Zstandard


@dataclass(frozen=True)
class Curation:
    """What every task knows.

    Args:
        config: the curation.
        out: its directory, absolute.
    """

    config: CurateConfig
    out: Path

    @property
    def work(self) -> Path:
        """Directory of records and of what later steps need."""
        return self.out / WORK

    @property
    def result(self) -> Path:
        """Directory where the result grows."""
        return self.work / RESULT

    def file(self, kind: str, number: int, suffix: str) -> Path:
        """What a step leaves of one shard for later ones."""
        return self.work / kind / f"{number:05}{suffix}"

    def shard_file(self, kind: str, number: int) -> Path:
        """Documents of one shard in the result."""
        return self.result / kind / f"{number:05}.jsonl.zst"

    def answers(self, step: str, shard: Shard) -> Path:
        """The log of a model's answers about one shard. Where it is cut otherwise, answers of other logs count too."""
        name = f"{shard.corpus}/{shard.name}:{shard.first}:{shard.part}"
        return self.out / "answers" / step / f"{hashlib.sha256(name.encode()).hexdigest()[:16]}.jsonl"


@dataclass(frozen=True)
class Part:
    """One shard of the corpora.

    Args:
        number: its place among all shards.
        shard: what to read.
        version: of its file.
    """

    number: int
    shard: Shard
    version: Version | None


def read_shard(
    curation: Curation, part: Part, accounts: Accounts | None = None, keep: Sequence[str] = ()
) -> Iterator[Document]:
    """The documents of a shard.

    Args:
        curation: the curation.
        part: the shard.
        accounts: what was read is added to it at the end.
        keep: fields of the records to put into the documents' metadata, where a record has them.
    """
    reader = ShardReader(curation.config, part.shard, keep)
    yield from reader
    if accounts is not None:
        vars(accounts).update(vars(accounts + reader.accounts))


def write_documents(path: Path, records: Iterable[dict[str, Any]]) -> dict[str, Any]:
    """Write records as lines of a compressed file, completely or not at all; no file where there are none.

    Returns:
        `documents`, and the file's `bytes` and `sha256`.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    path.unlink(missing_ok=True)
    documents = 0
    with replacing(path) as temporary:
        with temporary.open("wb") as raw, zstandard.ZstdCompressor(_LEVEL).stream_writer(raw) as file:
            for record in records:
                file.write(orjson.dumps(record) + b"\n")
                documents += 1
        facts = {"documents": documents, "bytes": temporary.stat().st_size, "sha256": hash_file(temporary)}
    if not documents:
        path.unlink()
    return facts


def read_documents(path: Path) -> Iterator[dict[str, Any]]:
    """The records of such a file; none where there is no file."""
    if not path.exists():
        return
    with path.open("rb") as raw, zstandard.ZstdDecompressor().stream_reader(raw) as stream:
        rest = b""
        while chunk := stream.read(1 << 20):
            *lines, rest = (rest + chunk).split(b"\n")
            yield from map(orjson.loads, lines)


def left(curation: Curation, *paths: Path) -> dict[str, dict[str, int]]:
    """What a task's facts say of the files it left."""
    found = [path for path in paths if path.exists()]
    return {FILES: {str(path.relative_to(curation.work)): path.stat().st_size for path in found}}


def all_left(facts: Iterable[dict[str, Any]]) -> dict[str, dict[str, int]]:
    """What the facts of several tasks say of the files they left."""
    return {FILES: {name: size for fact in facts for name, size in fact[FILES].items()}}


def random_number(seed: int, use: str, text: str) -> int:
    """A number from 0 to 2^64 - 1 that follows from these alone: the same on any machine, in any order of reading."""
    return xxhash.xxh3_64_intdigest(f"{seed}/{use}/{text}".encode())


def count(counts: dict[str, int], name: str, amount: int = 1) -> None:
    """Add to a count that may not be there yet."""
    counts[name] = counts.get(name, 0) + amount


def total(facts: Iterable[dict[str, Any]], name: str) -> Any:
    """The sum over tasks of one fact: a number, or counts by name."""
    values = [fact[name] for fact in facts if name in fact]
    if not values or not isinstance(values[0], dict):
        return sum(values)
    names = sorted({key for value in values for key in value})
    return {key: sum(value.get(key, 0) for value in values) for key in names}
