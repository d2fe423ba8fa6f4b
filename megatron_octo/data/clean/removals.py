"""What to leave out of a shard, and why: one file a shard, in the order of places, read while the shard is tokenised.

Nothing here holds a file of removals in memory: it is written and read line by line.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from uuid import uuid4

import orjson

from megatron_octo.files import flush_to_disk

CLEAN = "clean"
"""Directory of everything this room leaves in the work directory of a build."""

EXACT, NEAR, LEAK = "exact_duplicate", "near_duplicate", "leak"
BRIEF, SHOWN = 200, 1200
"""Characters of an excerpt, and of one that somebody is to judge by."""
_SPACE = re.compile(r"\s+")


@dataclass(frozen=True)
class Removal:
    """A document that is left out.

    Args:
        place: among the documents that the shard's reader yields, from 0.
        reason: `exact_duplicate`, `near_duplicate` or `leak`.
        document: its id.
        other: id of the document that is kept instead, or `<benchmark>/<problem>` of what it gives away.
        excerpt: its beginning, or the passage that agrees with the problem and what stands around it; one line.
        agrees: how much of the problem a leak holds, in words.
    """

    place: int
    reason: str
    document: str
    other: str
    excerpt: str
    agrees: str = ""


def excerpt_of(text: str, shown: int = BRIEF) -> str:
    """The beginning of a text on one line, marked with dots where it is cut.

    Args:
        text: the text.
        shown: characters, at most.
    """
    piece = _SPACE.sub(" ", text[: 2 * shown]).strip()
    ends = len(piece) <= shown and 2 * shown >= len(text)
    return piece if ends else piece[:shown].rstrip() + " ..."


def removals_path(work: Path, shard: Any) -> Path:
    """Where the removals of a shard are."""
    return work / CLEAN / "removals" / shard.corpus / f"{shard.number:05}.jsonl"


def read_removals(work: Path, shard: Any) -> Iterator[Removal]:
    """What to leave out of a shard, in the order of places; where nothing is, there is a file that says so.

    Args:
        work: work directory of the build.
        shard: as its reader gets it.
    """
    return load_removals(removals_path(work, shard))


class RemovalWriter:
    """Writes a file of removals, one a line, that is there completely or not at all.

    Args:
        path: the file; its directory is made if missing. Several processes may write the same one at once.
    """

    def __init__(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self.path, self._temporary = path, path.with_name(f".{path.name}.{uuid4().hex[:12]}.partial")
        self._file = self._temporary.open("wb")

    def add(self, removal: Removal) -> None:
        """Write the next one."""
        self._file.write(orjson.dumps(removal) + b"\n")

    def finish(self) -> None:
        """Give the file its name; it survives a power cut."""
        self._file.flush()
        os.fsync(self._file.fileno())
        self._file.close()
        self._temporary.replace(self.path)
        flush_to_disk(self.path.parent)

    def close(self) -> None:
        """Let go of a file that was not finished."""
        self._file.close()
        self._temporary.unlink(missing_ok=True)


def load_removals(path: Path) -> Iterator[Removal]:
    """Read a file of removals, one at a time."""
    with path.open("rb") as file:
        for line in file:
            yield Removal(**orjson.loads(line))
