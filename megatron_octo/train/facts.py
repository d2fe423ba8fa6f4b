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


class Trouble(NamedTuple):
    """Why a step's gradients are not used, said by the hook that decides so; the same on every rank.

    Args:
        why: in words, for metrics and messages: "loss is nan".
        passed_over: batches passed over after a rewind, the one of this step the last; 0 where data is innocent.
        since: a rewind goes back to a checkpoint of at most this step; None: to the newest.
    """

    why: str
    passed_over: int = 0
    since: int | None = None


class StepFacts(NamedTuple):
    """What one step says about itself, the same on every rank but for the times.

    Args:
        loss: mean over the step's tokens, all ranks together; NaN for a step that was passed over.
        grad_norm: global gradient norm before clipping; NaN for a step that was passed over.
        learning_rate: of this step.
        seconds: wall time of the step.
        phases: wall time of its parts in seconds, by name.
        verdict: whether the optimizer used the gradients.
        stop: some rank was asked to stop.
        why: what was wrong with the step; empty if its gradients were used.
    """

    loss: float
    grad_norm: float
    learning_rate: float
    seconds: float
    phases: dict[str, float]
    verdict: Verdict
    stop: bool
    why: str = ""
