"""The learning rate as a pure function of the token position inside a run.

OctoThinker holds the rate constant through the stable stage and lets each branch decay along a cosine
to a tenth (section 2 of arXiv:2506.20512). There is no scheduler object and so nothing to save: the
position says everything, and a resumed run cannot start with a stale value.
"""

from __future__ import annotations

import math

from megatron_octo.config.schedule import ScheduleConfig


def learning_rate(schedule: ScheduleConfig, position: int) -> float:
    """Learning rate of the step that starts at a token position.

    Args:
        schedule: kind, peak, final ratio, warm-up and length; lengths in tokens of this run.
        position: tokens this run has consumed before the step. Beyond the run's length the last value holds.

    Returns:
        The learning rate, between 0 (only inside a warm-up) and the peak.
    """
    peak = schedule.learning_rate
    if position < schedule.warmup:
        return peak * position / schedule.warmup
    return peak * _decay(schedule, _progress(schedule, position))


def _progress(schedule: ScheduleConfig, position: int) -> float:
    """Share of the decay that lies behind a position, 0 to 1."""
    return min(1.0, (position - schedule.warmup) / (schedule.tokens - schedule.warmup))


def _decay(schedule: ScheduleConfig, progress: float) -> float:
    """Factor on the peak: exactly 1 at progress 0 and exactly the final ratio at progress 1."""
    if schedule.kind == "constant" or progress <= 0.0:
        return 1.0
    if progress >= 1.0:
        return schedule.final_ratio
    remaining = 1.0 - progress if schedule.kind == "linear" else 0.5 * (1.0 + math.cos(math.pi * progress))
    return schedule.final_ratio + (1.0 - schedule.final_ratio) * remaining
