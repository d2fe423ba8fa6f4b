"""What a mixture will take from its sources, before anything runs: tokens, passes, and when a source is exhausted."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from megatron_octo.config.blends import Blend, place_of, shared_out
from megatron_octo.config.mixture import DataConfig, Source
from megatron_octo.data.corpora.registry import ADAPTERS, Adapter
from megatron_octo.data.index.pairs import read_index
from megatron_octo.data.mix.mixture import windows_per_epoch
from megatron_octo.data.mix.replace import is_there


@dataclass(frozen=True)
class Expected:
    """What a run takes from one source.

    Args:
        source: its name.
        share: of the run's windows.
        tokens: that the run reads of it.
        windows: the same in windows of the sequence length.
        size: tokens of one pass over it; None where nobody has published them.
        known: where the size is from: `index` (the pair is there), `published`, `remembered`, or `unknown`.
        passes: over the source since its order began; above 1 it repeats, in a new order each time.
        exhausted: token position of the run where the first pass ends; below 0 in its parent; None if it does not end.
    """

    source: str
    share: float
    tokens: int
    windows: int
    size: int | None
    known: str
    passes: float | None
    exhausted: int | None


def forecast(data: DataConfig, blends: Sequence[Blend], first: int, last: int) -> list[Expected]:
    """Say what each source gives between two windows of an order; within a few windows of what is dealt.

    Args:
        data: what the run reads, missing sources replaced.
        blends: every mixture of the order.
        first: window that the run begins with.
        last: window behind its last.

    Raises:
        DataError: a pair is damaged.
    """
    length = data.sequence_length
    own, all_read = shared_out(blends, first, last), shared_out(blends, 0, last)
    rows = []
    for name, source in _sources(data).items():
        size, known = _size(name, source)
        each = windows_per_epoch(size, length) if size else 0
        end = place_of(blends, name, each) if each and all_read[name] >= each else None
        rows.append(
            Expected(
                source=name,
                share=own[name] / max(1, last - first),
                tokens=round(own[name]) * length,
                windows=round(own[name]),
                size=size,
                known=known,
                passes=all_read[name] / each if each else None,
                exhausted=None if end is None else round(end - first) * length,
            )
        )
    return rows


def adapters_of(name: str, source: Source) -> list[Adapter]:
    """The corpora of the registry that a source is made of: those it names, or the one it is called like."""
    called = {_plain(known): adapter for known, adapter in ADAPTERS.items()}
    wanted = source.corpora or [name]
    return [called[_plain(corpus)] for corpus in wanted if _plain(corpus) in called]


def _plain(name: str) -> str:
    return name.replace("_", "-").replace(".", "-")


def _sources(data: DataConfig) -> dict[str, Source]:
    found: dict[str, Source] = {}
    for _, mixture in data.mixtures:
        found |= mixture
    return dict(sorted(found.items()))


def _size(name: str, source: Source) -> tuple[int | None, str]:
    if is_there(Path(source.path)):
        return read_index(source.path).tokens, "index"
    adapters = adapters_of(name, source)
    figures = [adapter.tokens for adapter in adapters if adapter.tokens is not None]
    if not figures or len(figures) < len(source.corpora or [name]):
        return None, "unknown"
    known = "published" if all(figure.status == "published" for figure in figures) else "remembered"
    return round(sum(figure.value for figure in figures)), known
