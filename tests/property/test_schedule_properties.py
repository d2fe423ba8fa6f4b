"""The learning rate as a function: bounds, monotone decay, warm-up, and continuity at a fork."""

from __future__ import annotations

import math

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from megatron_octo.config.schedule import ScheduleConfig
from megatron_octo.errors import ConfigError
from megatron_octo.schedule import change
from megatron_octo.schedule.change import rewritten_past
from megatron_octo.schedule.fork import seam_rate
from megatron_octo.schedule.learning_rate import learning_rate

positions = st.integers(min_value=0, max_value=10**13)
rates = st.floats(min_value=1e-7, max_value=1.0)


KINDS = ("constant", "wsd", "cosine", "linear", "1-sqrt")
SHAPES = ("cosine", "linear", "1-sqrt")


@st.composite
def schedules(draw, kinds=KINDS, warm=True, most=10**12):
    tokens = draw(st.integers(min_value=2, max_value=most))
    kind = draw(st.sampled_from(kinds))
    warmup = draw(st.integers(min_value=0, max_value=tokens - 1)) if warm else 0
    decay = draw(st.integers(min_value=1, max_value=tokens - warmup)) if kind == "wsd" else None
    return ScheduleConfig(
        kind=kind,
        learning_rate=draw(rates),
        final_ratio=draw(st.floats(min_value=0, max_value=1)),
        warmup=warmup,
        decay=decay,
        shape=draw(st.sampled_from([None, *SHAPES])) if decay else None,
        tokens=tokens,
    )


def shape_of(schedule):
    """Start and shape of the decay, worked out anew."""
    if schedule.kind == "wsd":
        return schedule.tokens - schedule.decay, schedule.shape or "1-sqrt"
    return schedule.warmup, schedule.kind


@given(schedules(), positions)
def test_the_rate_stays_between_zero_and_the_peak(schedule, position):
    assert 0 <= learning_rate(schedule, position) <= schedule.learning_rate
    if position >= schedule.warmup and schedule.kind != "constant":
        assert learning_rate(schedule, position) >= schedule.learning_rate * schedule.final_ratio


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
    start, _ = shape_of(schedule)
    last = schedule.learning_rate * (1.0 if schedule.kind == "constant" else schedule.final_ratio)
    assert learning_rate(schedule, schedule.warmup) == learning_rate(schedule, start) == schedule.learning_rate
    assert learning_rate(schedule, schedule.tokens) == last
    assert learning_rate(schedule, 10 * schedule.tokens) == last
    if schedule.warmup:
        assert learning_rate(schedule, 0) == 0


@given(schedules(kinds=("constant", "wsd")), st.floats(min_value=0, max_value=1))
def test_a_stable_stretch_is_flat(schedule, share):
    end = schedule.tokens if schedule.kind == "constant" else schedule.tokens - schedule.decay
    position = schedule.warmup + int(share * (end - schedule.warmup))
    assert learning_rate(schedule, position) == schedule.learning_rate


@given(schedules(), positions)
def test_there_is_no_jump(schedule, position):
    """Within one token the rate moves by no more than its shape can: 1 - sqrt is steepest where it begins."""
    start, shape = shape_of(schedule)
    steepest = {"cosine": math.pi / 2, "linear": 1.0, "1-sqrt": math.sqrt(schedule.tokens - start)}
    in_decay = 0.0 if shape == "constant" else steepest[shape] / (schedule.tokens - start)
    in_warmup = 1 / schedule.warmup if schedule.warmup else 0.0
    step = abs(learning_rate(schedule, position + 1) - learning_rate(schedule, position))
    assert step <= schedule.learning_rate * (max(in_decay, in_warmup) + 1e-12)


@given(schedules(kinds=("wsd",)), positions)
def test_a_wsd_run_is_a_constant_run_and_its_decay(schedule, position):
    """The decay at the end is the branch that leaves a constant run where it starts."""
    plain = {"kind": "constant", "decay": None, "shape": None}
    stable = schedule.model_copy(update=plain)
    start, shape = shape_of(schedule)
    branch = stable.model_copy(update={"kind": shape, "warmup": 0, "tokens": schedule.decay})
    expected = learning_rate(stable, position) if position < start else learning_rate(branch, position - start)
    assert learning_rate(schedule, position) == expected


small = schedules(most=400)


@given(small, small, st.integers(0, 60), st.integers(1, 40))
def test_a_change_is_accepted_exactly_where_it_lies_in_the_future(before, now, steps, step_tokens):
    """Against the definition: the same rate for every step taken, no jump at the position, an end not yet passed."""
    position = steps * step_tokens
    starts = [step * step_tokens for step in range(steps + 1)]
    taken = all(learning_rate(before, start) == learning_rate(now, start) for start in starts)
    ended = -(-now.tokens // step_tokens) < steps
    assert (rewritten_past(before, now, position, step_tokens) is None) == (taken and not ended)


def test_a_stable_stretch_of_millions_of_steps_is_not_walked_step_by_step(monkeypatch):
    asked = []
    monkeypatch.setattr(change, "learning_rate", lambda *given: (asked.append(given), learning_rate(*given))[1])
    before = ScheduleConfig(kind="constant", learning_rate=1e-3, warmup=2000, tokens=6 * 10**6)
    now = before.model_copy(update={"tokens": 9 * 10**6, "kind": "wsd", "decay": 3 * 10**6})
    assert rewritten_past(before, now, 6 * 10**6, 1) is None
    assert len(asked) < 5000


@given(schedules(kinds=("constant", "wsd"), most=5000), st.floats(0, 1), st.integers(1, 5000), st.sampled_from(SHAPES))
def test_a_stable_stretch_may_grow_and_its_decay_may_move(schedule, share, more, shape):
    start = schedule.tokens if schedule.kind == "constant" else schedule.tokens - schedule.decay
    step = max(1, start // 50)
    position = int(share * start) // step * step
    longer = schedule.model_copy(update={"tokens": schedule.tokens + more})
    assert rewritten_past(schedule, longer, position, step) is None
    decay = longer.tokens - max(position, schedule.warmup)
    decaying = longer.model_copy(update={"kind": "wsd", "decay": decay, "shape": shape})
    assert rewritten_past(schedule, decaying, position, step) is None


@given(schedules(kinds=KINDS[1:], most=1000), st.floats(0.01, 1), st.integers(1, 1000))
def test_a_decay_that_runs_can_neither_be_stretched_nor_left(schedule, share, more):
    start, _ = shape_of(schedule)
    position = start + math.ceil(share * (schedule.tokens - start))
    longer = schedule.model_copy(update={"tokens": schedule.tokens + more})
    stretched = longer.model_copy(update={"decay": schedule.decay + more}) if schedule.kind == "wsd" else longer
    constant = longer.model_copy(update={"kind": "constant", "decay": None, "shape": None})
    for other in (stretched, constant):
        assume(learning_rate(other, position) != learning_rate(schedule, position))
        assert rewritten_past(schedule, other, position, 1) is not None


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
