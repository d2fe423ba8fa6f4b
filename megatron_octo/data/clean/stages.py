"""The stages of a build that find what to leave out: they end with one file of removals a shard."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from megatron_octo.config.data import DataBuildConfig
from megatron_octo.data.clean.exact import Keys, duplicates, pairs_of
from megatron_octo.data.clean.removals import CLEAN, EXACT, Removal, excerpt_of, write_removals
from megatron_octo.data.engine.stage import FILES, Stage, advance
from megatron_octo.files import write_bytes

FORMAT = 1
"""Part of what every stage is made from: raised when the same settings and inputs give another result."""

SIGNATURES, DUPLICATES, REMOVALS = "signatures", "duplicates", "removals"
_EXAMPLES = 3  # removals of each reason that a task's facts show

Read = Callable[[Any], Iterable[Any]]
"""Opens a shard: yields its documents, with `text` and `id`, the same ones in the same order every time."""


@dataclass(frozen=True)
class Cleaning:
    """What every task knows.

    Args:
        config: the build.
        work: its work directory.
        read: opens a shard.
    """

    config: DataBuildConfig
    work: Path
    read: Read

    def path(self, kind: str, number: int) -> Path:
        """A file of one task of a stage."""
        return self.work / CLEAN / kind / f"{number:05}"

    def files(self, *paths: Path) -> dict[str, int]:
        """What a task's facts say of the files it left."""
        return {str(path.relative_to(self.work)): path.stat().st_size for path in paths}


@dataclass(frozen=True)
class Part:
    """One shard.

    Args:
        number: its place among all shards of the build that are cleaned.
        shard: what to read.
        sha256: what its file hashes to.
    """

    number: int
    shard: Any
    sha256: str | None


@dataclass(frozen=True)
class Bucket:
    """One partition of the hashes of all shards: its number, and how many shards there are."""

    number: int
    shards: int


def clean_stages(
    config: DataBuildConfig,
    shards: dict[str, list[Any]],
    work: Path,
    hashes: dict[str, str],
    read: Read | None = None,
) -> list[Stage]:
    """The stages that find duplicates and leaks; none where the build asks for neither.

    Args:
        config: the build. The world's text is not cleaned: it has no shard with a path.
        shards: of each corpus, in the order in which documents are kept.
        work: work directory of the build.
        hashes: SHA-256 of the input files by path; names and sizes of the stages do not depend on them.
        read: opens a shard; by default its `ShardReader`.

    Returns:
        In order. The facts of a `removals` task: `removed`, how many by reason, and `examples`.
    """
    wanted = config.deduplicate
    if wanted is None:
        return []
    found = [shard for name in shards for shard in shards[name] if shard.path]
    parts = [Part(number, shard, hashes.get(shard.path)) for number, shard in enumerate(found)]
    cleaning = Cleaning(config, work, read or partial(open_shard, config))
    own = {"format": FORMAT, "settings": wanted.model_dump(mode="json"), "on_bad_line": config.on_bad_line}
    own["corpora"] = {name: corpus.model_dump(mode="json") for name, corpus in config.corpora.items()}
    whole = {**own, "shards": [part.sha256 for part in parts]}
    stages = [Stage(SIGNATURES, parts, partial(look, cleaning), own)]
    if wanted.exact:
        buckets = [Bucket(number, len(parts)) for number in range(wanted.partitions)]
        stages.append(Stage(DUPLICATES, buckets, partial(find_duplicates, cleaning), whole))
    return [*stages, Stage(REMOVALS, parts, partial(decide, cleaning), whole)]


def open_shard(config: DataBuildConfig, shard: Any) -> Iterator[Any]:
    """The documents of a shard as the build reads them."""
    from megatron_octo.data.corpora.read import ShardReader

    return iter(ShardReader(config, shard))


def look(cleaning: Cleaning, part: Part) -> dict[str, Any]:
    """Read a shard once and leave what is needed to compare its documents: hashes and ids."""
    wanted = cleaning.config.deduplicate
    assert wanted is not None
    keys, names, size = Keys(wanted.partitions), Names(), 0
    for place, document in enumerate(cleaning.read(part.shard)):
        names.add(document.id)
        keys.add(place, document.text)
        size += len(document.text)
        advance(1)
    ids, hashes = cleaning.path("ids", part.number), cleaning.path("hashes", part.number)
    names.write(ids)
    keys.write(hashes)
    return {"documents": len(names), "characters": size, FILES: cleaning.files(ids, hashes)}


def find_duplicates(cleaning: Cleaning, bucket: Bucket) -> dict[str, Any]:
    """Find the exact duplicates of one partition, over all shards."""
    wanted = cleaning.config.deduplicate
    assert wanted is not None
    files = [cleaning.path("hashes", number) for number in range(bucket.shards)]
    path = cleaning.path("exact", bucket.number)
    pairs = duplicates(files, bucket.number, wanted.partitions)
    save_pairs(path, pairs)
    return {"duplicates": len(pairs), FILES: cleaning.files(path)}


def save_pairs(path: Path, pairs: np.ndarray) -> None:
    """Write ordered pairs, completely or not at all; `exact.pairs_of` reads them."""
    import io

    content = io.BytesIO()
    np.save(content, pairs)
    write_bytes(path, content.getvalue())


def decide(cleaning: Cleaning, part: Part) -> dict[str, Any]:
    """Write what to leave out of a shard; it is read again only where there is something to show."""
    wanted = cleaning.config.deduplicate
    assert wanted is not None
    found = pairs_of([cleaning.path("exact", number) for number in range(wanted.partitions)], part.number)
    removals = list(_shown(cleaning, part, found)) if len(found) else []
    path = write_removals(cleaning.work, part.shard, removals)
    examples = [removal for reason in (EXACT,) for removal in [r for r in removals if r.reason == reason][:_EXAMPLES]]
    return {
        "removed": dict(Counter(removal.reason for removal in removals)),
        "examples": [vars(removal) for removal in examples],
        FILES: cleaning.files(path),
    }


def _shown(cleaning: Cleaning, part: Part, pairs: np.ndarray) -> Iterator[Removal]:
    kept = dict(zip(pairs["place"].tolist(), _kept_ids(cleaning, pairs), strict=True))
    for place, document in enumerate(cleaning.read(part.shard)):
        if place in kept:
            yield Removal(place, EXACT, document.id, kept[place], excerpt_of(document.text))


def _kept_ids(cleaning: Cleaning, pairs: np.ndarray) -> list[str]:
    found = [""] * len(pairs)
    for shard in np.unique(pairs["kept_shard"]):
        rows = np.flatnonzero(pairs["kept_shard"] == shard)
        for row, name in zip(rows, read_names(cleaning.path("ids", shard), pairs["kept_place"][rows]), strict=True):
            found[row] = name
    return found


class Names:
    """Collects the ids of a shard's documents, `<corpus>/<file>:<line or row>`, in 8 bytes each."""

    def __init__(self) -> None:
        self._prefix, self._numbers = "", bytearray()

    def __len__(self) -> int:
        return len(self._numbers) // 8

    def add(self, name: str) -> None:
        """Note the id of the next document."""
        self._prefix, _, number = name.rpartition(":")
        self._numbers += int(number).to_bytes(8, "little")

    def write(self, path: Path) -> None:
        """Write them: a line with what they share, then the numbers."""
        write_bytes(path, self._prefix.encode() + b"\n" + self._numbers)


def read_names(path: Path, places: np.ndarray) -> list[str]:
    """The ids of the documents at some places of a shard."""
    with path.open("rb") as file:
        prefix = file.readline()[:-1].decode()
        numbers = np.frombuffer(file.read(), "<u8")
    return [f"{prefix}:{number}" for number in numbers[places].tolist()]
