"""One source as windows: Megatron's GPT dataset over whole epochs, each epoch shuffled anew.

Megatron shuffles all epochs of a run together, so asking for more windows changes the windows asked for before. Here
epoch by epoch is shuffled, from one random stream: a longer run starts with exactly the shorter one. Within the first
epoch the order is Megatron's own.
"""

from __future__ import annotations

import json
import os
import shutil
import tempfile
import warnings
from pathlib import Path
from typing import Any

import numpy as np

from megatron_octo.data.index.digest import content_digest, spot_digest
from megatron_octo.data.index.pairs import Index
from megatron_octo.data.mixture import compiled_helper, windows_per_epoch
from megatron_octo.errors import DataError
from megatron_octo.files import flush_to_disk, hash_json, write_json

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # missing GPU kernels, which reading data does not need
    from megatron.core.datasets import gpt_dataset
    from megatron.core.datasets.indexed_dataset import IndexedDataset
    from megatron.core.datasets.utils import Split

_LAYOUT = 3  # of the cached directory; raised when its meaning changes
_ARRAYS = ("document_index", "sample_index", "shuffle_index")
_ORDER = "order.json"


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
    """

    def __init__(self, index: Index, sequence_length: int, epochs: int, seed: int, cache: Path) -> None:
        self._index, self._epochs, self._cache = index, epochs, cache
        self.digest = content_digest(index)
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

    def _build_document_sample_shuffle_indices(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Take the index arrays from the cache, or compute and publish them."""
        order = self._order()
        directory = self._cache / hash_json(order)[:24]
        if not directory.is_dir():
            arrays = _shuffled_epochs(
                self._index.lengths, self.config.sequence_length, self._epochs, self.config.random_seed
            )
            _publish(dict(zip(_ARRAYS, arrays, strict=True)), order, directory)
        return _load(order, directory)

    def _order(self) -> dict[str, Any]:
        """Everything the cached arrays follow from, the document lengths included; it names and marks them."""
        return {
            "layout": _LAYOUT,
            "index": self.digest["index"],
            "sequence_length": self.config.sequence_length,
            "epochs": self._epochs,
            "seed": self.config.random_seed,
        }


def _shuffled_epochs(lengths: np.ndarray, sequence_length: int, epochs: int, seed: int) -> tuple[np.ndarray, ...]:
    """Index arrays of all epochs, laid end to end in the form Megatron's reader expects.

    Returns:
        Document order, int64 [epochs x documents]; window borders as (place in the document order, offset), int64
        [epochs x (windows + 1), 2]; and window order as rows of the borders, int64 [epochs x windows].
    """
    tokens = int(lengths.sum(dtype=np.int64))
    stream = np.random.RandomState(seed)
    documents = np.arange(len(lengths), dtype=np.int32)
    document_index, sample_index, shuffle_index = [], [], []
    for epoch in range(epochs):
        order = gpt_dataset._build_document_index(documents, 1, stream, False)
        borders = compiled_helper().build_sample_idx(lengths, order, sequence_length, 1, tokens, True, True)
        windows = len(borders) - 1
        shuffled = gpt_dataset._build_shuffle_index(windows, windows, stream)
        document_index.append(order)
        sample_index.append(borders.astype(np.int64) + [epoch * len(documents), 0])
        shuffle_index.append(shuffled.astype(np.int64) + epoch * (windows + 1))
    return tuple(np.concatenate(parts) for parts in (document_index, sample_index, shuffle_index))


def _publish(arrays: dict[str, np.ndarray], order: dict[str, Any], directory: Path) -> None:
    """Write arrays into a temporary directory and rename it; whoever comes second throws its copy away."""
    directory.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=".partial-", dir=directory.parent))
    try:
        for name, array in arrays.items():
            np.save(temporary / f"{name}.npy", array, allow_pickle=False)
            flush_to_disk(temporary / f"{name}.npy")
        digests = {name: spot_digest(temporary / f"{name}.npy") for name in arrays}
        write_json(temporary / _ORDER, {**order, "arrays": digests})
        os.rename(temporary, directory)
    except OSError:
        if not directory.is_dir():
            raise
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _load(order: dict[str, Any], directory: Path) -> tuple[Any, ...]:
    """Open cached arrays, having seen that they are of this order and not, say, of another seed, or copied in part."""
    try:
        found = json.loads((directory / _ORDER).read_text(encoding="utf-8"))
        digests = found.pop("arrays", {}) if isinstance(found, dict) else {}
        if found != order:
            raise ValueError(f"it holds the order {found}, not {order}")
        altered = [name for name in _ARRAYS if spot_digest(directory / f"{name}.npy") != digests.get(name)]
        if altered:
            raise ValueError(f"{altered[0]}.npy is not as it was written")
        return tuple(np.load(directory / f"{name}.npy", mmap_mode="r", allow_pickle=False) for name in _ARRAYS)
    except (OSError, EOFError, ValueError) as error:
        raise DataError(
            f"index cache {directory} is damaged ({error})", "it is computed from the data and can be computed again",
            "delete the directory",
        ) from None  # fmt: skip
