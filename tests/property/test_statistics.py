"""The statistics of good steps: exact through JSON, sound for any size of values, poisoned by nothing."""

from __future__ import annotations

import json
import math
import statistics

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_octo.train.statistics import EARLIEST, remember, spike_bound

VALUES = st.floats(min_value=1e-6, max_value=1e6)
ANY = st.floats(min_value=0, max_value=1e300)


@given(st.lists(ANY, max_size=40), st.integers(8, 16), st.integers(0, 40))
def test_going_through_json_at_any_moment_changes_nothing(values, window, moment):
    straight, resumed = [], []
    for place, value in enumerate(values):
        remember(straight, value, window)
        remember(resumed, value, window)
        if place == moment:
            resumed = json.loads(json.dumps(resumed))
        assert spike_bound(resumed, 6.0) == spike_bound(straight, 6.0)
    assert resumed == straight == values[-window:]


@given(st.lists(VALUES, max_size=20), st.sampled_from([math.nan, math.inf, -math.inf]))
def test_what_is_not_finite_never_enters(values, bad):
    before = list(values)
    with pytest.raises(ValueError, match="must not enter"):
        remember(values, bad, 8)
    assert values == before


@given(st.lists(VALUES, max_size=EARLIEST - 1))
def test_few_values_call_nothing_a_spike(values):
    assert spike_bound(values, 6.0) == math.inf


@given(st.lists(VALUES, min_size=EARLIEST, max_size=64), st.floats(1, 8))
def test_the_bound_is_at_least_sigma_deviations_above_the_mean(values, sigma):
    mean, spread = statistics.fmean(values), statistics.stdev(values)
    assert spike_bound(values, sigma) >= (mean + sigma * spread) * (1 - 1e-12)


@given(ANY, st.integers(EARLIEST, 64))
def test_a_level_that_never_moved_is_no_spike_of_itself(level, count):
    assert spike_bound([level] * count, 6.0) >= level * (1 - 1e-12)
    assert spike_bound([level] * count, 6.0) <= level * 1.03 + 1e-300


@given(st.lists(VALUES, min_size=EARLIEST, max_size=32), st.sampled_from([2.0**-300, 2.0**300, 2.0**900]))
def test_size_does_not_matter(values, scale):
    bound = spike_bound(values, 6.0)
    assert spike_bound([value * scale for value in values], 6.0) == pytest.approx(bound * scale, rel=1e-9)


def above(quantile: float, freedom: int) -> float:
    """Probability of more under Student's distribution, by integration over the angle whose tangent it is."""
    start, parts = math.atan(quantile / math.sqrt(freedom)), 20000

    def area(low: float) -> float:
        width = (math.pi / 2 - low) / parts
        return math.fsum(math.cos(low + (place + 0.5) * width) ** (freedom - 1) for place in range(parts)) * width

    return area(start) / area(-math.pi / 2)


@pytest.mark.parametrize("known", [8, 16, 32, 128])
def test_few_values_widen_the_bound_as_students_distribution_does(known):
    values = [2.0 + math.sin(place) for place in range(known)]
    spread = statistics.stdev(values) * math.sqrt(1 + 1 / known)
    quantile = (spike_bound(values, 3.0) - statistics.fmean(values)) / spread
    assert above(quantile, known - 1) == pytest.approx(0.5 * math.erfc(3.0 / math.sqrt(2)), rel=0.2)


def test_a_tenfold_value_is_a_spike_and_a_usual_one_is_not():
    values = [2.0 + 0.1 * math.sin(place) for place in range(32)]
    assert 20.0 > spike_bound(values, 6.0) > 2.2
