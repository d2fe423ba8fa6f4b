"""Held-out text for validation: the first windows of a source in file order, the same ones every time."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from megatron_octo.config.run import RunConfig
from megatron_octo.data.index.digest import stray_token
from megatron_octo.data.index.pairs import read_index
from megatron_octo.data.mix.mixture import windows_per_epoch
from megatron_octo.errors import DataError


class HeldOut:
    """Windows 0, 1, ... of one indexed dataset: its documents one after another, unshuffled, cut to one length.

    An item is a dict as training reads it: `tokens`, `labels`, `position_ids` int64 [s], `loss_mask` float32 [s].
    Items beyond the last window are padding: the first window under a mask of zeros, which no loss counts.

    Args:
        prefix: path of the pair without suffix.
        sequence_length: s, tokens of a window (labels reach one further).
        windows: how many are wanted; `count` says how many there are.

    Raises:
        DataError: the pair is missing, damaged, or shorter than one window.
    """

    def __init__(self, prefix: Path, sequence_length: int, windows: int) -> None:
        index = read_index(prefix)
        self._tokens, self._length = index.all_tokens(), sequence_length
        self.count = min(windows, windows_per_epoch(index.tokens, sequence_length))
        if not self.count:
            raise DataError(
                f"{prefix} has {index.tokens} tokens in {index.documents} documents",
                f"one window of data.sequence_length = {sequence_length} needs {sequence_length + 1}",
                "hold out more text, or drop the source from validation.sources",
            )

    def stray_token(self, vocabulary: int) -> int | None:
        """A token that a loss over these windows meets and the model has no row for; None if there is none."""
        return stray_token(self._tokens[: self.count * self._length + 1], vocabulary)

    def __getitem__(self, window: int) -> dict[str, Any]:
        import torch

        padding = window >= self.count
        first = 0 if padding else window * self._length
        both = torch.from_numpy(self._tokens[first : first + self._length + 1].astype(np.int64))
        return {
            "tokens": both[:-1],
            "labels": both[1:],
            "position_ids": torch.arange(self._length),
            "loss_mask": torch.full((self._length,), float(not padding)),
        }


def open_held_out(run: RunConfig) -> tuple[dict[str, HeldOut], list[str]]:
    """Open and check every source of a run's validation; it has one.

    Returns:
        The sources by name, and a sentence for each that has fewer windows than wanted: all of them are used.

    Raises:
        DataError: a source is missing, damaged, shorter than one window, or holds a token the model has no row for.
    """
    wanted, opened, short = run.validation, {}, []
    assert wanted is not None
    for name, prefix in wanted.sources.items():
        try:
            source = HeldOut(prefix, run.data.sequence_length, wanted.windows)
        except DataError as error:
            raise DataError(f"validation.sources.{name}: {error.what}", error.rule, error.fix) from None
        if (stray := source.stray_token(run.model.vocabulary)) is not None:
            raise DataError(
                f"validation.sources.{name} ({prefix}) holds token {stray}, model.vocabulary is {run.model.vocabulary}",
                "every token needs a row of the embedding",
                "build the data with this model's tokenizer",
            )
        if source.count < wanted.windows:
            short.append(
                f"validation.sources.{name} has {source.count} of the {wanted.windows} windows asked for; all count"
            )
        opened[name] = source
    return opened, short
