"""The order of a mixture's windows: a pure function of weights and place, with megatron-core's own arithmetic."""

from __future__ import annotations

import importlib.machinery
import importlib.util
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from megatron_octo.config.blends import Blend
from megatron_octo.errors import EnvironmentProblem


@dataclass(frozen=True)
class Order:
    """Where each window of the global order comes from.

    Args:
        names: of the sources of all its blends, sorted.
        source: place of its source among the names, int16 [windows].
        number: how many windows of that source came before, int64 [windows].
    """

    names: list[str]
    source: np.ndarray
    number: np.ndarray

    def windows_of(self, source: str) -> np.ndarray:
        """Places in the order of all windows of a source, int64; its window number n is the n-th of them."""
        return np.flatnonzero(self.source == self.names.index(source))


def order(blends: Sequence[Blend], windows: int) -> Order:
    """Deal windows to the sources of one mixture after the other; each source goes on after the windows it has had.

    An order does not look ahead: a longer one, or one with other mixtures later, starts with the shorter one.

    Args:
        blends: of the order; the first from window 0 on.
        windows: length of the order.

    Returns:
        The order, [windows].

    Raises:
        EnvironmentProblem: megatron-core's compiled helper is missing.
    """
    names = sorted({name for blend in blends for name in blend.weights})
    source, number = np.zeros(windows, np.int16), np.zeros(windows, np.int64)
    taken = np.zeros(len(names), np.int64)
    for blend, end in zip(blends, [*(blend.first for blend in blends[1:]), windows], strict=True):
        part = slice(min(blend.first, windows), min(end, windows))
        deal(list(blend.weights.values()), source[part], number[part])
        places = np.array([names.index(name) for name in blend.weights], np.int16)
        dealt = np.bincount(source[part], minlength=len(places))
        number[part] += taken[places][source[part]]
        source[part] = places[source[part]]
        taken[places] += dealt
    return Order(names, source, number)


def deal(weights: Sequence[float], source: np.ndarray, number: np.ndarray) -> None:
    """Deal windows so that after every one each source is as close to its share as can be: Megatron's blend.

    Args:
        weights: shares that sum to one.
        source: int16 [windows]; filled with each window's source.
        number: int64 [windows]; filled with how many windows of that source came before.
    """
    if len(source):
        compiled_helper().build_blending_indices(source, number, np.array(weights), len(weights), len(source), False)


def borders_of_windows(lengths: np.ndarray, documents: np.ndarray, sequence_length: int, tokens: int) -> np.ndarray:
    """Cut one pass over shuffled documents into windows, as Megatron does.

    Args:
        lengths: tokens of each document, int32 [documents].
        documents: the documents in the order of this pass, int32.
        sequence_length: tokens of a window; the next one begins with its last label.
        tokens: of all documents.

    Returns:
        Borders as (place in the order of documents, offset), int64 [windows + 1, 2].
    """
    cut = compiled_helper().build_sample_idx_int32(lengths, documents, sequence_length, 1, tokens, True, 1)
    return cut.astype(np.int64)


@cache
def compiled_helper() -> Any:
    """megatron-core's compiled index functions, which its wheels bring along; loaded without megatron-core and torch.

    Never compiles: megatron's own attempt ends the process where it finds no Makefile.

    Raises:
        EnvironmentProblem: the installed megatron-core has none for this Python.
    """
    try:
        package = importlib.util.find_spec("megatron.core")
        places = package.submodule_search_locations if package else None
        folder = Path(list(places or ["megatron-core is not installed"])[0]) / "datasets"
        spec = importlib.machinery.PathFinder.find_spec("helpers_cpp", [str(folder)])
        if spec is None or spec.loader is None:
            raise ImportError(f"no helpers_cpp in {folder}")
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
    except ImportError as error:
        raise EnvironmentProblem(
            f"megatron-core's compiled dataset helper cannot be imported ({error})",
            "its wheels bring it along for CPython 3.11 and 3.12 on x86_64 Linux; this installation has none",
            "install the wheel: pip install --only-binary=:all: megatron-core==0.16.1",
        ) from None
    return module
