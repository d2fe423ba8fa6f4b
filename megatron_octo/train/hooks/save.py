"""When checkpoints are written."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager

from megatron_octo.checkpoint.retain import Policy
from megatron_octo.checkpoint.save import Saver
from megatron_octo.runtime.watchdog import GROUP_PATIENCE
from megatron_octo.train.facts import StepFacts
from megatron_octo.train.hooks.base import Hook
from megatron_octo.train.state import TrainState


class SaveCheckpoints(Hook):
    """Saves when the run crosses a multiple of `checkpoint.every` tokens, and at its end.

    `blocked_seconds` says for each saved step how long training stood still for it: all of a save, or with
    `checkpoint.asynchronous` the copying of values, the look after each step at how it goes, and its end.
    """

    def __init__(self) -> None:
        self.blocked_seconds: dict[int, float] = {}
        self._saver: Saver | None = None
        self._saved_step = 0

    def open(self, state: TrainState) -> None:
        """Remember what is already saved, and see that there is room for what will be.

        Raises:
            EnvironmentProblem: the disk has no room for a checkpoint, and the run would find out after hours.
        """
        run = state.run
        policy = Policy(run.checkpoint.keep, run.checkpoint.keep_every)
        self._saver = Saver(run.out, state.models, state.optimizer, policy, run.timeout_minutes * GROUP_PATIENCE)
        self._saved_step = state.step
        self._saver.check_room()

    def after_step(self, state: TrainState, facts: StepFacts) -> None:
        """Save if a multiple of the interval lies inside this step."""
        with self._blocked():
            self._saver.poll()
        every = state.run.checkpoint.every
        if state.run_tokens // every > (state.run_tokens - state.run.tokens_per_step) // every:
            self._save(state, background=state.run.checkpoint.asynchronous)

    def before_rewind(self, state: TrainState) -> None:
        """Complete a save that is still being written: the state goes back to it."""
        self.complete()

    def after_rewind(self, state: TrainState) -> None:
        """Go on from where the run is now."""
        self._saved_step = state.step

    def finish(self, state: TrainState) -> None:
        """Save the end of the run, or the place where it was asked to stop."""
        with state.apart("a save"):
            self.complete()
        if state.step > self._saved_step:
            self._save(state, background=False)

    @property
    def write_seconds(self) -> float | None:
        """How long the last save took to be written and sealed; None before the first is."""
        return self._saver.write_seconds if self._saver is not None else None

    def close(self) -> None:
        """Let a save in the background end."""
        if self._saver is not None:
            self._saver.close()

    def complete(self) -> None:
        """Wait until what was saved last is a sealed checkpoint.

        Raises:
            EnvironmentProblem: it could not be written.
        """
        with self._blocked():
            self._saver.complete()

    def _save(self, state: TrainState, *, background: bool) -> None:
        with state.apart("a save"):
            self.complete()
            self._saved_step = state.step
            with self._blocked():
                state.gather_weights()
                self._saver.save(state.facts(), background=background)

    @contextmanager
    def _blocked(self) -> Iterator[None]:
        began = time.perf_counter()
        try:
            yield
        finally:
            seconds = self.blocked_seconds.get(self._saved_step, 0.0) + time.perf_counter() - began
            self.blocked_seconds[self._saved_step] = seconds
