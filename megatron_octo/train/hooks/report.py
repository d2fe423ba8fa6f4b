"""Metrics and progress, on the one rank that reports."""

from __future__ import annotations

from megatron_octo.progress import Progress
from megatron_octo.train.facts import StepFacts, Verdict
from megatron_octo.train.hooks.base import Hook
from megatron_octo.train.metrics import Metrics
from megatron_octo.train.setup import Engine
from megatron_octo.train.state import TrainState


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

    def after_rewind(self, state: TrainState) -> None:
        """Go on at the checkpoint's step: the lines after it are gone."""
        if self._metrics is not None:
            self._metrics.close()
            self._metrics = Metrics(state.run, state.step)

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
            used = facts.verdict is Verdict.UPDATE
            said = {"loss": facts.loss, "tokens_per_second": tokens / facts.seconds} if used else {}
            self._bar.advance(tokens, **said)

    def after_rewind(self, state: TrainState) -> None:
        """Move back."""
        if self._bar is not None:
            self._bar.advance(state.run_tokens - self._bar.done)

    def close(self) -> None:
        """End the bar."""
        if self._bar is not None:
            self._bar.__exit__(None, None, None)
