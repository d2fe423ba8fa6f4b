"""Saving and loading a run's state: every rank writes, rank 0 seals, and all learn how it went."""

from __future__ import annotations

import errno
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import torch.distributed as dist

from megatron_octo.checkpoint import store
from megatron_octo.checkpoint.retain import prune
from megatron_octo.checkpoint.seal import verify_seal
from megatron_octo.checkpoint.sharded import Chunks, load_state, save_state, state_bytes
from megatron_octo.errors import EnvironmentProblem, OctoError
from megatron_octo.units import format_bytes

Answer = TypeVar("Answer")

_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
_MARGIN = 1.05  # files, metadata and padding beside the tensors themselves


def save_checkpoint(
    run_dir: Path, chunks: Chunks, optimizer: Any, facts: dict[str, Any], *, keep: int, expected_bytes: int
) -> Path:
    """Write, seal and publish one checkpoint; collective over all ranks.

    Args:
        run_dir: the run directory, seen by every rank.
        chunks: this rank's model chunks.
        optimizer: Megatron's optimizer over them.
        facts: what `run.json` says; `step` names the directory.
        keep: how many checkpoints stay.
        expected_bytes: size of the state, to refuse before writing what cannot fit.

    Returns:
        The published directory.

    Raises:
        EnvironmentProblem: the disk is full or cannot be written; the last checkpoint is untouched and nothing
            half-written stays.
    """
    try:
        temporary = on_rank_zero(lambda: _prepare(run_dir, facts["step"], expected_bytes))
        save_state(temporary, chunks, optimizer)
        return on_rank_zero(lambda: _complete(temporary, run_dir, facts, keep))
    except OSError as error:
        if dist.get_rank() == 0:
            store.remove_leftovers(run_dir)
        raise _explain(error, run_dir, expected_bytes) from error


def load_checkpoint(checkpoint: Path, chunks: Chunks, optimizer: Any, *, moments: bool) -> None:
    """Verify a checkpoint's seal, then load it in this run's layout; collective over all ranks.

    Args:
        checkpoint: the directory.
        chunks: this rank's model chunks, filled in place.
        optimizer: Megatron's optimizer over them.
        moments: whether to load the optimizer's state too.

    Raises:
        CheckpointError: a broken seal (the file is named), or tensors that do not fit the model.
    """
    on_rank_zero(lambda: verify_seal(checkpoint))
    load_state(checkpoint, chunks, optimizer, moments=moments)


def on_rank_zero(action: Callable[[], Answer]) -> Answer:
    """Do something on rank 0 only, and give its answer, or raise its error, on every rank.

    Raises:
        OctoError: as raised on rank 0.
        OSError: as raised on rank 0.
    """
    verdict: list[Any] = [None, None]
    if dist.get_rank() == 0:
        try:
            verdict[0] = action()
        except (OctoError, OSError) as error:
            verdict[1] = error
    if dist.get_world_size() > 1:
        dist.broadcast_object_list(verdict, src=0)
    if verdict[1] is not None:
        raise verdict[1]
    return verdict[0]


def _prepare(run_dir: Path, step: int, expected_bytes: int) -> Path:
    free = shutil.disk_usage(run_dir).free
    if free < expected_bytes * _MARGIN:
        raise _disk_full(run_dir, expected_bytes)
    return store.begin(run_dir, step)


def _complete(temporary: Path, run_dir: Path, facts: dict[str, Any], keep: int) -> Path:
    store.write_facts(temporary, facts)
    published = store.publish(temporary, run_dir, facts["step"])
    prune(run_dir, keep)
    return published


def _explain(error: OSError, run_dir: Path, expected_bytes: int) -> OctoError:
    if error.errno in _FULL:
        return _disk_full(run_dir, expected_bytes)
    return EnvironmentProblem(
        f"{run_dir}: the checkpoint could not be written ({error.strerror or error})",
        "the last checkpoint is untouched",
        "mend the file system and start the same command again",
    )


def _disk_full(run_dir: Path, expected_bytes: int) -> EnvironmentProblem:
    free = shutil.disk_usage(run_dir).free
    return EnvironmentProblem(
        f"{run_dir}: no space for a checkpoint of about {format_bytes(expected_bytes)}, "
        f"{format_bytes(free)} ({free} bytes) free",
        "the last checkpoint is untouched",
        "free disk space or lower checkpoint.keep, then start the same command again",
    )


__all__ = ["load_checkpoint", "on_rank_zero", "save_checkpoint", "state_bytes"]
