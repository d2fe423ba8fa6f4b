"""One source as Megatron's GPT dataset: whole epochs in a row, each shuffled anew."""

from __future__ import annotations

import warnings
from pathlib import Path

import numpy as np

from megatron_octo.data.index.pairs import Index
from megatron_octo.data.mix.epochs import Epochs, epochs_of
from megatron_octo.data.mix.identity import content_digest
from megatron_octo.data.mix.mixture import windows_per_epoch

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # missing GPU kernels, which reading data does not need
    from megatron.core.datasets import gpt_dataset
    from megatron.core.datasets.indexed_dataset import IndexedDataset
    from megatron.core.datasets.utils import Split


class _NoTokenizer:
    """Megatron asks its dataset for a tokenizer; windows are always full and unmasked, so none of it is used."""

    vocab_size = None
    eod = -2  # no token, and not Megatron's own 'no padding' mark -1 either
    pad = -(2**62)  # a damaged file may hold -1, which Megatron's mark would turn into a 0 that no loss counts
    unique_identifiers = {"class": "none"}


class SourceDataset(gpt_dataset.GPTDataset):
    """Windows of one indexed dataset, `epochs` passes in a row.

    Args:
        index: the checked index of the pair.
        sequence_length: tokens of a window (labels reach one further).
        epochs: passes over the source.
        seed: of the random stream that shuffles documents and windows of every epoch.
        cache: directory for index arrays; written once, atomically, and safe for several processes.
        digest: its `content_digest`, where another process has found it already.
    """

    def __init__(
        self, index: Index, sequence_length: int, epochs: int, seed: int, cache: Path,
        digest: dict[str, str] | None = None,
    ) -> None:  # fmt: skip
        self._index, self._epochs, self._cache = index, epochs, cache
        self.digest = digest or content_digest(index)
        """Of the lengths of all documents, which the order of windows follows from, and of tokens from all over."""
        self.windows = windows_per_epoch(index.tokens, sequence_length)
        config = gpt_dataset.GPTDatasetConfig(
            random_seed=seed,
            sequence_length=sequence_length,
            blend=([str(index.prefix)], None),
            split="1,0,0",
            tokenizer=_NoTokenizer(),
            reset_position_ids=False,
            reset_attention_mask=False,
            eod_mask_loss=False,
            create_attention_mask=False,
        )
        documents = np.arange(index.documents, dtype=np.int32)
        stored = IndexedDataset(str(index.prefix))
        super().__init__(stored, str(index.prefix), documents, epochs * self.windows, Split.train, config)

    def __len__(self) -> int:
        return len(self.shuffle_index)

    def documents_of(self, number: int) -> list[int]:
        """Documents a window holds tokens of, in order; Megatron's label token included."""
        _, documents = self._query_document_sample_shuffle_indices(number)
        return documents.tolist()

    def _build_document_sample_shuffle_indices(self) -> Epochs:
        """Take the index arrays from the cache, or compute and publish them."""
        seed, length = self.config.random_seed, self.config.sequence_length
        return epochs_of(self._index, length, self._epochs, seed, self.digest["index"], self._cache)
