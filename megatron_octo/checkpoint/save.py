"""Saving and loading a run's state: every rank writes, rank 0 seals, and all learn how it went."""

from __future__ import annotations

import errno
import shutil
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from megatron_octo.checkpoint import store
from megatron_octo.checkpoint.part import HostCopies, Part, write_parts
from megatron_octo.checkpoint.retain import Policy, prune
from megatron_octo.checkpoint.seal import verify_seal
from megatron_octo.checkpoint.sharded import Chunks, Sharder, load_state, state_bytes
from megatron_octo.checkpoint.together import on_rank_zero
from megatron_octo.errors import EnvironmentProblem, OctoError
from megatron_octo.units import format_bytes

_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
_FILES = {errno.EMFILE, errno.ENFILE}
_MARGIN = 1.05  # files, metadata and padding beside the tensors themselves


class Saver:
    """Saves checkpoints of one run, one after the other; every rank has one, and calls it at the same steps.

    A save takes this rank's part of the state, writes it, and lets rank 0 seal, publish and prune. In the background
    it is the same, on a copy of the values, by a thread with a process group of its own.

    Args:
        run_dir: the run directory, seen by every rank.
        chunks: this rank's model chunks.
        optimizer: Megatron's optimizer over them.
        policy: which checkpoints stay.
        timeout_minutes: a rank that waits longer for the others than this gives up.

    Attributes:
        write_seconds: how long the last save took to be written and sealed; None before the first is.
    """

    def __init__(
        self, run_dir: Path, chunks: Chunks, optimizer: Any, policy: Policy, timeout_minutes: float = 10
    ) -> None:
        self._run_dir, self._policy = run_dir, policy
        self._sharder, self._memory = Sharder(chunks, optimizer), HostCopies()
        self._bytes, self._device = state_bytes(chunks), next(chunks[0].parameters()).device
        self.write_seconds: float | None = None
        self._pending: _Background | None = None
        self._group: Any = None
        if dist.get_world_size() > 1:
            self._group = dist.new_group(backend="gloo", timeout=timedelta(minutes=timeout_minutes))

    def check_room(self) -> None:
        """See that a checkpoint fits before training for it; warn where those that are kept will not.

        Collective over all ranks.

        Raises:
            EnvironmentProblem: the disk has not the room for one.
        """
        on_rank_zero(self._check_room, self._group)

    def save(self, facts: dict[str, Any], *, background: bool = False) -> None:
        """Save the state as it is now; an earlier save that still runs is waited for. Collective over all ranks.

        Args:
            facts: what `run.json` says; `step` names the directory. Not to be changed afterwards.
            background: return as soon as the values are copied; `poll` or `complete` tell how it went.

        Raises:
            EnvironmentProblem: the disk is full or cannot be written; the last checkpoint is untouched and nothing
                half-written stays.
        """
        self.complete()
        part = self._sharder.part()
        if not background:
            self._write(part, facts)
            return
        part.snapshot(self._memory)
        self._pending = _Background(lambda: self._write(part, facts))

    def poll(self) -> None:
        """Learn how a save in the background went, if it is over on every rank. Collective while one is pending.

        Raises:
            EnvironmentProblem: see `save`; on every rank at the same call.
        """
        if self._pending is None:
            return
        over = torch.tensor(float(self._pending.is_over), device=self._device)
        if dist.get_world_size() > 1:
            dist.all_reduce(over, dist.ReduceOp.MIN)
        if over.item():
            self.complete()

    def complete(self) -> None:
        """Wait for a save in the background, if there is one.

        Raises:
            EnvironmentProblem: see `save`.
        """
        pending, self._pending = self._pending, None
        if pending is not None:
            pending.result()

    def close(self) -> None:
        """Let a save in the background end, whatever becomes of it, and leave its process group."""
        with suppress(Exception):  # only an error that already ends the run leaves a save behind: that one is told
            self.complete()
        if self._group is not None:
            dist.destroy_process_group(self._group)
            self._group = None

    def _write(self, part: Part, facts: dict[str, Any]) -> None:
        began = time.monotonic()
        try:
            temporary = on_rank_zero(lambda: self._begin(facts["step"]), self._group)
            digests = write_parts(temporary, part, self._group)
            on_rank_zero(lambda: self._publish(temporary, facts, digests), self._group)
            self.write_seconds = time.monotonic() - began
        except OSError as error:
            if dist.get_rank() == 0:
                with suppress(OSError):  # the next start removes what cannot be removed now
                    store.remove_leftovers(self._run_dir)
            raise self._explain(error) from error

    def _check_room(self) -> None:
        free, each = shutil.disk_usage(self._run_dir).free, self._bytes * _MARGIN
        if free < each:
            raise self._disk_full()
        # A new checkpoint stands beside those that are kept until it is sealed.
        wanted = self._policy.keep + 1 - min(self._policy.keep, len(store.sealed_checkpoints(self._run_dir)))
        if free < wanted * each:
            print(
                f"octo: warning: {self._run_dir}: {format_bytes(free)} free, but checkpoint.keep={self._policy.keep} "
                f"and the one being written need {format_bytes(wanted * each)} more; "
                "fix: free disk space or lower checkpoint.keep",
                file=sys.stderr,
                flush=True,
            )

    def _begin(self, step: int) -> Path:
        if shutil.disk_usage(self._run_dir).free < self._bytes * _MARGIN:
            raise self._disk_full()
        return store.begin(self._run_dir, step)

    def _publish(self, temporary: Path, facts: dict[str, Any], digests: dict[str, str]) -> None:
        store.write_facts(temporary, facts)
        store.publish(temporary, self._run_dir, facts["step"], digests)
        try:
            prune(self._run_dir, self._policy)
        except OSError as error:  # what was to be saved is sealed and in charge
            said = f"{error.filename or self._run_dir}: {error.strerror or error}"
            print(f"octo: note: an old checkpoint stays, it cannot be removed ({said})", file=sys.stderr, flush=True)

    def _explain(self, error: OSError) -> OctoError:
        if error.errno in _FULL:
            return self._disk_full()
        mend = "raise the limit on open files (ulimit -n)" if error.errno in _FILES else "mend the file system"
        return EnvironmentProblem(
            f"{self._run_dir}: the checkpoint could not be written ({error.strerror or error})",
            store.standing(self._run_dir),
            f"{mend} and start the same command again",
        )

    def _disk_full(self) -> EnvironmentProblem:
        free = shutil.disk_usage(self._run_dir).free
        return EnvironmentProblem(
            f"{self._run_dir}: no space for a checkpoint of about {format_bytes(self._bytes)}, "
            f"{format_bytes(free)} ({free} bytes) free",
            store.standing(self._run_dir),
            "free disk space or lower checkpoint.keep, then start the same command again",
        )


class _Background:
    """One action in a thread of its own, and how it ended."""

    def __init__(self, action: Callable[[], None]) -> None:
        self._action, self._error = action, None
        # A daemon: a rank that has failed must not wait at its exit for one that is gone.
        self._thread = threading.Thread(target=self._run, name="checkpoint", daemon=True)
        self._thread.start()

    @property
    def is_over(self) -> bool:
        return not self._thread.is_alive()

    def result(self) -> None:
        self._thread.join()
        if self._error is not None:
            raise self._error

    def _run(self) -> None:
        try:
            self._action()
        except BaseException as error:
            self._error = error


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
