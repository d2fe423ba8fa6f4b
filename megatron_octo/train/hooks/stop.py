"""Signals that ask a run to save and end."""

from __future__ import annotations

import signal
from types import FrameType
from typing import Any

from megatron_octo.errors import StageFailed
from megatron_octo.train.facts import StepFacts
from megatron_octo.train.hooks.base import Hook
from megatron_octo.train.state import TrainState


class Stopped(StageFailed):
    """The run saved and ended because it was asked to; the same command goes on (75: temporary failure)."""

    exit_code = 75


class StopOnSignal(Hook):
    """SIGTERM and SIGINT: finish the step, save, and end with exit code 75. A second signal changes nothing."""

    def __init__(self) -> None:
        self._before: dict[int, Any] = {}
        self._stopping = False

    def open(self, state: TrainState) -> None:
        """Take over the signals."""

        def ask(_number: int, _frame: FrameType | None) -> None:
            state.stop_wanted = True

        self._before = {number: signal.signal(number, ask) for number in (signal.SIGTERM, signal.SIGINT)}

    def after_step(self, state: TrainState, facts: StepFacts) -> None:
        """Note that some rank was asked to stop; all ranks note it after the same step."""
        self._stopping = facts.stop

    def finish(self, state: TrainState) -> None:
        """Tell the caller that the run is not over.

        Raises:
            Stopped: a signal ended the run before its last step.
        """
        if self._stopping:
            raise Stopped(
                f"{state.run.name}: stopped by a signal after step {state.step} ({state.run_tokens} tokens), saved",
                fix="start the same command again to go on",
            )

    def close(self) -> None:
        """Give the signals back."""
        for number, handler in self._before.items():
            signal.signal(number, handler)
