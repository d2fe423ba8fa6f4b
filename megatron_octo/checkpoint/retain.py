"""Which checkpoints stay: the newest few, and always the one `latest` names."""

from __future__ import annotations

from pathlib import Path

from megatron_octo.checkpoint.store import latest_checkpoint, retire, sealed_checkpoints


def prune(run_dir: Path, keep: int) -> list[str]:
    """Remove all but the newest sealed checkpoints of a run.

    Args:
        run_dir: the run directory, with a valid `latest`.
        keep: how many to keep, at least 1. The one `latest` names is kept in any case.

    Returns:
        Names of the removed checkpoints.
    """
    named = latest_checkpoint(run_dir)
    old = [path for path in sealed_checkpoints(run_dir)[:-keep] if path != named]
    for path in old:
        retire(path)
    return [path.name for path in old]
