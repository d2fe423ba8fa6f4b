"""Scores: accuracy with an honest interval, response length, format and stop rates."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from megatron_octo.errors import DataError
from megatron_octo.evaluate.grade import Verdict, count_verdicts

Z_95 = 1.96
"""Standard normal quantile of a two-sided 95% interval."""


@dataclass(frozen=True)
class Graded:
    """One graded response.

    Args:
        problem: id of the problem.
        verdict: the grader's verdict.
        tokens: length of the response, its end-of-text token not counted.
        stopped: whether it ended by itself.
    """

    problem: str
    verdict: Verdict
    tokens: int
    stopped: bool


def wilson(share: float, n: float, z: float = Z_95) -> tuple[float, float]:
    """Wilson's score interval of a proportion (Wilson 1927).

    Args:
        share: observed proportion, 0 to 1.
        n: number of independent trials, > 0; an effective number may be fractional.
        z: normal quantile.

    Returns:
        Lower and upper bound, within 0 to 1.

    Raises:
        ValueError: no trials, or a share outside 0 to 1.
    """
    if not n > 0 or not 0 <= share <= 1:
        raise ValueError(f"no interval for a share of {share} in {n} trials")
    centre = (share + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * math.sqrt(share * (1 - share) / n + z * z / (4 * n * n))
    # At the ends the bound is exact; rounding must not push it past the observed share.
    low = 0.0 if share == 0 else max(0.0, centre - half)
    return low, 1.0 if share == 1 else min(1.0, centre + half)


def effective_trials(shares: Sequence[float], samples: int) -> float:
    """Independent trials that several samples of each problem are worth.

    Samples of one problem resemble each other, so k samples of n problems count as less than n k trials: as many
    as give the observed variance between problems; at least n, at most n k.

    Args:
        shares: per problem, the share of its samples that is correct.
        samples: samples per problem (k).

    Returns:
        The effective number of trials; n where the variance says nothing (k = 1, or all shares equal 0 or 1).
    """
    n, mean = len(shares), math.fsum(shares) / len(shares)
    if samples == 1 or n == 1 or mean in (0.0, 1.0):
        return float(n)
    variance_of_mean = math.fsum((share - mean) ** 2 for share in shares) / (n - 1) / n
    if variance_of_mean == 0:
        return float(n * samples)
    return min(max(mean * (1 - mean) / variance_of_mean, n), n * samples)


def score(responses: Sequence[Graded]) -> dict[str, Any]:
    """Score one pass over a set of problems.

    Args:
        responses: every response, the same number for each problem.

    Returns:
        accuracy (with several samples: pass@1, the mean over problems of the share correct), low, high (95% Wilson
        interval at interval_n effective trials, see `effective_trials`), n_problems, samples_per_problem, correct,
        mean_response_tokens, format_rate (responses with a closed box), stop_rate, verdicts (count of each kind).

    Raises:
        DataError: no responses, or an unequal number for some problem.
    """
    correct: dict[str, list[bool]] = {}
    for response in responses:
        correct.setdefault(response.problem, []).append(response.verdict.correct)
    counts = {len(each) for each in correct.values()}
    if len(counts) != 1:
        raise DataError(
            f"{len(responses)} responses with {sorted(counts)} a problem", "each problem is answered equally often"
        )
    samples = counts.pop()
    shares = [sum(each) / samples for each in correct.values()]
    accuracy, trials = math.fsum(shares) / len(shares), effective_trials(shares, samples)
    low, high = wilson(accuracy, trials)
    return {
        "accuracy": accuracy,
        "low": low,
        "high": high,
        "interval_n": trials,
        "n_problems": len(shares),
        "samples_per_problem": samples,
        "correct": sum(sum(each) for each in correct.values()),
        "mean_response_tokens": _mean(response.tokens for response in responses),
        "format_rate": _mean(response.verdict.extracted is not None for response in responses),
        "stop_rate": _mean(response.stopped for response in responses),
        "verdicts": count_verdicts(response.verdict for response in responses),
    }


def _mean(values: Any) -> float:
    values = [float(value) for value in values]
    return math.fsum(values) / len(values)
