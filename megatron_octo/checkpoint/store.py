"""Checkpoints of a run directory: written aside, sealed, renamed, and only then pointed at."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from megatron_octo.checkpoint.seal import SEAL, seal, verify_file
from megatron_octo.errors import CheckpointError
from megatron_octo.files import flush_to_disk, write_text

CHECKPOINTS = "checkpoints"
POINTER = "latest"
FACTS = "run.json"

_NAME = re.compile(r"^step_\d{8,}$")
_TEMPORARY = ".tmp-"
_DOOMED = ".old-"


def step_name(step: int) -> str:
    """Directory name of a step's checkpoint: 123 -> 'step_00000123'."""
    return f"step_{step:08d}"


def sealed_checkpoints(run_dir: Path) -> list[Path]:
    """The sealed checkpoints of a run, oldest first (hashes are not checked here)."""
    found = (run_dir / CHECKPOINTS).glob("step_*")
    sealed = [path for path in found if _NAME.match(path.name) and (path / SEAL).is_file()]
    return sorted(sealed, key=lambda path: int(path.name.removeprefix("step_")))


def latest_checkpoint(run_dir: Path) -> Path:
    """The checkpoint a run would go on from.

    Args:
        run_dir: a run directory.

    Returns:
        The directory that `latest` names. Where that file was never written (a first save cut off after its
        rename), the newest sealed checkpoint.

    Raises:
        CheckpointError: nothing saved yet, or `latest` is empty, garbage, or names no sealed checkpoint; the
            message lists the sealed ones.
    """
    sealed = sealed_checkpoints(run_dir)
    pointer = run_dir / POINTER
    if not pointer.exists():
        if sealed:
            return sealed[-1]
        raise CheckpointError(f"{run_dir}: no checkpoint", fix="train this run first, or check the path")
    name = pointer.read_text(encoding="utf-8", errors="replace").strip()
    for path in sealed:
        if path.name == name:
            return path
    said = "is empty" if not name else f"names {name[:40]!r}, which is not a sealed checkpoint here"
    names = ", ".join(path.name for path in sealed) or "none"
    fix = f"write one of these names into {POINTER}"
    if not sealed:
        fix = f"restore {run_dir / CHECKPOINTS}, or remove {POINTER} to begin anew"
    raise CheckpointError(f"{pointer}: {said}", f"sealed checkpoints: {names}", fix)


def standing(run_dir: Path) -> str:
    """What a run still has when something fails, for messages: its newest sealed checkpoint, or nothing."""
    try:
        sealed = sealed_checkpoints(run_dir)
    except OSError:  # no file is left to open, not even a directory
        return "what was sealed before is untouched"
    return f"{CHECKPOINTS}/{sealed[-1].name} is untouched" if sealed else "nothing had been saved before"


@contextmanager
def naming_older(checkpoint: Path) -> Iterator[None]:
    """Let an error about the checkpoint a run goes on from name the sealed ones before it.

    Which of them to trust is the user's choice: a run never goes back further than it was told to.
    """
    try:
        yield
    except CheckpointError as error:
        run_dir = checkpoint.parent.parent
        older = [path.name for path in sealed_checkpoints(run_dir) if path.name < checkpoint.name]
        if not older:
            raise
        raise CheckpointError(
            error.what,
            error.rule,
            f"restore the file from a copy; or go back to {older[-1]} (sealed before it: {', '.join(older)}): "
            f"echo {older[-1]} > {run_dir / POINTER}, then start the same command again",
        ) from None


def has_checkpoint(run_dir: Path) -> bool:
    """Whether there is anything to go on from: a pointer or a sealed checkpoint."""
    return (run_dir / POINTER).exists() or bool(sealed_checkpoints(run_dir))


def check_unsealed(run_dir: Path) -> None:
    """Check that a run without any sealed checkpoint has none at all, before it is taken for a new one.

    A checkpoint has its seal before it has its name, so one without was copied in part or damaged.

    Raises:
        CheckpointError: there are checkpoints, and none is sealed.
    """
    found = sorted(path.name for path in (run_dir / CHECKPOINTS).glob("step_*") if _NAME.match(path.name))
    if found and not has_checkpoint(run_dir):
        raise CheckpointError(
            f"{run_dir / CHECKPOINTS / found[-1]} has no seal ({SEAL}), nor has any other of {len(found)}",
            "training would begin anew and write over them",
            f"copy them again with their {SEAL}, or choose another `out`",
        )


def read_facts(checkpoint: Path) -> dict[str, Any]:
    """Read a checkpoint's `run.json`: step, run_tokens, tokens, config, versions, lineage.

    Raises:
        CheckpointError: the file is missing or not JSON.
    """
    path = checkpoint / FACTS
    try:
        facts = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise CheckpointError(f"{path}: no such file", "every checkpoint says which run it belongs to") from None
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: cannot be read ({error})") from None
    if not isinstance(facts, dict):
        raise CheckpointError(f"{path}: does not hold a JSON object")
    return facts


def sealed_facts(checkpoint: Path) -> dict[str, Any]:
    """Read a checkpoint's `run.json`, having checked it against the seal: a run is cut and pruned by what it says.

    Raises:
        CheckpointError: no seal, or the file is missing, altered or not JSON.
    """
    if (checkpoint / FACTS).is_file():
        verify_file(checkpoint, FACTS)
    return read_facts(checkpoint)


def checkpoint_at(run_dir: Path, position: int | None) -> Path:
    """The sealed checkpoint a branch leaves from.

    Args:
        run_dir: the parent's run directory.
        position: tokens since the root of the tree; None for the latest checkpoint. A checkpoint serves a
            position if its step is the first to reach it.

    Raises:
        CheckpointError: no such run, or no checkpoint at the position; the message lists those that exist.
    """
    if not run_dir.is_dir():
        raise CheckpointError(f"{run_dir}: no such run directory", fix="check start.fork.parent")
    if position is None:
        return latest_checkpoint(run_dir)
    available = []
    for path in sealed_checkpoints(run_dir):
        facts = sealed_facts(path)
        per_step = facts["run_tokens"] // max(1, facts["step"])
        if position <= facts["tokens"] < position + max(1, per_step):
            return path
        available.append(f"{facts['tokens']} ({path.name})")
    raise CheckpointError(
        f"{run_dir}: no checkpoint at {position} tokens",
        f"checkpoints exist at {', '.join(available) or 'no position'}",
        "set start.fork.at to one of these, or checkpoint.every and checkpoint.keep of the parent so that it is kept",
    )


def begin(run_dir: Path, step: int) -> Path:
    """Create the hidden, empty directory a checkpoint is first written to."""
    temporary = run_dir / CHECKPOINTS / f"{_TEMPORARY}{step_name(step)}"
    _remove(temporary)
    temporary.mkdir(parents=True)
    return temporary


def write_facts(directory: Path, facts: dict[str, Any]) -> None:
    """Write a checkpoint's `run.json`."""
    (directory / FACTS).write_text(json.dumps(facts, indent=1) + "\n", encoding="utf-8")


def publish(temporary: Path, run_dir: Path, step: int, digests: Mapping[str, str] | None = None) -> Path:
    """Seal a finished checkpoint, give it its name, then let `latest` name it.

    A crash before the rename leaves a hidden directory that nobody loads; one between rename and pointer
    leaves the previous checkpoint in charge.

    Args:
        temporary: the complete directory.
        run_dir: the run directory.
        step: names the checkpoint.
        digests: BLAKE3 of files whose writer took it as it wrote them.

    Returns:
        The published directory.
    """
    seal(temporary, digests=digests)
    final = temporary.with_name(step_name(step))
    retire(final)
    temporary.rename(final)
    flush_to_disk(final.parent)
    point_at(run_dir, final.name)
    return final


def point_at(run_dir: Path, name: str) -> None:
    """Let `latest` name a checkpoint, atomically and durably."""
    write_text(run_dir / POINTER, name + "\n")


def retire(checkpoint: Path) -> None:
    """Remove a checkpoint. It is hidden first, so that no half-removed directory ever carries its name."""
    if checkpoint.exists():
        doomed = checkpoint.with_name(f"{_DOOMED}{checkpoint.name}")
        _remove(doomed)
        checkpoint.rename(doomed)
        _remove(doomed)


def remove_leftovers(run_dir: Path) -> None:
    """Remove what killed saves and removals left behind. Only the process that holds the run may call this."""
    for pattern in (f"{_TEMPORARY}*", f"{_DOOMED}*"):
        for path in (run_dir / CHECKPOINTS).glob(pattern):
            _remove(path)


def _remove(path: Path) -> None:
    if path.is_symlink():  # what it points to is not ours to remove
        path.unlink()
    shutil.rmtree(path, ignore_errors=True)
