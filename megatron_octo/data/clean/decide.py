"""What to leave out of a shard, out of what all stages before found: leaks first, then duplicates.

A shard may hold millions of duplicates: they are kept as numbers, and texts are looked at one at a time.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import closing
from dataclasses import asdict, dataclass, replace
from heapq import merge
from typing import Any

import numpy as np

from megatron_octo.data.clean.exact import PAIR, pairs_of
from megatron_octo.data.clean.names import read_names
from megatron_octo.data.clean.removals import (
    BRIEF,
    EXACT,
    LEAK,
    NEAR,
    SHOWN,
    Removal,
    RemovalWriter,
    excerpt_of,
    load_removals,
    removals_path,
)
from megatron_octo.data.clean.tasks import EXAMPLES, Cleaning, Part
from megatron_octo.data.engine.stage import FILES


def decide(cleaning: Cleaning, part: Part) -> dict[str, Any]:
    """Write what to leave out of a shard; it is read again only where there are duplicates to show.

    Memory: 75 bytes for each duplicate of the shard, whatever their texts.
    """
    removed: Counter[str] = Counter()
    leaks: Counter[str] = Counter()
    examples: dict[str, list[dict[str, Any]]] = {LEAK: [], EXACT: [], NEAR: []}
    with closing(RemovalWriter(removals_path(cleaning.work, part.shard))) as writer:
        for removal in merge(_leaks_of(cleaning, part), _duplicates_of(cleaning, part), key=lambda found: found.place):
            writer.add(removal)
            removed[removal.reason] += 1
            if removal.reason == LEAK:
                leaks[removal.other.partition("/")[0]] += 1
            if len(examples[removal.reason]) < EXAMPLES:
                examples[removal.reason].append(asdict(removal))
        writer.finish()
    return {
        "removed": dict(sorted(removed.items())),
        "leaks": dict(sorted(leaks.items())),
        "examples": [example for several in examples.values() for example in several],
        FILES: cleaning.files(writer.path),
    }


def _leaks_of(cleaning: Cleaning, part: Part) -> Iterator[Removal]:
    """Leaks of a shard by place, in whichever of its renderings they were found: first its own."""
    others = [number for number in part.alike if number != part.number]
    files = [load_removals(cleaning.path("leaks", number)) for number in (part.number, *others)]
    prefix, numbers = read_names(cleaning.path("ids", part.number))
    before = -1
    for leak in merge(*files, key=lambda found: found.place):
        if leak.place != before:
            yield replace(leak, document=f"{prefix}:{numbers[leak.place]}") if others else leak
        before = leak.place


@dataclass(frozen=True)
class _Duplicates:
    """Documents of a shard that are left out, by place.

    Args:
        pairs: each with the one that is kept; PAIR [n].
        exact: whether it is exactly like another, which may itself be left out; bool [n].
    """

    pairs: np.ndarray
    exact: np.ndarray


def _found(cleaning: Cleaning, number: int) -> _Duplicates:
    """The duplicates of a shard; of a cluster the first document stands for all of it."""
    same = cleaning.config.deduplicate
    files = [cleaning.path("exact", partition) for partition in range(cleaning.partitions)]
    exact, near = pairs_of(files, number), pairs_of([cleaning.path("near")] if same and same.near else [], number)
    places = np.union1d(exact["place"], near["place"])
    found = _Duplicates(np.empty(len(places), PAIR), np.zeros(len(places), bool))
    for pairs in (exact, near):
        found.pairs[np.searchsorted(places, pairs["place"])] = pairs
    found.exact[np.searchsorted(places, exact["place"])] = True
    return found


def _duplicates_of(cleaning: Cleaning, part: Part) -> Iterator[Removal]:
    """Duplicates of a shard by place, less what gives a question away; the first of each kind are shown at length."""
    found = _found(cleaning, part.alike[0])
    leaks = np.fromiter((leak.place for leak in _leaks_of(cleaning, part)), np.int64)
    stay = ~np.isin(found.pairs["place"], leaks)
    pairs, exact = found.pairs[stay], found.exact[stay]
    if not len(pairs):
        return
    prefixes, numbers = _kept_names(cleaning, pairs)
    row, told = 0, Counter()
    for place, document in enumerate(cleaning.read(part.shard)):
        if row < len(pairs) and pairs["place"][row] == place:
            reason = EXACT if exact[row] else NEAR
            other = f"{prefixes[int(pairs['kept_shard'][row])]}:{numbers[row]}"
            excerpt = excerpt_of(document.text, SHOWN if told[reason] < EXAMPLES else BRIEF)
            yield Removal(place, reason, document.id, other, excerpt)
            told[reason] += 1
            row += 1


def _kept_names(cleaning: Cleaning, pairs: np.ndarray) -> tuple[dict[int, str], np.ndarray]:
    """What the ids in each shard share, and the line or row of each document that is kept; uint64 [n]."""
    prefixes, numbers = {}, np.empty(len(pairs), "<u8")
    order = np.argsort(pairs["kept_shard"], kind="stable")
    shards, first = np.unique(pairs["kept_shard"][order], return_index=True)
    for shard, rows in zip(shards.tolist(), np.split(order, first[1:]), strict=True):
        prefixes[shard], lines = read_names(cleaning.path("ids", shard))
        numbers[rows] = lines[pairs["kept_place"][rows]]
    return prefixes, numbers
