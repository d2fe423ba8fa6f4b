"""Orders over random mixtures: Megatron's blend, no window twice whatever changes, and who reads a document."""

from __future__ import annotations

import random
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_octo.config.blends import Blend, blends_of, place_of, read_so_far, shared_out
from megatron_octo.config.mixture import DataConfig, Source
from megatron_octo.data.index.pairs import read_index
from megatron_octo.data.index.writer import write_indexed
from megatron_octo.data.mix.epochs import shuffled
from megatron_octo.data.mix.ledger import places_of_document, windows_of_document
from megatron_octo.data.mix.order import order
from megatron_octo.data.mix.reader import build_train_dataset

LENGTH, NAMES = 8, ("a", "b", "c", "d")
WEIGHTS = st.dictionaries(st.sampled_from(NAMES), st.integers(1, 50), min_size=1)


def scaled(weights: dict[str, int]) -> dict[str, float]:
    return {name: weights[name] / sum(weights.values()) for name in sorted(weights)}


PHASES = st.lists(st.tuples(st.integers(1, 120), WEIGHTS), min_size=1, max_size=4)


def blends_from(phases: list[tuple[int, dict[str, int]]]) -> tuple[list[Blend], int]:
    """Blends of these lengths, one after the other, and the windows of all."""
    first, found = 0, []
    for windows, weights in phases:
        found.append(Blend(first, scaled(weights)))
        first += windows
    return found, first


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("sources")
    for name in NAMES:
        chance = random.Random(name)
        documents = [[chance.randrange(1, 500) for _ in range(chance.choice((0, 1, 3, 8, 30)))] for _ in range(40)]
        write_indexed(path / name, [[1, 2, 3], *documents], 500)
    return path


def data_of(folder: Path, weights: dict[str, int], **more) -> DataConfig:
    mixture = {name: Source(path=folder / name, weight=share) for name, share in scaled(weights).items()}
    return DataConfig(tokenizer=folder, mixture=mixture, sequence_length=LENGTH, seed=3, **more)


@settings(max_examples=25, deadline=None)
@given(weights=WEIGHTS, windows=st.integers(1, 150))
def test_megatrons_blended_dataset_reads_the_same(folder: Path, weights: dict[str, int], windows: int) -> None:
    from megatron.core.datasets.blended_dataset import BlendedDataset

    ours = build_train_dataset(data_of(folder, weights), windows, folder / "cache")
    theirs = BlendedDataset(list(ours.sources.values()), list(map(float, scaled(weights).values())), windows, _Config())
    assert len(theirs) == len(ours)
    for place in range(windows):
        mine, other = ours[place], theirs[place]
        assert mine["dataset_id"] == other["dataset_id"] and mine["tokens"].equal(other["tokens"])


class _Config:
    defer_npy_index_mmap, fast_cache_load, path_to_cache = False, False, None
    mid_level_dataset_surplus = 0.005


@settings(max_examples=100, deadline=None)
@given(phases=PHASES, cut=st.integers(0, 400), other=WEIGHTS)
def test_whatever_changes_no_window_is_lost_or_read_twice(phases, cut, other) -> None:
    blends, windows = blends_from(phases)
    dealt = order(blends, windows)
    for number in range(len(dealt.names)):
        mine = dealt.number[dealt.source == number]
        assert mine.tolist() == list(range(len(mine)))
    short = order(blends, min(cut, windows))
    assert np.array_equal(short.source, dealt.source[:cut]) and np.array_equal(short.number, dealt.number[:cut])
    before = read_so_far(blends, cut)
    changed = order([*before, Blend(max(cut, 1 if before else 0), scaled(other))] if before else blends, windows + 50)
    kept = min(cut, windows)
    at = [[changed.names[s] for s in changed.source[:kept]], [dealt.names[s] for s in dealt.source[:kept]]]
    assert at[0] == at[1] and np.array_equal(changed.number[:kept], dealt.number[:kept])


@settings(max_examples=60, deadline=None)
@given(phases=PHASES, cut=st.integers(1, 400))
def test_a_branch_that_keeps_its_parents_mixture_keeps_its_order(phases, cut) -> None:
    """Blends as the lineage records them, through JSON, and then as the branch's own file states its mixture."""
    blends, windows = blends_from(phases)
    cut = min(cut, windows)
    history = [blend._asdict() for blend in read_so_far(blends, cut)]
    mixture = {name: Source(path=Path(name), weight=share) for name, share in history[-1]["weights"].items()}
    data = DataConfig(tokenizer=Path("t"), mixture=mixture, sequence_length=LENGTH)
    branch = blends_of(data, cut, history)
    parent = read_so_far(blends, cut)
    assert len(branch) == len(parent)
    assert np.array_equal(order(branch, windows).number, order(parent, windows).number)


@settings(max_examples=100, deadline=None)
@given(phases=PHASES, first=st.integers(0, 300), count=st.integers(0, 300))
def test_shares_tell_what_is_dealt_within_a_few_windows(phases, first, count) -> None:
    blends, windows = blends_from(phases)
    first, last = min(first, windows), min(first + count, windows)
    dealt = order(blends, windows)
    near = len(dealt.names) * len(blends) + 1
    for name, expected in shared_out(blends, first, last).items():
        mine = dealt.windows_of(name)
        assert abs(expected - np.count_nonzero((mine >= first) & (mine < last))) <= 2 * near
    for name in dealt.names:
        for had in (1, 7):
            place = place_of(blends, name, had)
            if place is not None and place < windows:
                assert abs(shared_out(blends, 0, round(place))[name] - had) <= 1


@settings(max_examples=40, deadline=None)
@given(document=st.integers(0, 40), epochs=st.integers(1, 4), seed=st.integers(0, 5), name=st.sampled_from(NAMES))
def test_the_windows_of_a_document_are_those_that_name_it(folder, document, epochs, seed, name) -> None:
    """What `who` finds by arithmetic is what every window says of itself when it is read."""
    data = data_of(folder, {name: 1}, **{}).model_copy(update={"seed": seed})
    index = read_index(folder / name)
    windows = epochs * ((index.tokens - 1) // LENGTH)
    dataset = build_train_dataset(data, windows, folder / "cache")
    told = [n for n in range(windows) if document in dataset.window(n).documents] if index.lengths[document] else []
    passes = shuffled(index, LENGTH, epochs, seed)
    assert windows_of_document(passes, index, document).tolist() == told
    places, epoch = places_of_document(passes, index, document, blends_of(data), name, windows)
    assert places.tolist() == told and epoch.tolist() == [dataset.window(n).epoch for n in told]
