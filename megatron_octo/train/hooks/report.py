"""Metrics and progress, on the one rank that reports."""

from __future__ import annotations

import sys

from megatron_octo.progress import Progress
from megatron_octo.train.cost import Cost
from megatron_octo.train.describe import describe_run
from megatron_octo.train.facts import StepFacts, Verdict
from megatron_octo.train.hooks.base import Hook
from megatron_octo.train.hooks.validate import Validate
from megatron_octo.train.loggers import Loggers
from megatron_octo.train.metrics import LineFile, metric_line
from megatron_octo.train.setup import Engine
from megatron_octo.train.start import METRICS
from megatron_octo.train.state import TrainState

_SCALARS = ("loss", "learning_rate", "grad_norm", "tokens_per_second", "device_flops_per_second", "mfu")


class WriteMetrics(Hook):
    """Writes one line a step, on the reporting rank, and opens and closes the loggers that others write to as well."""

    def __init__(self, engine: Engine, loggers: Loggers) -> None:
        self._writes, self._loggers = engine.runtime.is_reporter, loggers
        self._file: LineFile | None = None

    def open(self, state: TrainState) -> None:
        """Open the files at the position the run starts from, and store what MFU means here."""
        if self._writes:
            self._cost = Cost.of(state.run)
            self._cost.write(state.run)
            self._file = LineFile(state.run.out / METRICS)
            self._loggers.open(state.run, state.step)

    def after_step(self, state: TrainState, facts: StepFacts) -> None:
        """Write the step's line."""
        if self._file is not None:
            line = metric_line(state, facts, self._cost)
            self._file.write(line)
            self._loggers.write(state.step, {f"train/{name}": line[name] for name in _SCALARS if name in line})

    def after_rewind(self, state: TrainState) -> None:
        """Go on behind the checkpoint's line."""
        if self._file is not None:
            self._file.cut(state.step)
            self._loggers.rewind(state.run, state.step)

    def close(self) -> None:
        """Close the files."""
        if self._file is not None:
            self._file.close()
        self._loggers.close()


class ShowProgress(Hook):
    """Says what the run is, and shows how far it is, on the reporting rank."""

    def __init__(self, engine: Engine, validate: Validate, last: int) -> None:
        self._shows, self._validate, self._last = engine.runtime.is_reporter, validate, last
        self._bar: Progress | None = None

    def open(self, state: TrainState) -> None:
        """Introduce the run and start the bar at the tokens already trained."""
        if self._shows:
            self._cost = Cost.of(state.run)
            print(describe_run(state.run, state.step, self._last), file=sys.stderr)
            print(f"  {self._cost.text}", file=sys.stderr, flush=True)
            total = self._last * state.run.tokens_per_step
            self._bar = Progress(state.run.name, total, "tokens", done=state.run_tokens, lines=True).__enter__()

    def after_step(self, state: TrainState, facts: StepFacts) -> None:
        """Advance by one step."""
        if self._bar is not None:
            tokens = state.run.tokens_per_step
            shown = {}
            if facts.verdict is Verdict.UPDATE:
                speed = tokens / facts.seconds
                shown = {"loss": facts.loss, "learning_rate": facts.learning_rate, "tokens_per_second": speed}
                rates = self._cost.rates(speed)
                shown |= {"mfu": rates["mfu"]} if "mfu" in rates else rates
            if self._validate.loss is not None:
                shown["validation"] = self._validate.loss
            self._bar.advance(tokens, **shown)

    def after_rewind(self, state: TrainState) -> None:
        """Move back."""
        if self._bar is not None:
            self._bar.advance(state.run_tokens - self._bar.done)

    def close(self) -> None:
        """End the bar."""
        if self._bar is not None:
            self._bar.__exit__(None, None, None)
