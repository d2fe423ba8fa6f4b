"""The rule that says when FP8 is too far from BF16."""

from __future__ import annotations

import json
import math
import statistics

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_octo.config.precision import SentinelConfig
from megatron_octo.train.envelope import LOSS, choose, excess, judge, layer_name, limits, relative

CONFIG = SentinelConfig(warmup=4, patience=3, loss_tolerance=0.01, grad_tolerance=0.2, sigma=3)
small = st.floats(0, 0.009)


def comparison(loss: float, layer: float) -> dict[str, float]:
    return {LOSS: loss, layer_name(0): layer}


@given(st.lists(st.tuples(small, small), min_size=4, max_size=4), st.tuples(small, small))
def test_the_envelope_is_mean_and_spread_of_the_first_comparisons_only(first, later):
    memory: dict = {}
    for pair in first:
        judge(memory, CONFIG, comparison(*pair))
    kept = json.dumps(memory)
    for index, name in enumerate((LOSS, layer_name(0))):
        values = [pair[index] for pair in first]
        assert memory["mean"][name] == pytest.approx(statistics.fmean(values), abs=1e-12)
        assert memory["square"][name] == pytest.approx(statistics.variance(values) * 3, abs=1e-12)
    judge(memory, CONFIG, comparison(*later))
    assert {**memory, "strikes": 0} == json.loads(kept)


@given(st.lists(st.tuples(small, small), max_size=8), st.lists(st.tuples(small, small), max_size=8))
def test_a_restart_between_comparisons_changes_nothing(before, after):
    straight: dict = {}
    halted: dict = {}
    for pair in before:
        assert judge(straight, CONFIG, comparison(*pair)) == judge(halted, CONFIG, comparison(*pair))
    halted = json.loads(json.dumps(halted))
    for pair in after:
        assert judge(straight, CONFIG, comparison(*pair)) == judge(halted, CONFIG, comparison(*pair))


@given(st.lists(st.tuples(small, small), max_size=8))
def test_limits_lie_between_a_tenth_of_the_tolerance_and_the_tolerance(pairs):
    memory: dict = {}
    for pair in pairs:
        judge(memory, CONFIG, comparison(*pair))
    found = limits(memory, CONFIG, [LOSS, layer_name(0)])
    assert 0.001 <= found[LOSS] <= 0.01
    assert 0.02 <= found[layer_name(0)] <= 0.2


def test_beyond_the_tolerance_is_a_strike_even_in_the_warmup_and_never_enters_the_envelope():
    memory: dict = {}
    verdict = judge(memory, CONFIG, comparison(0.02, 0.0))
    assert (verdict.strikes, verdict.worst, verdict.due) == (1, LOSS, False)
    assert verdict.excess == pytest.approx(2.0)
    assert memory.get("count", 0) == 0


def test_inside_the_tolerance_but_far_from_the_envelope_is_a_strike_after_the_warmup():
    memory: dict = {}
    for _ in range(4):
        judge(memory, CONFIG, comparison(0.0001, 0.001))
    assert judge(memory, CONFIG, comparison(0.0001, 0.1)).worst == layer_name(0)
    assert memory["strikes"] == 1
    # A wide envelope allows what a narrow one does not.
    wide: dict = {}
    for value in (0.0, 0.05, 0.1, 0.15):
        judge(wide, CONFIG, comparison(0.0001, value))
    assert judge(wide, CONFIG, comparison(0.0001, 0.1)).strikes == 0


def test_only_strikes_in_a_row_are_due():
    memory: dict = {}
    bad, good = comparison(0.02, 0.0), comparison(0.0, 0.0)
    assert [judge(memory, CONFIG, pair).due for pair in (bad, bad, good, bad, bad, bad)] == [False] * 5 + [True]


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_what_is_no_number_is_infinitely_far(value):
    differences = relative({LOSS: value, layer_name(0): 1.0}, {LOSS: 1.0, layer_name(0): 1.0})
    assert differences == {LOSS: math.inf, layer_name(0): 0.0}
    assert judge({}, CONFIG, differences).excess == math.inf


def test_relative_differences():
    assert relative({LOSS: 1.1, "layer 3": 0.0}, {LOSS: 1.0, "layer 3": 0.0}) == {
        LOSS: pytest.approx(0.1),
        "layer 3": 0.0,
    }
    assert relative({LOSS: 1.0}, {LOSS: 0.0})[LOSS] == math.inf
    assert excess({LOSS: 0.02, "layer 3": 0.1}, {LOSS: 0.01, "layer 3": 0.2}) == (2.0, LOSS)


@given(st.floats(1, 1e6), st.dictionaries(st.integers(0, 9), st.floats(0, 1e6), max_size=10))
def test_the_layer_blamed_explains_it_and_no_other_does_better(before, after):
    layer = choose(before, after)
    if layer is None:
        assert all(value >= before or (value > 1 and value > before / 2) for value in after.values())
    else:
        assert after[layer] == min(after.values()) < before
        assert after[layer] <= 1 or after[layer] <= before / 2


def test_two_layers_that_are_each_half_of_it_are_moved_one_after_the_other():
    assert choose(8.0, {0: 8.0, 1: 4.0, 2: 4.5}) == 1
    assert choose(8.0, {0: 8.0, 1: 7.9}) is None
    assert choose(math.inf, {0: math.inf, 1: 3.0}) == 1
