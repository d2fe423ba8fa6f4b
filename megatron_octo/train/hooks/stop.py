"""Signals that ask a run to save and end."""

from __future__ import annotations

import os
import sys

from megatron_octo.checkpoint.store import CHECKPOINTS, step_name
from megatron_octo.runtime.stop import Stopped, StopSignals
from megatron_octo.train.facts import StepFacts
from megatron_octo.train.hooks.base import Hook
from megatron_octo.train.hooks.save import SaveCheckpoints
from megatron_octo.train.state import TrainState

_ROOM = 3  # times a measured save: beside the save, the step at hand has to end, and discs have slow days


class StopOnSignal(Hook):
    """A signal: finish the step, save, and end with exit code 75. It is warned of if that will not fit the grace.

    Args:
        signals: those of this process.
        saves: whose first save is measured.
        last: the step this leg of the run ends with: a signal in it comes too late to stop anything.
    """

    def __init__(self, signals: StopSignals, saves: SaveCheckpoints, last: int) -> None:
        self._signals, self._saves, self._last = signals, saves, last
        self._stopping, self._measured = False, False

    def open(self, state: TrainState) -> None:
        """From here on there is something to save."""

        def ask() -> None:
            state.stop_wanted = True

        self._signals.begin(ask, state.run.stop_grace_seconds)

    def after_step(self, state: TrainState, facts: StepFacts) -> None:
        """Note that some rank was asked to stop; all ranks note it after the same step."""
        self._stopping = facts.stop
        seconds = self._saves.write_seconds
        if seconds is not None and not self._measured:
            self._measured = True
            self._compare(seconds, state.run.stop_grace_seconds)

    def finish(self, state: TrainState) -> None:
        """Tell the caller that the run is not over.

        Raises:
            Stopped: a signal ended the run before its last step.
        """
        if self._stopping and state.step < self._last:
            told = self._signals.told
            who = f"{told}, {self._signals.seconds:.1f} s ago" if told else "a signal to another rank"
            raise Stopped(
                f"{state.run.name}: stopped by {who}, after step {state.step} ({state.run_tokens} tokens), saved as "
                f"{state.run.out / CHECKPOINTS / step_name(state.step)}",
                f"stop_grace_seconds is {state.run.stop_grace_seconds:g}",
                "start the same command again to go on",
            )

    def _compare(self, seconds: float, grace: float) -> None:
        if seconds * _ROOM > grace and os.environ.get("RANK", "0") == "0":
            print(
                f"octo: warning: a save took {seconds:.1f} s; {_ROOM} times that is more than stop_grace_seconds "
                f"{grace:g}: a signal may end the run before its progress is saved; "
                f"fix: set stop_grace_seconds={seconds * _ROOM:.0f} and the grace of whoever sends the signal "
                "(terminationGracePeriodSeconds, --signal=TERM@..., KillWait) to at least as much",
                file=sys.stderr,
                flush=True,
            )
