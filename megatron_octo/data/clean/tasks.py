"""What the tasks of the cleaning do, each in whatever process gets it."""

from __future__ import annotations

import io
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from megatron_octo.config.data import DataBuildConfig
from megatron_octo.data.clean.exact import Keys, duplicates
from megatron_octo.data.clean.index import LeakIndex, Match
from megatron_octo.data.clean.measure import index_of, measure
from megatron_octo.data.clean.names import Names
from megatron_octo.data.clean.near import Signatures
from megatron_octo.data.clean.pairs import candidates_path, cluster, find_candidates
from megatron_octo.data.clean.removals import CLEAN, LEAK, SHOWN, Removal, RemovalWriter, excerpt_of
from megatron_octo.data.clean.words import Batch, Words
from megatron_octo.data.corpora.read import batches
from megatron_octo.data.engine.inputs import Version
from megatron_octo.data.engine.stage import FILES, advance, left
from megatron_octo.files import write_bytes

_TOGETHER = 1 << 19  # characters of documents that are looked at together
_AROUND = 12  # words shown before and after a passage
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

    def files(self, *paths: Path) -> dict[str, Any]:
        """What a task's facts say of the files it left: with hashes, for what is not found in them is not missed."""
        return left(self.work, paths, hashed=True)


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
        self._leaks = RemovalWriter(cleaning.path("leaks", number))
        self._leaking = 0
        self._near: list[dict[str, Any]] = []  # documents that agree with a question, but not enough
        self._characters = self._touched = 0

    def at(self, documents: list[Any]) -> None:
        """Take in some documents."""
        first = len(self._names)
        batch = Batch([document.text for document in documents]) if self._index or self._signatures else None
        leaks = self._find_leaks(documents, batch, first) if batch is not None else set()
        clean = [number for number in range(len(documents)) if number not in leaks] if self._compared else []
        for document in documents:
            self._names.add(document.id)
            self._characters += len(document.text)
        if self._keys is not None:
            for number in clean:
                self._keys.add(first + number, documents[number].text)
        if self._signatures is not None and batch is not None:
            self._signatures.add(batch, clean, [first + number for number in clean])

    def _find_leaks(self, documents: list[Any], batch: Batch, first: int) -> set[int]:
        if self._index is None:
            return set()
        found = set()
        for number in self._index.suspects(batch):
            words = batch[number]
            touched = self._index.touched(words)
            if not touched:
                continue
            match = next((match for match in touched if self._index.is_leak(match)), None)
            removal = _leak(self._index, match or touched[0], words, first + number, documents[number].id)
            if match is not None:
                found.add(number)
                self._leaks.add(removal)
                continue
            self._touched += 1
            if len(self._near) < EXAMPLES:
                self._near.append({**asdict(removal), "reason": touched[0].kind})
        self._leaking += len(found)
        return found

    def finish(self) -> dict[str, Any]:
        """Write what is known, and return the facts."""
        cleaning, number = self._cleaning, self._number
        left = [cleaning.path("ids", number), self._leaks.path]
        self._names.write(left[0])
        self._leaks.finish()
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
            facts |= {"leaks": self._leaking, "touched": self._touched, "touched_examples": self._near}
        return {**facts, FILES: cleaning.files(*left)}

    def close(self) -> None:
        """Let go of open files."""
        self._leaks.close()
        if self._signatures is not None:
            self._signatures.close()


def _leak(index: LeakIndex, match: Match, words: Words, place: int, document: str) -> Removal:
    """A document and what it holds of a question: the longest passage, and around it as much as it lacks."""
    asked = index.size(match.question)
    around = max(_AROUND, asked - match.words)
    first, end = max(0, match.first - around), match.first + match.words + around
    text = excerpt_of(words.shown(first, end - first), SHOWN)
    if end < len(words) and not text.endswith("..."):
        text += " ..."
    agrees = f"{match.words} of {asked} words in a row, {match.coverage:.0%} of its n-grams"
    agrees += ", with other numbers" if match.kind == "numbers" else ""
    question = index.questions[match.question].id
    return Removal(place, LEAK, document, question, f"{'... ' if first else ''}{text}", agrees)


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
