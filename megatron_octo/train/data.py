"""Window numbers -> the global batch of a step -> this rank's micro-batches.

Step n reads windows n x G to (n + 1) x G - 1 of the run's global order, G sequences a step; a branch that reads on
where its parent was counts from there. The order knows nothing of the layout, so the position is all a resume needs
and any layout reads the same tokens.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.utils.data import default_collate

from megatron_octo.config.run import RunConfig
from megatron_octo.data.index.digest import stray_token
from megatron_octo.errors import DataError
from megatron_octo.runtime.groups import Runtime

Batch = dict[str, torch.Tensor | None]

_NOTHING: Batch = {"tokens": None, "labels": None, "position_ids": None, "loss_mask": None}
_FIELDS = tuple(_NOTHING)


class Batches:
    """Reads this rank's share of each step.

    Args:
        run: batch sizes and layout.
        runtime: which share is this rank's.
        dataset: the run's windows in global order; each a dict of [s] tensors.
        first_window: the window that step 0 begins with.
    """

    def __init__(self, run: RunConfig, runtime: Runtime, dataset: Any, first_window: int = 0) -> None:
        self._dataset, self._device = dataset, runtime.device
        self._micro, self._global = run.batch.micro_batch, run.batch.global_batch
        self._share = self._global // runtime.data_size
        self._first = first_window + self._share * runtime.data_rank
        self._reads = runtime.is_first_stage or runtime.is_last_stage
        self._context, self._vocabulary = run.parallel.context, run.model.vocabulary

    @property
    def count(self) -> int:
        """Micro-batches of this rank in one step."""
        return self._share // self._micro

    def of_step(self, step: int, limit: int | None = None) -> list[Batch]:
        """The micro-batches of a step (counted from 0), or the first `limit` of them, each with [b, s] tensors.

        Stages that neither embed nor compute losses get empty ones.
        """
        if not self._reads:
            return [_NOTHING] * len(range(self.count)[:limit])
        first = step * self._global + self._first
        starts = range(first, first + self._share, self._micro)[:limit]
        return [self._collate(range(start, start + self._micro)) for start in starts]

    def _collate(self, windows: range) -> Batch:
        items = [self._dataset[window] for window in windows]
        self._check_vocabulary(items, windows)
        batch = {name: default_collate([item[name] for item in items]).to(self._device) for name in _FIELDS}
        if self._context > 1:
            from megatron.core.utils import get_batch_on_this_cp_rank

            batch = get_batch_on_this_cp_rank(batch)
        return batch

    def _check_vocabulary(self, items: list[dict[str, Any]], windows: range) -> None:
        """Refuse a token the model has no row for: its loss would be senseless, and no error."""
        for window, item in zip(windows, items, strict=True):
            both = torch.cat([item["tokens"], item["labels"][-1:]])
            if (stray := stray_token(both.numpy(), self._vocabulary)) is not None:
                raise DataError(
                    f"window {window} of the mixture holds token {stray}, model.vocabulary is {self._vocabulary}",
                    "every token needs a row of the embedding",
                    "build the data with this model's tokenizer; if it was, a file is damaged",
                )
