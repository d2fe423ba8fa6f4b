"""The learning rate as a pure function of the token position inside a run.

OctoThinker holds the rate constant through the stable stage and lets each branch decay along a cosine
to a tenth (section 2 of arXiv:2506.20512). Warm-up, stable, decay in one run, and 1 - sqrt as the shape
of a decay, are those of arXiv:2404.06395 and arXiv:2405.18392. There is no scheduler object and so nothing
to save: the position says everything, and a resumed run cannot start with a stale value.
"""

from __future__ import annotations

import math

from megatron_octo.config.schedule import ScheduleConfig

_REMAINING = {
    "cosine": lambda progress: 0.5 * (1.0 + math.cos(math.pi * progress)),
    "linear": lambda progress: 1.0 - progress,
    "1-sqrt": lambda progress: 1.0 - math.sqrt(progress),
}
"""Shapes of a decay: share of the way from the peak to the last rate that is left, 1 at progress 0 and 0 at 1."""


def learning_rate(schedule: ScheduleConfig, position: int) -> float:
    """Learning rate of the step that starts at a token position.

    Args:
        schedule: its `learning_rate` is set; lengths in tokens of this run.
        position: tokens this run has consumed before the step. Beyond the run's length the last value holds.

    Returns:
        The learning rate, between 0 (inside a warm-up, or at the end of a decay to nothing) and the peak.
    """
    peak = schedule.learning_rate
    if peak is None:
        raise ValueError("a branch's rate is that of its parent, and is not known before they are put together")
    if position < schedule.warmup:
        return peak * position / schedule.warmup
    return peak * _factor(schedule, position)


def decay_start(schedule: ScheduleConfig) -> int | None:
    """Token position up to which the peak holds; None for a schedule without a decay."""
    if schedule.kind == "constant":
        return None
    return schedule.warmup if schedule.decay is None else schedule.tokens - schedule.decay


def _factor(schedule: ScheduleConfig, position: int) -> float:
    """Factor on the peak after the warm-up: exactly 1 where a decay starts, exactly the final ratio where it ends."""
    start = decay_start(schedule)
    if start is None or position <= start:
        return 1.0
    if position >= schedule.tokens:
        return schedule.final_ratio
    shape = schedule.kind if schedule.decay is None else schedule.shape or "1-sqrt"
    left = _REMAINING[shape]((position - start) / (schedule.tokens - start))
    return schedule.final_ratio + (1.0 - schedule.final_ratio) * left
