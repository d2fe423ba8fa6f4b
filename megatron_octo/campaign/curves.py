"""The curves of the report as numbers: which points, how smoothed, how thinned. No drawing here."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from megatron_octo.campaign.palette import STABLE, branch_colours
from megatron_octo.campaign.record import Record, number

MOST_POINTS = 800
"""Points drawn of one curve at most."""


@dataclass(frozen=True)
class Series:
    """One curve: positions, values, name and colour."""

    name: str
    colour: str
    x: np.ndarray
    y: np.ndarray


def training_series(record: Record, column: str) -> list[Series]:
    """A column of every run's metrics over the absolute token position; runs without it are left out."""
    colours = {"stable": STABLE, **branch_colours([branch.name for branch in record.branches])}
    found = [_series(run.name, colours[run.name], run.rows, "tokens", column) for run in record.runs]
    return [series for series in found if series.x.size]


def rl_series(record: Record, column: str) -> list[Series]:
    """A column of every branch's RL metrics over the rollout step; branches without it are left out."""
    colours = branch_colours([branch.name for branch in record.branches])
    found = [_series(branch.name, colours[branch.name], branch.rl, "step", column) for branch in record.branches]
    return [series for series in found if series.x.size]


def smooth(values: np.ndarray, window: int) -> np.ndarray:
    """Centred running mean over `window` (odd) values.

    At the start the window grows from one value, so that a steep fall is not flattened; at the end it keeps its
    left half.
    """
    sums = np.concatenate(([0.0], np.cumsum(values)))
    index = np.arange(values.size)
    left = np.minimum(window // 2, index)
    right = np.minimum(left, values.size - 1 - index)
    return (sums[index + right + 1] - sums[index - left]) / (left + right + 1)


def window_for(count: int) -> int:
    """Steps in the running mean of a curve of `count` points: about a thirtieth, odd."""
    return 2 * (count // 60) + (3 if count >= 12 else 1)


def _series(name: str, colour: str, rows: list[dict[str, Any]], x: str, y: str) -> Series:
    points = [(row[x], row[y]) for row in rows if number(row.get(x)) is not None and number(row.get(y)) is not None]
    values = np.array(points, dtype=float).reshape(-1, 2)
    return Series(name, colour, values[:, 0], values[:, 1])


def thin(x: np.ndarray, y: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Keep each bin's lowest and highest point, so that a long curve stays small and no spike is lost."""
    if x.size <= MOST_POINTS:
        return x, y
    bins = np.array_split(np.arange(x.size), MOST_POINTS // 2)
    keep = sorted({int(part[pick(y[part])]) for part in bins for pick in (np.argmin, np.argmax)})
    return x[keep], y[keep]
