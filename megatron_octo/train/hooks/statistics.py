"""Gradient norms and activation statistics, layer by layer, every few steps."""

from __future__ import annotations

from megatron_octo.train.facts import Gradients, StepFacts, Verdict
from megatron_octo.train.hooks.base import Hook
from megatron_octo.train.layer_statistics import Activations, gradient_norms
from megatron_octo.train.loggers import Loggers
from megatron_octo.train.metrics import LineFile
from megatron_octo.train.setup import Engine
from megatron_octo.train.start import STATISTICS
from megatron_octo.train.state import TrainState


class WriteStatistics(Hook):
    """Every `logging.statistics_every` steps a line of `statistics.jsonl`; on other steps nothing is watched.

    A line holds `step`, `tokens`, `gradients` (name -> norm) and `activations` (name -> rms, max, nonfinite). It is
    written before anybody judges the gradients, so that a step with bad numbers that is skipped or stops the run leaves
    its own.
    """

    def __init__(self, engine: Engine, loggers: Loggers) -> None:
        self._runtime, self._loggers = engine.runtime, loggers
        self._activations: Activations | None = None
        self._file: LineFile | None = None

    def open(self, state: TrainState) -> None:
        """Open the file, and watch the first step if it is one of those."""
        if state.run.logging.statistics_every is not None:
            if self._runtime.is_reporter:
                self._file = LineFile(state.run.out / STATISTICS)
            self._watch(state)

    def before_update(self, state: TrainState, gradients: Gradients) -> Verdict:
        """Write the statistics of this step."""
        if self._activations is not None:
            self._activations.close()
            line = {"step": state.step + 1, "tokens": state.tokens + state.run.tokens_per_step}
            line["gradients"] = gradient_norms(state, self._runtime)
            line["activations"] = self._activations.result()
            self._activations = None
            if self._file is not None:
                self._file.write(line)
                self._loggers.write(line["step"], _points(line))
        return Verdict.UPDATE

    def after_step(self, state: TrainState, facts: StepFacts) -> None:
        """Watch the next step if it is one of those."""
        self._watch(state)

    def after_rewind(self, state: TrainState) -> None:
        """Go on behind the checkpoint's line."""
        if self._file is not None:
            self._file.cut(state.step)
        self._watch(state)

    def close(self) -> None:
        """Stop watching and close the file."""
        if self._activations is not None:
            self._activations.close()
        if self._file is not None:
            self._file.close()

    def _watch(self, state: TrainState) -> None:
        if self._activations is not None:
            self._activations.close()
            self._activations = None
        every = state.run.logging.statistics_every
        if every is not None and (state.step + 1) % every == 0:
            self._activations = Activations(state, self._runtime)


def _points(line: dict) -> dict[str, float]:
    gradients = {f"gradients/{name}": norm for name, norm in line["gradients"].items()}
    values = line["activations"].items()
    return gradients | {f"activations/{name}/{what}": value for name, facts in values for what, value in facts.items()}
