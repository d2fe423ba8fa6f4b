"""What to leave out of a shard, and why: one file a shard, read while the shard is tokenised."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import orjson

from megatron_octo.files import write_bytes

CLEAN = "clean"
"""Directory of everything this room leaves in the work directory of a build."""

EXACT, NEAR, LEAK = "exact_duplicate", "near_duplicate", "leak"
_SHOWN = 200  # characters of an excerpt
_SPACE = re.compile(r"\s+")


@dataclass(frozen=True)
class Removal:
    """A document that is left out.

    Args:
        place: among the documents that the shard's reader yields, from 0.
        reason: `exact_duplicate`, `near_duplicate` or `leak`.
        document: its id.
        other: id of the document that is kept instead, or `<benchmark>/<problem>` of what it gives away.
        excerpt: its beginning, or where it agrees with the problem; one line.
    """

    place: int
    reason: str
    document: str
    other: str
    excerpt: str


def excerpt_of(text: str, start: int = 0) -> str:
    """A piece of a text on one line, marked with dots where it is cut."""
    piece = _SPACE.sub(" ", text[start : start + 2 * _SHOWN]).strip()
    ends = len(piece) <= _SHOWN and start + 2 * _SHOWN >= len(text)
    return ("... " if start else "") + (piece if ends else piece[:_SHOWN].rstrip() + " ...")


def removals_path(work: Path, shard: Any) -> Path:
    """Where the removals of a shard are."""
    return work / CLEAN / "removals" / shard.corpus / f"{shard.number:05}.jsonl"


def write_removals(work: Path, shard: Any, removals: Iterable[Removal]) -> Path:
    """Write what to leave out of a shard, completely or not at all; returns the file."""
    path = removals_path(work, shard)
    save_removals(path, removals)
    return path


def read_removals(work: Path, shard: Any) -> dict[int, Removal]:
    """What to leave out of a shard, by place; where nothing is, there is a file that says so.

    Args:
        work: work directory of the build.
        shard: as its reader gets it.
    """
    return {removal.place: removal for removal in load_removals(removals_path(work, shard))}


def save_removals(path: Path, removals: Iterable[Removal]) -> None:
    """Write a file of removals, one a line, completely or not at all."""
    write_bytes(path, b"".join(orjson.dumps(asdict(removal)) + b"\n" for removal in removals))


def load_removals(path: Path) -> list[Removal]:
    """Read a file of removals."""
    return [Removal(**orjson.loads(line)) for line in path.read_bytes().splitlines()]
