"""What training reads: one global order of windows that follows from seed, mixture and sequence length alone."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from torch.utils.data import Dataset

from megatron_octo.config.run import DataConfig
from megatron_octo.data.mixture import Order, open_source, order, shares, windows_per_epoch
from megatron_octo.data.source import SourceDataset


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
    """What a run takes from one source: `epochs` above 1 means that it repeats."""

    share: float
    documents: int
    tokens: int
    windows: int
    windows_per_epoch: int
    epochs: float


class TrainDataset(Dataset[dict[str, Any]]):
    """The windows of a mixture in their global order; item n is the same for every run that reads n or more.

    An item is a dict: `tokens`, `labels`, `position_ids` int64 [s], `loss_mask` float32 [s], and `dataset_id`, the
    place of its source in `sources`. Windows cross document borders; positions and attention do not start anew there.

    Args:
        sources: one dataset a source, in the order of their names.
        windows: the global order.
        facts: per source, what this order takes from it.
    """

    def __init__(self, sources: dict[str, SourceDataset], windows: Order, facts: dict[str, dict[str, Any]]) -> None:
        self.sources, self.facts, self._order = sources, facts, windows
        self._datasets = list(sources.values())

    def __len__(self) -> int:
        return len(self._order.source)

    def __getitem__(self, window: int) -> dict[str, Any]:
        dataset, number = self._place(window)
        return {"dataset_id": dataset, **self._datasets[dataset][number]}

    @property
    def digests(self) -> dict[str, dict[str, str]]:
        """What tells each source from another dataset under the same path; see `content_digest`."""
        return {name: source.digest for name, source in self.sources.items()}

    def window(self, window: int) -> Window:
        """Tell where a window comes from.

        Raises:
            IndexError: the order has no such window.
        """
        dataset, number = self._place(window)
        source = self._datasets[dataset]
        return Window(
            window, list(self.sources)[dataset], number, number // source.windows, source.documents_of(number)
        )

    def _place(self, window: int) -> tuple[int, int]:
        if not 0 <= window < len(self):
            raise IndexError(f"window {window} of {len(self)}")
        return int(self._order.source[window]), int(self._order.number[window])


def build_train_dataset(data: DataConfig, sequences: int, cache: Path) -> TrainDataset:
    """Open the mixture of a run.

    Not a collective: works with and without torch.distributed, on any rank and on several at once, since each cached
    array is published by a rename. On large data let one process compute and the others find its work:

        if rank == 0: build_train_dataset(...)
        torch.distributed.barrier()
        dataset = build_train_dataset(...)

    Args:
        data: tokenizer, sources with weights (normalised here), sequence length, seed.
        sequences: windows the run reads in all, over all its ranks. More windows never change earlier ones. A source
            that is shorter than its share repeats, in a new order each time; `facts` of the result says how often.
            The end of an epoch that fills no whole window is left out.
        cache: directory for index arrays; may be shared by runs and processes and deleted at any time in between.

    Returns:
        The dataset, `sequences` windows long.

    Raises:
        DataError: a source is missing, damaged, or has fewer tokens than one window needs.
        EnvironmentProblem: megatron-core's compiled helper is missing.
    """
    share = shares(data)
    indices = {name: open_source(data, name) for name in share}
    windows = order(list(share.values()), sequences)
    taken = np.bincount(windows.source, minlength=len(share))
    sources, facts = {}, {}
    for name, count in zip(share, taken.tolist(), strict=True):
        each = windows_per_epoch(indices[name].tokens, data.sequence_length)
        epochs = max(1, -(-count // each))
        sources[name] = SourceDataset(indices[name], data.sequence_length, epochs, data.seed, cache)
        found = SourceFacts(share[name], indices[name].documents, indices[name].tokens, count, each, count / each)
        facts[name] = asdict(found)
    return TrainDataset(sources, windows, facts)


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
