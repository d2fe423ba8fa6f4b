"""When checkpoints are written."""

from __future__ import annotations

from megatron_octo.checkpoint.save import save_checkpoint, state_bytes
from megatron_octo.train.facts import StepFacts
from megatron_octo.train.hooks.base import Hook
from megatron_octo.train.state import TrainState


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
        state.gather_weights()
        save_checkpoint(
            run.out, state.models, state.optimizer, state.facts(), keep=run.checkpoint.keep, expected_bytes=self._bytes
        )
        self._saved_step = state.step
