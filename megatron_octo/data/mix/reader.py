"""What training reads: one global order of windows that follows from seed, mixtures and sequence length alone."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from torch.utils.data import Dataset

from megatron_octo.config.blends import Blend, blends_of
from megatron_octo.config.mixture import DataConfig
from megatron_octo.data.mix.cache import cached
from megatron_octo.data.mix.mixture import open_source, windows_per_epoch
from megatron_octo.data.mix.order import Order, order
from megatron_octo.data.mix.source import SourceDataset

_LAYOUT = 1  # of the cached order; raised when its meaning changes


@dataclass(frozen=True)
class Window:
    """Where one window of the global order comes from.

    Args:
        window: its place in the global order.
        source: name of its source in the mixture.
        number: its place among the windows of that source.
        epoch: pass over the source it belongs to, from 0.
        documents: documents it holds tokens of, in order.
    """

    window: int
    source: str
    number: int
    epoch: int
    documents: list[int]


@dataclass(frozen=True)
class SourceFacts:
    """What an order takes from one source in all: `epochs` above 1 means that it repeats."""

    share: float
    documents: int
    tokens: int
    windows: int
    windows_per_epoch: int
    epochs: float


class TrainDataset(Dataset[dict[str, Any]]):
    """The windows of a run's mixtures in their global order; item n is the same for every run that reads n or more.

    An item is a dict: `tokens`, `labels`, `position_ids` int64 [s], `loss_mask` float32 [s], and `dataset_id`, the
    place of its source among the names of the order. Windows cross document borders; positions and attention do not
    start anew there.

    Args:
        sources: one dataset a source; a branch has none of those that only its parent read.
        windows: the global order.
        facts: per source, what this order takes from it.
    """

    def __init__(self, sources: dict[str, SourceDataset], windows: Order, facts: dict[str, dict[str, Any]]) -> None:
        self.sources, self.facts, self._order = sources, facts, windows

    def __len__(self) -> int:
        return len(self._order.source)

    def __getitem__(self, window: int) -> dict[str, Any]:
        dataset, number = self._place(window)
        return {"dataset_id": dataset, **self.sources[self._order.names[dataset]][number]}

    @property
    def digests(self) -> dict[str, dict[str, str]]:
        """What tells each source from others, see `content_digest`: another dataset has another order."""
        return {name: source.digest for name, source in self.sources.items()}

    def window(self, window: int) -> Window:
        """Tell where a window comes from.

        Raises:
            IndexError: the order has no such window.
        """
        dataset, number = self._place(window)
        name = self._order.names[dataset]
        source = self.sources[name]
        return Window(window, name, number, number // source.windows, source.documents_of(number))

    def _place(self, window: int) -> tuple[int, int]:
        if not 0 <= window < len(self):
            raise IndexError(f"window {window} of {len(self)}")
        return int(self._order.source[window]), int(self._order.number[window])


def build_train_dataset(
    data: DataConfig,
    sequences: int,
    cache: Path,
    blends: Sequence[Blend] | None = None,
    known: Mapping[str, dict[str, str]] | None = None,
) -> TrainDataset:
    """Open the mixtures of a run.

    Not a collective: works with and without torch.distributed, on any rank and on several at once, since each cached
    array is published by a rename. On large data let one process check and compute, and the others use its work:

        known = build_train_dataset(...).digests if rank == 0 else None
        dataset = build_train_dataset(..., known=broadcast(known))

    Args:
        data: tokenizer, sources with weights, sequence length, seed.
        sequences: windows the order has in all. More windows never change earlier ones. A source that is shorter than
            its share repeats, in a new order each time; `facts` of the result says how often. The end of an epoch that
            fills no whole window is left out.
        cache: directory for index arrays; may be shared by runs and processes and deleted at any time in between.
        blends: the mixtures of the whole order, where the run reads on where another was; else they are its own.
        known: what `digests` of this very dataset was in another process just now: nothing is checked again.

    Returns:
        The dataset, `sequences` windows long.

    Raises:
        DataError: a source is missing, damaged, or has fewer tokens than one window needs.
        EnvironmentProblem: megatron-core's compiled helper is missing.
    """
    windows = _order(blends or blends_of(data), sequences, cache)
    taken = dict(zip(windows.names, np.bincount(windows.source, minlength=len(windows.names)).tolist(), strict=True))
    sources, facts = {}, {}
    for name in data.paths:
        index, count = open_source(data, name, checked=known is not None), taken[name]
        each = windows_per_epoch(index.tokens, data.sequence_length)
        epochs, digest = max(1, -(-count // each)), known[name] if known else None
        sources[name] = SourceDataset(index, data.sequence_length, epochs, data.seed, cache, digest)
        share = count / max(1, sequences)
        facts[name] = asdict(SourceFacts(share, index.documents, index.tokens, count, each, count / each))
    return TrainDataset(sources, windows, facts)


def _order(blends: Sequence[Blend], windows: int, cache: Path) -> Order:
    """The global order, computed by one process and mapped by the others."""
    names = sorted({name for blend in blends for name in blend.weights})
    made_from = {"layout": _LAYOUT, "blends": [blend._asdict() for blend in blends], "windows": windows}

    def compute() -> tuple[np.ndarray, np.ndarray]:
        found = order(blends, windows)
        return found.source, found.number

    return Order(names, *cached(cache, made_from, ("source", "number"), compute))


def windows(data: DataConfig, first: int, count: int, cache: Path) -> list[Window]:
    """Tell where a stretch of the global order comes from: the answer to who saw which document, and when.

    Args:
        data: as the run was given it.
        first: place of the first window; a run's step n reads windows n x global batch and on.
        count: how many windows.
        cache: as for `build_train_dataset`.

    Returns:
        One `Window` for each, in order.

    Raises:
        DataError: as `build_train_dataset`.
    """
    dataset = build_train_dataset(data, first + count, cache)
    return [dataset.window(number) for number in range(first, first + count)]
