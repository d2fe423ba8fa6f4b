"""Passes over one source, each shuffled anew: which documents its windows hold.

Megatron shuffles all epochs of a run together, so asking for more windows changes the windows asked for before. Here
epoch by epoch is shuffled, from one random stream: a longer run starts with exactly the shorter one. Within the first
epoch the order is Megatron's own.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from megatron_octo.data.index.pairs import Index
from megatron_octo.data.mix.cache import cached, found
from megatron_octo.data.mix.order import borders_of_windows

_LAYOUT = 3  # of the cached directory; raised when its meaning changes


class Epochs(NamedTuple):
    """All epochs of a source, laid end to end in the form Megatron's reader expects.

    Args:
        document_index: documents in the order they are read, int32 [epochs x documents].
        sample_index: borders of windows as (place in the document index, offset), int64 [epochs x (windows + 1), 2];
            a window reaches to the token at the next border, its last label.
        shuffle_index: rows of the borders in the order the windows are read, int64 [epochs x windows].
    """

    document_index: np.ndarray
    sample_index: np.ndarray
    shuffle_index: np.ndarray


def epochs_of(index: Index, sequence_length: int, epochs: int, seed: int, digest: str, cache: Path) -> Epochs:
    """Passes over a source, from the cache or computed and put there.

    Args:
        index: of the source.
        sequence_length: tokens of a window.
        epochs: how many passes.
        seed: of the random stream that shuffles documents and windows of every epoch.
        digest: SHA-256 of the index: the lengths of all documents, which the order follows from.
        cache: directory for index arrays.

    Raises:
        DataError: the cache is damaged.
        EnvironmentProblem: megatron-core's compiled helper is missing.
    """
    order = _order(sequence_length, epochs, seed, digest)
    return Epochs(*cached(cache, order, Epochs._fields, lambda: shuffled(index, sequence_length, epochs, seed)))


def cached_epochs(sequence_length: int, epochs: int, seed: int, digest: str, cache: Path) -> Epochs | None:
    """Passes over a source as a run has left them in its cache; None where it has not. Writes nothing."""
    arrays = found(cache, _order(sequence_length, epochs, seed, digest), Epochs._fields)
    return None if arrays is None else Epochs(*arrays)


def _order(sequence_length: int, epochs: int, seed: int, digest: str) -> dict[str, Any]:
    return {"layout": _LAYOUT, "index": digest, "sequence_length": sequence_length, "epochs": epochs, "seed": seed}


def shuffled(index: Index, sequence_length: int, epochs: int, seed: int) -> Epochs:
    """Compute passes over a source; see `epochs_of`."""
    stream, documents = np.random.RandomState(seed), index.documents
    document_index, sample_index, shuffle_index = [], [], []
    for epoch in range(epochs):
        order = np.arange(documents, dtype=np.int32)
        stream.shuffle(order)
        borders = borders_of_windows(index.lengths, order, sequence_length, index.tokens)
        windows = np.arange(len(borders) - 1, dtype=np.int64)
        stream.shuffle(windows)
        borders[:, 0] += epoch * documents
        document_index.append(order)
        sample_index.append(borders)
        shuffle_index.append(windows + epoch * len(borders))
    return Epochs(*(np.concatenate(parts) for parts in (document_index, sample_index, shuffle_index)))
