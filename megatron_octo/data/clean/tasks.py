"""What the tasks of the cleaning do, each in whatever process gets it."""

from __future__ import annotations

import io
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from megatron_octo.config.data import DataBuildConfig
from megatron_octo.data.clean.exact import Keys, duplicates, pairs_of
from megatron_octo.data.clean.index import LeakIndex
from megatron_octo.data.clean.measure import index_of, measure
from megatron_octo.data.clean.names import Names, read_names
from megatron_octo.data.clean.near import Signatures, candidates_path, cluster, find_candidates
from megatron_octo.data.clean.removals import (
    CLEAN,
    EXACT,
    LEAK,
    NEAR,
    Removal,
    excerpt_of,
    load_removals,
    save_removals,
    write_removals,
)
from megatron_octo.data.clean.words import Batch
from megatron_octo.data.corpora.read import batches
from megatron_octo.data.engine.inputs import Version
from megatron_octo.data.engine.stage import FILES, advance
from megatron_octo.files import write_bytes

_TOGETHER = 1 << 19  # characters of documents that are looked at together
EXAMPLES = 3
"""Removals of each reason that facts show."""


@dataclass(frozen=True)
class Cleaning:
    """What every task knows.

    Args:
        config: the build.
        work: its work directory.
        read: opens a shard: yields its documents, with `text` and `id`.
        hashes: path and SHA-256 of the benchmarks' files.
    """

    config: DataBuildConfig
    work: Path
    read: Callable[[Any], Iterable[Any]]
    hashes: tuple[tuple[str, str], ...] = ()

    @property
    def partitions(self) -> int:
        """Into how many parts the hashes of exact duplicates are cut; 0 where these are not looked for."""
        same = self.config.deduplicate
        return same.partitions if same and same.exact else 0

    def path(self, kind: str, number: int = 0) -> Path:
        """A file of one task of a stage."""
        return self.work / CLEAN / kind / f"{number:05}"

    def folder(self, kind: str) -> Path:
        """A folder of a stage."""
        return self.work / CLEAN / kind

    def files(self, *paths: Path) -> dict[str, int]:
        """What a task's facts say of the files it left."""
        return {str(path.relative_to(self.work)): path.stat().st_size for path in paths}


@dataclass(frozen=True)
class Part:
    """One shard.

    Args:
        number: its place among all shards of the build that are cleaned.
        shard: what to read.
        version: of its file.
        alike: numbers of the shards that have its items in whatever rendering, itself among them; the first of them
            stands for all where duplicates are looked for.
    """

    number: int
    shard: Any
    version: Version | None
    alike: tuple[int, ...]


@dataclass(frozen=True)
class Bucket:
    """One part of the hashes or signatures of all shards: its number, and how many shards there are."""

    number: int
    shards: int


def measure_recall(cleaning: Cleaning, seed: int) -> dict[str, Any]:
    """Plant leaks and count which are found, see `measure.measure`."""
    leaks = cleaning.config.decontaminate
    assert leaks is not None
    return measure(leaks, seed, leaks.measure, cleaning.hashes)


def look(cleaning: Cleaning, part: Part) -> dict[str, Any]:
    """Read a shard once: find its leaks, and leave what is needed to compare all other documents."""
    looking = _Looking(cleaning, part)
    try:
        documents = cleaning.read(part.shard)
        for some in batches(documents, _TOGETHER):
            looking.at(some)
            advance(len(some))
        accounts = getattr(documents, "accounts", None)
        return {**looking.finish(), **({} if accounts is None else {"accounts": accounts.as_json()})}
    finally:
        looking.close()


class _Looking:
    """What is known of a shard while it is read."""

    def __init__(self, cleaning: Cleaning, part: Part) -> None:
        config, number = cleaning.config, part.number
        same = config.deduplicate
        self._cleaning, self._number = cleaning, number
        leaks = config.decontaminate
        self._index: LeakIndex | None = index_of(leaks, cleaning.hashes) if leaks else None
        self._keys = Keys(cleaning.partitions) if cleaning.partitions else None
        near = same.near if same else None
        self._signatures = Signatures(cleaning.folder("signatures"), number, near) if near else None
        self._compared = part.alike[0] == number
        self._names = Names()
        self._leaks: list[Removal] = []
        self._near: list[dict[str, Any]] = []  # documents that agree with a question, but not enough
        self._characters = self._touched = 0

    def at(self, documents: list[Any]) -> None:
        """Take in some documents."""
        first = len(self._names)
        batch = Batch([document.text for document in documents]) if self._index or self._signatures else None
        leaks = self._leaking(documents, batch, first) if batch is not None else set()
        clean = [number for number in range(len(documents)) if number not in leaks] if self._compared else []
        for document in documents:
            self._names.add(document.id)
            self._characters += len(document.text)
        if self._keys is not None:
            for number in clean:
                self._keys.add(first + number, documents[number].text)
        if self._signatures is not None and batch is not None:
            self._signatures.add(batch, clean, [first + number for number in clean])

    def _leaking(self, documents: list[Any], batch: Batch, first: int) -> set[int]:
        if self._index is None:
            return set()
        found = set()
        for number in self._index.suspects(batch):
            words = batch[number]
            touched = self._index.touched(words)
            if not touched:
                continue
            match = next((match for match in touched if self._index.is_leak(match)), None)
            shown = match or touched[0]
            question = self._index.questions[shown.question].id
            excerpt = excerpt_of(words.shown(shown.first, shown.words))
            removal = Removal(first + number, LEAK, documents[number].id, question, excerpt)
            if match is not None:
                found.add(number)
                self._leaks.append(removal)
                continue
            self._touched += 1
            if len(self._near) < EXAMPLES:
                self._near.append({**asdict(removal), "reason": shown.kind, "coverage": round(shown.coverage, 4)})
        return found

    def finish(self) -> dict[str, Any]:
        """Write what is known, and return the facts."""
        cleaning, number = self._cleaning, self._number
        left = [cleaning.path("ids", number), cleaning.path("leaks", number)]
        self._names.write(left[0])
        save_removals(left[1], self._leaks)
        if self._keys is not None:
            left.append(cleaning.path("hashes", number))
            self._keys.write(left[-1])
        if self._signatures is not None:
            self._signatures.finish()
            left += self._signatures.paths
        facts: dict[str, Any] = {"documents": len(self._names), "characters": self._characters}
        if self._index is not None:
            asked = Counter(question.id.partition("/")[0] for question in self._index.questions)
            against = cleaning.config.decontaminate.against if cleaning.config.decontaminate else {}
            facts["benchmarks"] = {name: asked.get(name) for name in against}
            facts |= {"leaks": len(self._leaks), "touched": self._touched, "touched_examples": self._near}
        return {**facts, FILES: cleaning.files(*left)}

    def close(self) -> None:
        """Let go of open files."""
        if self._signatures is not None:
            self._signatures.close()


def find_duplicates(cleaning: Cleaning, bucket: Bucket) -> dict[str, Any]:
    """Find the exact duplicates of one partition, over all shards."""
    files = [cleaning.path("hashes", number) for number in range(bucket.shards)]
    pairs = duplicates(files, bucket.number, cleaning.partitions)
    return _save_pairs(cleaning, cleaning.path("exact", bucket.number), pairs)


def search_bucket(cleaning: Cleaning, bucket: Bucket) -> dict[str, Any]:
    """Find the documents that share a bucket of signatures, over all shards."""
    same = cleaning.config.deduplicate
    assert same is not None and same.near is not None
    out = cleaning.folder("candidates")
    path = find_candidates(cleaning.folder("signatures"), out, bucket.number, bucket.shards, same.near)
    return {"pairs": path.stat().st_size // 16, FILES: cleaning.files(path)}


def join_clusters(cleaning: Cleaning, _: None) -> dict[str, Any]:
    """Join the pairs of all buckets, and name the document of each cluster that is kept."""
    same = cleaning.config.deduplicate
    assert same is not None and same.near is not None
    files = [candidates_path(cleaning.folder("candidates"), bucket) for bucket in range(same.near.buckets)]
    return _save_pairs(cleaning, cleaning.path("near"), cluster(files))


def _save_pairs(cleaning: Cleaning, path: Path, pairs: np.ndarray) -> dict[str, Any]:
    content = io.BytesIO()
    np.save(content, pairs)
    write_bytes(path, content.getvalue())
    return {"duplicates": len(pairs), FILES: cleaning.files(path)}


def decide(cleaning: Cleaning, part: Part) -> dict[str, Any]:
    """Write what to leave out of a shard; it is read again only where there are duplicates to show."""
    leaks = _leaks_of(cleaning, part)
    kept = _duplicates_of(cleaning, part.alike[0])
    for leak in leaks:
        kept.pop(leak.place, None)
    removals = [*leaks, *(_shown(cleaning, part, kept) if kept else [])]
    path = write_removals(cleaning.work, part.shard, sorted(removals, key=lambda removal: removal.place))
    examples = [
        asdict(removal)
        for reason in (LEAK, EXACT, NEAR)
        for removal in [removal for removal in removals if removal.reason == reason][:EXAMPLES]
    ]
    return {
        "removed": dict(sorted(Counter(removal.reason for removal in removals).items())),
        "leaks": dict(sorted(Counter(leak.other.partition("/")[0] for leak in leaks).items())),
        "examples": examples,
        FILES: cleaning.files(path),
    }


def _leaks_of(cleaning: Cleaning, part: Part) -> list[Removal]:
    """Leaks of a shard, in whichever of its renderings they were found."""
    found = {leak.place: leak for leak in load_removals(cleaning.path("leaks", part.number))}
    others = [load_removals(cleaning.path("leaks", number)) for number in part.alike if number != part.number]
    more = {leak.place: leak for several in others for leak in several if leak.place not in found}
    names = read_names(cleaning.path("ids", part.number), np.array(list(more), np.int64)) if more else []
    return [*found.values(), *(replace(leak, document=name) for leak, name in zip(more.values(), names, strict=True))]


def _duplicates_of(cleaning: Cleaning, number: int) -> dict[int, tuple[str, str]]:
    """Reason and kept document for each place of a shard that is left out."""
    same, found = cleaning.config.deduplicate, {}
    if same is None:
        return {}
    exact = [cleaning.path("exact", partition) for partition in range(cleaning.partitions)]
    for reason, files in ((EXACT, exact), (NEAR, [cleaning.path("near")] if same.near else [])):
        pairs = pairs_of(files, number)
        for place, name in zip(pairs["place"].tolist(), _kept_names(cleaning, pairs), strict=True):
            # the first of a cluster stands for all of it, also for those that are exactly like another of its members
            found[place] = (found.get(place, (reason,))[0], name)
    return found


def _shown(cleaning: Cleaning, part: Part, kept: dict[int, tuple[str, str]]) -> Iterator[Removal]:
    for place, document in enumerate(cleaning.read(part.shard)):
        if place in kept:
            reason, other = kept[place]
            yield Removal(place, reason, document.id, other, excerpt_of(document.text))


def _kept_names(cleaning: Cleaning, pairs: np.ndarray) -> list[str]:
    found = [""] * len(pairs)
    for shard in np.unique(pairs["kept_shard"]).tolist():
        rows = np.flatnonzero(pairs["kept_shard"] == shard)
        names = read_names(cleaning.path("ids", shard), pairs["kept_place"][rows])
        for row, name in zip(rows.tolist(), names, strict=True):
            found[row] = name
    return found
