"""When is a value far out? Rolling statistics of good values, and the bound above which the next one is a spike.

The values themselves are kept, in a plain list: JSON carries it exactly, so a resumed run judges as the one that never
stopped, and nothing drifts as it would in running sums.
"""

from __future__ import annotations

import math

EARLIEST = 8
"""Good values before anything is called a spike: fewer say too little about their own spread."""

_SMALLEST_SPREAD = 1e-3  # of the mean: values that hardly vary make no spike of a last digit


def remember(values: list[float], value: float, window: int) -> None:
    """Append a good value, in place, and drop what lies before the window.

    Raises:
        ValueError: the value is not a finite number; nothing changed.
    """
    if not math.isfinite(value):
        raise ValueError(f"{value} must not enter the statistics")
    values.append(value)
    del values[:-window]


def climb_bound(lowest: float) -> float:
    """Loss that a run which learns does not come back to: half above its lowest, and a nat more.

    The median of `EARLIEST` steps is held against it. A new mixture moves a loss by tenths, a warm-up by less.
    """
    return 1.5 * lowest + 1.0


def climb_text(recent: float, lowest: float, since: int) -> str:
    """A loss that has left where it was, for the log and for the end of the command."""
    return (
        f"the loss climbed from {lowest:.4g} to {recent:.4g} (medians of {EARLIEST} steps), far above its lowest since "
        f"step {since}; if it diverges: branch off an earlier checkpoint (start.fork.at) with a lower "
        "schedule.learning_rate, or let watch.spike=rewind act sooner"
    )


def spike_bound(values: list[float], sigma: float) -> float:
    """The value above which the next one is a spike; infinite while fewer than `EARLIEST` are known.

    With the standard deviation known exactly that is mean + sigma deviations. Estimated from n values it is the bound
    that a next value of a normal distribution exceeds about as rarely: Student's quantile times sqrt(1 + 1/n). 6
    deviations become 24 with 8 values, 8.4 with 32 and 6.5 with 128.

    Args:
        values: good values, all finite.
        sigma: deviations above the mean.
    """
    count = len(values)
    if count < EARLIEST:
        return math.inf
    mean = math.fsum(value / count for value in values)
    spread = math.hypot(*(value - mean for value in values)) / math.sqrt(count - 1)
    spread = max(spread, _SMALLEST_SPREAD * abs(mean))
    return mean + _students_quantile(sigma, count - 1) * math.sqrt(1 + 1 / count) * spread


def _students_quantile(normal: float, freedom: int) -> float:
    """Student's quantile from the normal one of the same probability (Abramowitz and Stegun 1964, 26.7.5)."""
    first = (normal**3 + normal) / 4
    second = (5 * normal**5 + 16 * normal**3 + 3 * normal) / 96
    return normal + first / freedom + second / freedom**2
