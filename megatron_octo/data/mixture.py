"""A mixture as arithmetic: weights -> which source the next window comes from, and how often a source repeats."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from megatron_octo.config.run import DataConfig
from megatron_octo.data.index.digest import stray_token
from megatron_octo.data.index.encode import vocabulary_of
from megatron_octo.data.index.pairs import Index, bin_path, read_index
from megatron_octo.errors import DataError, EnvironmentProblem

_SCANNED = 256 * 2**20


@dataclass(frozen=True)
class Order:
    """Where each window of the global order comes from.

    Args:
        source: position of its source among the sorted source names, int16 [windows].
        number: how many windows of that source came before, int64 [windows].
    """

    source: np.ndarray
    number: np.ndarray


def shares(data: DataConfig) -> dict[str, float]:
    """Weights of a mixture made to sum to one, in the order of the sources' names.

    Sorting makes the global order a function of the mixture alone, not of the order its keys were written in.
    """
    total = math.fsum(source.weight for source in data.mixture.values())
    return {name: data.mixture[name].weight / total for name in sorted(data.mixture)}


def order(weights: list[float], windows: int) -> Order:
    """Deal windows to sources so that after every window each source is as close to its share as can be.

    This is Megatron's blend. It does not look ahead, so a longer order starts with the shorter one.

    Args:
        weights: shares that sum to one.
        windows: length of the order.

    Returns:
        The order, [windows].

    Raises:
        EnvironmentProblem: megatron-core's compiled helper is missing.
    """
    source, number = np.zeros(windows, np.int16), np.zeros(windows, np.int64)
    if windows:
        compiled_helper().build_blending_indices(source, number, np.array(weights), len(weights), windows, False)
    return Order(source, number)


def windows_per_epoch(tokens: int, sequence_length: int) -> int:
    """Whole windows one pass over a source gives: each needs its length and one token more for the last label."""
    return max(0, (tokens - 1) // sequence_length)


def open_source(data: DataConfig, name: str) -> Index:
    """Open one source of a mixture.

    Raises:
        DataError: its pair of files is missing or damaged, or has fewer tokens than one window needs.
    """
    index = read_index(data.mixture[name].path)
    if not windows_per_epoch(index.tokens, data.sequence_length):
        raise DataError(
            f"data.mixture.{name} ({index.prefix}) has {index.tokens} tokens in {index.documents} documents",
            f"one window of data.sequence_length = {data.sequence_length} needs {data.sequence_length + 1}",
            "shorten the sequence, build more data, or drop the source",
        )
    return index


def check_tokenizer(data: DataConfig, vocabulary: int) -> None:
    """Check that every entry of the tokenizer is a row of the model's embedding.

    Raises:
        DataError: it has more entries than the model has rows.
    """
    size = vocabulary_of(data.tokenizer)
    if size > vocabulary:
        raise DataError(
            f"data.tokenizer {data.tokenizer} has {size} entries, model.vocabulary is {vocabulary}",
            "every token needs a row of the embedding",
            f"set model.vocabulary to {size} or name the model's own tokenizer",
        )


def check_tokens(prefix: Path, field: str, vocabulary: int) -> bool:
    """Check that every token of an indexed dataset is a row of the model's embedding, where that takes a moment only.

    Args:
        prefix: path of the pair without suffix.
        field: where a configuration names it.
        vocabulary: rows of the model's embedding without padding.

    Returns:
        Whether its tokens were looked at: those of files above 256 MiB are checked as they are read (train.data).

    Raises:
        DataError: it holds a larger token, or one below 0.
    """
    if bin_path(prefix).stat().st_size > _SCANNED:
        return False
    stray = stray_token(read_index(prefix).all_tokens(), vocabulary)
    if stray is not None:
        raise DataError(
            f"{field} ({prefix}) holds token {stray}, model.vocabulary is {vocabulary}",
            "every token needs a row of the embedding",
            "build the data with this model's tokenizer; if it was, the file is damaged: build it again",
        )
    return True


def compiled_helper() -> Any:
    """Import megatron-core's compiled index functions, which its wheels bring along.

    Never compiles: megatron's own attempt ends the process where it finds no Makefile.

    Raises:
        EnvironmentProblem: the installed megatron-core has none for this Python.
    """
    from megatron_octo.data.index.pairs import import_indexed_dataset

    import_indexed_dataset()
    try:
        from megatron.core.datasets import helpers
    except ImportError as error:
        raise EnvironmentProblem(
            f"megatron-core's compiled dataset helper cannot be imported ({error})",
            "its wheels bring it along for CPython 3.11 and 3.12 on x86_64 Linux; this installation has none",
            "install the wheel: pip install --only-binary=:all: megatron-core==0.16.1",
        ) from None
    return helpers
