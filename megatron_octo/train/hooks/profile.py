"""Where the time of steps goes, as text flames."""

from __future__ import annotations

import sys
import time

import torch.distributed as dist

from megatron_octo.files import write_text
from megatron_octo.train.facts import Gradients, StepFacts, Verdict
from megatron_octo.train.flame import Times, flame, mean, stages
from megatron_octo.train.hooks.base import Hook
from megatron_octo.train.setup import Engine
from megatron_octo.train.start import PROFILE
from megatron_octo.train.state import TrainState
from megatron_octo.train.timeline import StepProbe


class Profile(Hook):
    """Every `logging.profile_every` steps a flame of one step, and of all steps at the end.

    Flames are written to `profile/step_N.txt` and `profile/run.txt`, and to the log. A profiled step times the parts of
    the model on every rank and gathers them; of other steps only what their own clock says is added up.

    Args:
        engine: what is timed.
        hooks: those that come before this one; their work is named one by one.
    """

    def __init__(self, engine: Engine, hooks: list[Hook]) -> None:
        self._engine, self._hooks = engine, hooks
        self._probe: StepProbe | None = None
        self._totals: Times = {}
        self._steps = 0

    def open(self, state: TrainState) -> None:
        """Watch the first step if it is one of those."""
        self._arm(state)

    def before_update(self, state: TrainState, gradients: Gradients) -> Verdict:
        """Tell the probe that the optimizer comes now."""
        if self._probe is not None:
            self._probe.update()
        return Verdict.UPDATE

    def after_step(self, state: TrainState, facts: StepFacts) -> None:
        """Add the step up; write its flame if it was watched, and watch the next one if it is one of those."""
        if facts.seconds:  # else its batches were passed over
            self._add(facts)
        if facts.seconds and self._probe is not None:
            self._write_step(state, self._probe.times())
        self._arm(state)

    def after_rewind(self, state: TrainState) -> None:
        """Watch the next step if it is one of those."""
        self._arm(state)

    def finish(self, state: TrainState) -> None:
        """Write the flame of all steps."""
        if self._steps and self._engine.runtime.is_reporter:
            times = {path: seconds / self._steps for path, seconds in self._totals.items()}
            steps = f"mean of {self._steps} steps" if self._steps > 1 else "1 step"
            self._write(state, "run", flame(f"{state.run.name}: {steps}, {state.run.parallel.label}", times))

    def close(self) -> None:
        """Take the probe away."""
        if self._probe is not None:
            self._probe.close()
            self._probe = None

    def _arm(self, state: TrainState) -> None:
        self.close()
        self._began = time.perf_counter()
        every = state.run.logging.profile_every
        if every is not None and (state.step + 1) % every == 0:
            self._probe = StepProbe(self._engine, state, self._hooks)

    def _add(self, facts: StepFacts) -> None:
        parts = {(name,): seconds for name, seconds in facts.phases.items()}
        parts[("other",)] = facts.seconds - sum(facts.phases.values())
        parts[("hooks",)] = time.perf_counter() - self._began - facts.seconds
        for path, seconds in parts.items():
            self._totals[path] = self._totals.get(path, 0.0) + max(seconds, 0.0)
        self._steps += 1

    def _write_step(self, state: TrainState, times: Times) -> None:
        runtime = self._engine.runtime
        ranks = [(runtime.pipeline_rank, times)]
        if runtime.world_size > 1:
            ranks = [None] * runtime.world_size
            dist.all_gather_object(ranks, (runtime.pipeline_rank, times))
        if not runtime.is_reporter:
            return
        each = [times for _, times in ranks]
        clock = "CUDA events" if runtime.device.type == "cuda" else "wall clock"
        over = f"; mean, least and most of {len(each)} ranks" if len(each) > 1 else ""
        text = flame(
            f"{state.run.name}: step {state.step}, {state.run.parallel.label}, {clock}{over}", mean(each), each
        )
        if runtime.pipeline_size > 1:
            text += "\n\n" + stages(ranks)
        self._write(state, f"step_{state.step}", text)

    def _write(self, state: TrainState, name: str, text: str) -> None:
        write_text(state.run.out / PROFILE / f"{name}.txt", text + "\n")
        print(f"\n{text}\n", file=sys.stderr, flush=True)
