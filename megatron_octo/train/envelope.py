"""How far FP8 may be from BF16, and what follows when it is further: pure rules on numbers.

A comparison is one relative difference a quantity ("loss", "layer 3": the layer's gradient norm). The first ones make
the envelope, mean and spread of each quantity; a later one outside it is a strike, and so is, at any time, one beyond
the tolerance. Strikes in a row call for action.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

from megatron_octo.config.precision import SentinelConfig

LOSS = "loss"
_ALWAYS_NORMAL = 0.1  # of the tolerance: an envelope of a few tiny differences must not make noise a strike
_EXPLAINS = 0.5  # of the excess: what a layer's move must take away for the layer to be the cause

Differences = dict[str, float]


class Verdict(NamedTuple):
    """What a comparison says.

    Args:
        excess: largest difference over its limit; above 1 is outside.
        worst: the quantity it belongs to.
        strikes: comparisons in a row outside, this one among them.
        due: there are enough strikes for action.
    """

    excess: float
    worst: str
    strikes: int
    due: bool


def layer_name(number: int) -> str:
    """The quantity of a layer's gradient norm."""
    return f"layer {number}"


def relative(measured: dict[str, float], reference: dict[str, float]) -> Differences:
    """Relative differences by quantity; infinite where a measured value is no number or the reference is zero."""
    return {name: _relative(measured[name], value) for name, value in reference.items()}


def limits(memory: dict[str, Any], config: SentinelConfig, names: list[str]) -> dict[str, float]:
    """The largest difference of each quantity that is inside.

    Args:
        memory: the sentinel's, as `judge` keeps it.
        config: tolerances.
        names: the quantities.
    """
    return {name: _limit(memory, config, name) for name in names}


def excess(differences: Differences, allowed: dict[str, float]) -> tuple[float, str]:
    """Largest difference over its limit, and whose it is."""
    name = max(differences, key=lambda name: differences[name] / allowed[name])
    return differences[name] / allowed[name], name


def judge(memory: dict[str, Any], config: SentinelConfig, differences: Differences) -> Verdict:
    """Judge one comparison and remember it.

    Args:
        memory: "count", "mean", "square" (sums of squared deviations) and "strikes", in JSON's types; changed.
        config: tolerances.
        differences: the comparison.
    """
    over, worst = excess(differences, limits(memory, config, list(differences)))
    outside = over > 1
    if not outside and memory.get("count", 0) < config.warmup:
        _remember(memory, differences)
    memory["strikes"] = memory.get("strikes", 0) + 1 if outside else 0
    return Verdict(over, worst, memory["strikes"], memory["strikes"] >= config.patience)


def choose(before: float, after: dict[int, float]) -> int | None:
    """The one layer whose move to BF16 explains a bad comparison.

    Args:
        before: the excess with no layer moved.
        after: the excess with each layer alone moved.

    Returns:
        The layer whose move brings the comparison inside or takes at least half of the excess away, the best of
        several; None if no single layer does.
    """
    if not after:
        return None
    layer = min(after, key=lambda number: (after[number], number))
    return layer if after[layer] <= max(1.0, _EXPLAINS * before) and after[layer] < before else None


def _relative(measured: float, reference: float) -> float:
    difference = abs(measured - reference)
    if difference == 0:
        return 0.0
    return difference / abs(reference) if math.isfinite(difference) and reference else math.inf


def _limit(memory: dict[str, Any], config: SentinelConfig, name: str) -> float:
    tolerance = config.loss_tolerance if name == LOSS else config.grad_tolerance
    count = memory.get("count", 0)
    if count < config.warmup:
        return tolerance
    spread = math.sqrt(memory["square"].get(name, 0.0) / max(count - 1, 1))
    usual = memory["mean"].get(name, 0.0) + config.sigma * spread
    return min(tolerance, max(usual, _ALWAYS_NORMAL * tolerance))


def _remember(memory: dict[str, Any], differences: Differences) -> None:
    """Welford's running mean and sum of squared deviations."""
    count = memory["count"] = memory.get("count", 0) + 1
    means, squares = memory.setdefault("mean", {}), memory.setdefault("square", {})
    for name, value in differences.items():
        step = value - means.get(name, 0.0)
        means[name] = means.get(name, 0.0) + step / count
        squares[name] = squares.get(name, 0.0) + step * (value - means[name])
