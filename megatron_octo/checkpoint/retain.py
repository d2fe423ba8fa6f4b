"""Which checkpoints of a run stay: the newest few, one now and then for ever, and those that others need."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from pathlib import Path
from typing import NamedTuple

from megatron_octo.checkpoint.store import latest_checkpoint, retire, sealed_checkpoints, sealed_facts
from megatron_octo.errors import CheckpointError
from megatron_octo.schedule.fork import pinned_checkpoints


class Policy(NamedTuple):
    """What a run wants kept.

    Args:
        keep: newest sealed checkpoints, at least 1.
        keep_every: tokens; beside them, the first checkpoint at or after each multiple stays for ever.
    """

    keep: int
    keep_every: int | None = None


class Saved(NamedTuple):
    """A sealed checkpoint: its name, and the tokens its run had consumed; None if that cannot be read."""

    name: str
    run_tokens: int | None


def removable(saved: Sequence[Saved], policy: Policy, needed: Collection[str]) -> list[str]:
    """Decide which checkpoints may go.

    What stays for ever is judged by the checkpoint before it, which may be gone already. That changes nothing: the
    first one after a multiple is never removed, so whatever comes later finds it, or a later one, before itself.

    Args:
        saved: the sealed checkpoints, oldest first.
        policy: what the run wants kept.
        needed: names that stay in any case: what `latest` names, and what branches left from.

    Returns:
        Names, oldest first. Never the newest, nor one whose tokens are unknown while they decide.
    """
    newest = {item.name for item in saved[-max(1, policy.keep) :]}
    kept, before = newest | set(needed), 0
    for item in saved:
        if policy.keep_every is None:
            break
        if item.run_tokens is None:
            kept.add(item.name)
            continue
        if item.run_tokens // policy.keep_every > before // policy.keep_every:
            kept.add(item.name)
        before = max(before, item.run_tokens)
    return [item.name for item in saved if item.name not in kept]


def prune(run_dir: Path, policy: Policy) -> list[str]:
    """Remove the checkpoints of a run that neither its policy nor a branch keeps.

    Call it when the newest is sealed and pointed at.

    Args:
        run_dir: the run directory.
        policy: what it wants kept.

    Returns:
        Names of the removed checkpoints.

    Raises:
        CheckpointError: `latest` names no sealed checkpoint; nothing is removed.
    """
    needed = {latest_checkpoint(run_dir).name} | pinned_checkpoints(run_dir)
    paths = {path.name: path for path in sealed_checkpoints(run_dir)}
    saved = [Saved(name, _tokens(path) if policy.keep_every else None) for name, path in paths.items()]
    removed = []
    for name in removable(saved, policy, needed):
        if name not in pinned_checkpoints(run_dir):  # a branch may have left while the one before was being removed
            retire(paths[name])
            removed.append(name)
    return removed


def _tokens(checkpoint: Path) -> int | None:
    try:
        return int(sealed_facts(checkpoint)["run_tokens"])
    except (CheckpointError, KeyError, TypeError, ValueError):
        return None
