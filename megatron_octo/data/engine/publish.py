"""From a complete result beside its place to its place: by renaming, and never half."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from megatron_octo.errors import EnvironmentProblem
from megatron_octo.files import flush_to_disk, read_json, write_json

WORK = ".work"
RESULT = "result"
MANIFEST = "manifest.json"
_COMPLETE = "complete.json"


def publish(out: Path, manifest: dict[str, Any], names: Sequence[str]) -> None:
    """Declare the result complete and give everything in it its place; the manifest comes last.

    Args:
        out: data directory; the result lies in its `.work/result`.
        manifest: what the result is.
        names: files and directories of the result. What else lies there a killed process left.
    """
    work = out / WORK
    write_json(work / RESULT / MANIFEST, manifest)
    write_json(work / _COMPLETE, [*names, MANIFEST])
    finish_publishing(out)


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
        shutil.rmtree(target)
    try:
        source.rename(target)
    except IsADirectoryError:
        raise EnvironmentProblem(f"{target} is a directory, and a file is needed", fix="move it away") from None
