"""Steps whose numbers are bad."""

from __future__ import annotations

import math

from megatron_octo.errors import StageFailed
from megatron_octo.train.facts import Gradients, Verdict
from megatron_octo.train.hooks.base import Hook
from megatron_octo.train.state import TrainState


class WatchNumbers(Hook):
    """Stops the run at the first loss or gradient that is not a finite number."""

    def before_update(self, state: TrainState, gradients: Gradients) -> Verdict:
        """Look at the numbers of a step.

        Raises:
            StageFailed: one is not finite; the last checkpoint was taken before it.
        """
        if math.isfinite(gradients.loss) and math.isfinite(gradients.norm):
            return Verdict.UPDATE
        raise StageFailed(
            f"step {state.step + 1} ({state.tokens} tokens): loss is {gradients.loss}, "
            f"gradient norm is {gradients.norm}",
            "a run stops at the first value that is not a finite number; the last checkpoint was taken before it",
            "look at the data of this step (octo data inspect), or start anew in another `out` with a lower "
            "schedule.learning_rate or optimizer.clip",
        )
