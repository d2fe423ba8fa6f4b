"""Everything optional around a step: metrics, progress, checkpoints, signals. Each hook owns its state."""

from __future__ import annotations

import signal
from contextlib import ExitStack
from types import FrameType, TracebackType
from typing import Any

from megatron_octo.checkpoint.save import save_checkpoint, state_bytes
from megatron_octo.errors import StageFailed
from megatron_octo.progress import Progress
from megatron_octo.train.metrics import Metrics
from megatron_octo.train.setup import Engine
from megatron_octo.train.state import TrainState
from megatron_octo.train.step import StepFacts


class Stopped(StageFailed):
    """The run saved and ended because it was asked to; the same command goes on (75: temporary failure)."""

    exit_code = 75


class Hook:
    """What may happen around a step. Subclasses override what they need; all run on every rank."""

    def open(self, state: TrainState) -> None:
        """Before the first step."""

    def after_step(self, state: TrainState, facts: StepFacts) -> None:
        """After each step; `state` has advanced by it."""

    def finish(self, state: TrainState) -> None:
        """After the last step, if nothing failed."""

    def close(self) -> None:
        """At the very end, whatever happened."""


class Hooks:
    """Runs hooks in order; a context manager that opens them and closes them again."""

    def __init__(self, hooks: list[Hook], state: TrainState) -> None:
        self._hooks, self._state, self._stack = hooks, state, ExitStack()

    def __enter__(self) -> Hooks:
        for hook in self._hooks:
            self._stack.callback(hook.close)
            hook.open(self._state)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stack.close()

    def after_step(self, state: TrainState, facts: StepFacts) -> None:
        """Run each hook's `after_step`."""
        for hook in self._hooks:
            hook.after_step(state, facts)

    def finish(self, state: TrainState) -> None:
        """Run each hook's `finish`."""
        for hook in self._hooks:
            hook.finish(state)


class WriteMetrics(Hook):
    """Writes one line a step, on the reporting rank."""

    def __init__(self, engine: Engine) -> None:
        self._writes = engine.runtime.is_reporter
        self._metrics: Metrics | None = None

    def open(self, state: TrainState) -> None:
        """Open the files at the position the run starts from."""
        if self._writes:
            self._metrics = Metrics(state.run, state.step)

    def after_step(self, state: TrainState, facts: StepFacts) -> None:
        """Write the step's line."""
        if self._metrics is not None:
            self._metrics.write(state, facts)

    def close(self) -> None:
        """Close the files."""
        if self._metrics is not None:
            self._metrics.close()


class ShowProgress(Hook):
    """Shows how far the run is, on the reporting rank."""

    def __init__(self, engine: Engine, last: int) -> None:
        self._shows, self._last = engine.runtime.is_reporter, last
        self._bar: Progress | None = None

    def open(self, state: TrainState) -> None:
        """Start the bar at the tokens already trained."""
        if self._shows:
            total = self._last * state.run.tokens_per_step
            self._bar = Progress(state.run.name, total, "tokens", done=state.run_tokens).__enter__()

    def after_step(self, state: TrainState, facts: StepFacts) -> None:
        """Advance by one step."""
        if self._bar is not None:
            tokens = state.run.tokens_per_step
            self._bar.advance(tokens, loss=facts.loss, tokens_per_second=tokens / facts.seconds)

    def close(self) -> None:
        """End the bar."""
        if self._bar is not None:
            self._bar.__exit__(None, None, None)


class SaveCheckpoints(Hook):
    """Saves when the run crosses a multiple of `checkpoint.every` tokens, and at its end."""

    def __init__(self) -> None:
        self._saved_step, self._bytes = 0, 0

    def open(self, state: TrainState) -> None:
        """Remember what is already saved, and how big a save will be."""
        self._saved_step, self._bytes = state.step, state_bytes(state.models)

    def after_step(self, state: TrainState, facts: StepFacts) -> None:
        """Save if a multiple of the interval lies inside this step."""
        every = state.run.checkpoint.every
        if state.run_tokens // every > (state.run_tokens - state.run.tokens_per_step) // every:
            self._save(state)

    def finish(self, state: TrainState) -> None:
        """Save the end of the run, or the place where it was asked to stop."""
        if state.step > self._saved_step:
            self._save(state)

    def _save(self, state: TrainState) -> None:
        run = state.run
        save_checkpoint(
            run.out, state.models, state.optimizer, state.facts(), keep=run.checkpoint.keep, expected_bytes=self._bytes
        )
        self._saved_step = state.step


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


def default_hooks(engine: Engine, state: TrainState, last: int) -> Hooks:
    """The hooks of a training run. Checkpoints come after metrics, so that a save never precedes its own line."""
    return Hooks([WriteMetrics(engine), ShowProgress(engine, last), SaveCheckpoints(), StopOnSignal()], state)
