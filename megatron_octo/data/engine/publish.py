"""From a complete result beside its place to its place: by renaming, and never half."""

from __future__ import annotations

import shutil
import uuid
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from megatron_octo.errors import EnvironmentProblem
from megatron_octo.files import flush_to_disk, hash_file, leftovers, read_json, write_json

WORK = ".work"
RESULT = "result"
MANIFEST = "manifest.json"
REVISIONS = "revisions"
_COMPLETE = "complete.json"


def known_revisions(out: Path) -> dict[str, str]:
    """Commits of the hub that a directory is of already, whatever its branches point to by now; see `corpus_files`."""
    for path in (out / MANIFEST, out / WORK / f"{REVISIONS}.json"):
        found = read_json(path)
        if isinstance(found, dict):
            return dict(found.get(REVISIONS) or {})
    return {}


def keep_revisions(out: Path, revisions: dict[str, str]) -> None:
    """Write down the commits of a build that is not finished, for its next start."""
    if revisions:
        write_json(out / WORK / f"{REVISIONS}.json", {REVISIONS: revisions})


def publish(out: Path, manifest: dict[str, Any], names: Sequence[str]) -> None:
    """Declare the result complete and give everything in it its place; the manifest comes last.

    Args:
        out: data directory; the result lies in its `.work/result`.
        manifest: what the result is.
        names: files and directories of the result. What else lies there a killed process left, as it may have within
            these directories; nobody writes there any more.
    """
    work = out / WORK
    for path in leftovers(work / RESULT):
        path.unlink()
    for name in names:
        _flush(work / RESULT / name)
    write_json(work / RESULT / MANIFEST, manifest)
    write_json(work / _COMPLETE, [*names, MANIFEST])
    finish_publishing(out)


def _flush(path: Path) -> None:
    """Make a file, or a directory with all that is in it, survive a power cut that the manifest survives."""
    if path.is_dir():
        for inside in path.iterdir():
            _flush(inside)
    if path.exists():  # else it is in its place already
        flush_to_disk(path)


def finish_publishing(out: Path) -> None:
    """Go on where a process was killed while it published; nothing where none was. Whoever calls clears the work."""
    work = out / WORK
    names = read_json(work / _COMPLETE)
    if names is None:
        return
    for name in names:
        if (work / RESULT / name).exists():  # else it is in its place already
            place(work / RESULT / name, out / name)
    flush_to_disk(out)
    (work / _COMPLETE).unlink()


def place(source: Path, target: Path) -> None:
    """Put a file or a directory where another version of it may be.

    Raises:
        EnvironmentProblem: a directory stands where a file belongs.
    """
    if source.is_dir() and target.is_dir():
        if _same(source, target):  # a finished build is mended, and this part of it was whole
            shutil.rmtree(source)
            return
        # out of sight in one step, so that nobody meets a half of it
        target.rename(source.with_name(f".{source.name}.{uuid.uuid4().hex[:12]}.replaced"))
    try:
        source.rename(target)
    except IsADirectoryError:
        raise EnvironmentProblem(f"{target} is a directory, and a file is needed", fix="move it away") from None


def _same(one: Path, other: Path) -> bool:
    """Whether two directories of files hold the same."""
    names = {path.name for path in one.iterdir()}
    return names == {path.name for path in other.iterdir()} and all(
        (one / name).is_file() and (other / name).is_file() and hash_file(one / name) == hash_file(other / name)
        for name in names
    )
