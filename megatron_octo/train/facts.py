"""What steps and hooks tell each other."""

from __future__ import annotations

from enum import IntEnum
from typing import NamedTuple


class Verdict(IntEnum):
    """What becomes of a step's gradients, from good to worst."""

    UPDATE = 0
    SKIP = 1
    REWIND = 2


class Gradients(NamedTuple):
    """What is known before the optimizer uses a step's gradients, the same on every rank.

    Args:
        loss: mean over the step's tokens, all ranks together.
        norm: global gradient norm before clipping.
    """

    loss: float
    norm: float


class StepFacts(NamedTuple):
    """What one step says about itself, the same on every rank but for the times.

    Args:
        loss: mean over the step's tokens, all ranks together.
        grad_norm: global gradient norm before clipping.
        learning_rate: of this step.
        seconds: wall time of the step.
        phases: wall time of its parts in seconds, by name.
        verdict: whether the optimizer used the gradients.
        stop: some rank was asked to stop.
    """

    loss: float
    grad_norm: float
    learning_rate: float
    seconds: float
    phases: dict[str, float]
    verdict: Verdict
    stop: bool
