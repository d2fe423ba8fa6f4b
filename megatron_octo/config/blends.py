"""Which mixture holds at which window of the data order: phases of a run, and what a branch takes over."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any, NamedTuple

from megatron_octo.config.mixture import DataConfig, Source


class Blend(NamedTuple):
    """One mixture of an order, until the next begins.

    Args:
        first: window of the order that it begins at.
        weights: share of each source, by name in order; they sum to one.
    """

    first: int
    weights: dict[str, float]


def shares(mixture: Mapping[str, Source]) -> dict[str, float]:
    """Weights of a mixture made to sum to one exactly, in the order of the sources' names.

    Sorting makes the global order a function of the mixture alone, not of the order its keys were written in.
    """
    total = math.fsum(source.weight for source in mixture.values())
    return {name: mixture[name].weight / total for name in sorted(mixture)}


def blends_of(data: DataConfig, first_window: int = 0, history: Sequence[Mapping[str, Any]] = ()) -> list[Blend]:
    """Every mixture of a run's data order.

    Args:
        data: mixture and phases of the run; their positions count from its own first window.
        first_window: of the order, that the run begins with; not 0 for a branch that reads on.
        history: what a lineage record says of the windows before: see `read_so_far`. A branch with its parent's
            mixture goes on within it; one with another begins a new blend.

    Returns:
        The blends in order, the first from window 0 on.
    """
    own = [Blend(first_window + window, shares(mixture)) for window, mixture in data.mixtures]
    before = [Blend(int(one["first"]), dict(one["weights"])) for one in history]
    if not before:
        return [Blend(0, own[0].weights), *own[1:]]
    return before + (own[1:] if _same(before[-1].weights, own[0].weights) else own)


def _same(one: Mapping[str, float], other: Mapping[str, float]) -> bool:
    """Whether two mixtures are one, their weights written with as many digits as anybody writes."""
    return one.keys() == other.keys() and all(math.isclose(one[name], other[name], rel_tol=1e-9) for name in one)


def read_so_far(blends: Sequence[Blend], windows: int) -> list[Blend]:
    """The blends of the first `windows` windows: all that an order has been until there."""
    return [blend for blend in blends if blend.first < windows]


def shared_out(blends: Sequence[Blend], first: int, last: int) -> dict[str, float]:
    """Windows that each source has between two places of an order, by its shares: within a few of what is dealt.

    Args:
        blends: of the order.
        first: a window.
        last: the window behind the last one.
    """
    found: dict[str, float] = {}
    for blend, end in zip(blends, [*(blend.first for blend in blends[1:]), last], strict=True):
        windows = max(0, min(end, last) - max(blend.first, first))
        for name, weight in blend.weights.items():
            found[name] = found.get(name, 0.0) + weight * windows
    return dict(sorted(found.items()))


def place_of(blends: Sequence[Blend], source: str, windows: float) -> float | None:
    """The place of an order where a source has had so many windows, by its shares; None if it never has."""
    had = 0.0
    for blend, after in pairwise([*blends, None]):
        weight = blend.weights.get(source, 0.0)
        there = blend.first + (windows - had) / weight if weight else math.inf
        if after is None or there <= after.first:
            return None if math.isinf(there) else there
        had += weight * (after.first - blend.first)
    return None
