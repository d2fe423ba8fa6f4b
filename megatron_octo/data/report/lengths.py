"""How long the documents of a pair are: a histogram over bins whose borders grow by a constant factor."""

from __future__ import annotations

from typing import Any

import numpy as np

from megatron_octo.data.index.pairs import stretches

_LONGEST = 31  # powers of two: document lengths are int32
EDGES = np.unique(np.round(2.0 ** (np.arange(2 * _LONGEST + 1) / 2)).astype(np.int64))
"""Borders of the bins in tokens, two bins to a doubling; the first bin begins at 1."""


def length_histogram(lengths: np.ndarray) -> dict[str, Any]:
    """Count documents by length; takes the same memory for any number of them.

    Args:
        lengths: tokens of each document, int32 [documents].

    Returns:
        `shortest`, `longest`, `mean`, `middle` (the bin that holds the median, from and below), and `bins`: those from
        the first to the last that holds a document, each `from`, `below`, `documents`, `tokens`.
    """
    counts, tokens = np.zeros(len(EDGES) - 1, np.int64), np.zeros(len(EDGES) - 1, np.float64)
    shortest, longest = np.iinfo(np.int64).max, 0
    for part in stretches(lengths):
        place = np.searchsorted(EDGES, np.maximum(part, 1), side="right") - 1
        counts += np.bincount(place, minlength=len(counts))
        tokens += np.bincount(place, weights=part, minlength=len(counts))
        shortest, longest = min(shortest, int(part.min())), max(longest, int(part.max()))
    held = np.flatnonzero(counts)
    if not len(held):
        return {"shortest": None, "longest": None, "mean": None, "middle": None, "bins": []}
    middle = int(np.searchsorted(np.cumsum(counts), (counts.sum() + 1) // 2))
    bins = [
        {"from": int(EDGES[i]), "below": int(EDGES[i + 1]), "documents": int(counts[i]), "tokens": int(tokens[i])}
        for i in range(held[0], held[-1] + 1)
    ]
    return {
        "shortest": shortest,
        "longest": longest,
        "mean": float(tokens.sum() / counts.sum()),
        "middle": [int(EDGES[middle]), int(EDGES[middle + 1])],
        "bins": bins,
    }
