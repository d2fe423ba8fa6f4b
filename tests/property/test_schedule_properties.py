"""The learning rate as a function: bounds, monotone decay, warm-up, and continuity at a fork."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_octo.config.schedule import ScheduleConfig
from megatron_octo.errors import ConfigError
from megatron_octo.schedule.fork import seam_rate
from megatron_octo.schedule.learning_rate import learning_rate

positions = st.integers(min_value=0, max_value=10**13)
rates = st.floats(min_value=1e-7, max_value=1.0)


@st.composite
def schedules(draw, kinds=("constant", "cosine", "linear"), warm=True):
    tokens = draw(st.integers(min_value=2, max_value=10**12))
    return ScheduleConfig(
        kind=draw(st.sampled_from(kinds)),
        learning_rate=draw(rates),
        final_ratio=draw(st.floats(min_value=0, max_value=1)),
        warmup=draw(st.integers(min_value=0, max_value=tokens - 1)) if warm else 0,
        tokens=tokens,
    )


@given(schedules(), positions)
def test_the_rate_stays_between_zero_and_the_peak(schedule, position):
    assert 0 <= learning_rate(schedule, position) <= schedule.learning_rate


@given(schedules(), positions, positions)
def test_the_rate_rises_in_the_warmup_and_falls_after_it(schedule, one, other):
    early, late = sorted((one, other))
    before, after = learning_rate(schedule, early), learning_rate(schedule, late)
    if late <= schedule.warmup:
        assert before <= after
    elif early >= schedule.warmup:
        assert before >= after


@given(schedules())
def test_the_borders_are_exact(schedule):
    last = schedule.learning_rate * (1.0 if schedule.kind == "constant" else schedule.final_ratio)
    assert learning_rate(schedule, schedule.warmup) == schedule.learning_rate
    assert learning_rate(schedule, schedule.tokens) == last
    assert learning_rate(schedule, 10 * schedule.tokens) == last
    if schedule.warmup:
        assert learning_rate(schedule, 0) == 0


@given(schedules(), positions)
def test_there_is_no_jump(schedule, position):
    """Within one token the rate moves by at most the steepest slope: pi/2 x peak over the shortest stretch."""
    stretches = [schedule.tokens - schedule.warmup, *([schedule.warmup] if schedule.warmup else [])]
    step = abs(learning_rate(schedule, position + 1) - learning_rate(schedule, position))
    assert step <= schedule.learning_rate * (math.pi / 2 / min(stretches) + 1e-12)


@given(schedules(), schedules(warm=False), positions)
def test_a_branch_that_states_its_parents_rate_is_continuous(parent, branch, position):
    before = learning_rate(parent, position)
    if before < 1e-12:
        return
    branch = branch.model_copy(update={"learning_rate": before})
    assert seam_rate(branch, parent, position, "branch", "parent") == before == learning_rate(branch, 0)


@given(schedules(kinds=("constant",), warm=False), st.floats(min_value=1e-8, max_value=10), st.sampled_from([-1, 1]))
def test_a_branch_that_jumps_is_refused(parent, amount, sign):
    rate = parent.learning_rate * (1 + sign * min(amount, 0.9))
    branch = parent.model_copy(update={"learning_rate": rate})
    with pytest.raises(ConfigError) as refused:
        seam_rate(branch, parent, 0, "long", "stable")
    assert "'long'" in str(refused.value)
    assert f"{rate:.10g}" in str(refused.value)
    assert f"{parent.learning_rate:.10g}" in str(refused.value)
