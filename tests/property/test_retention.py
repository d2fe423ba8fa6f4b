"""Which checkpoints stay, whatever the history of saves."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_octo.checkpoint.retain import Policy, Saved, removable

policies = st.builds(Policy, st.integers(1, 5), st.none() | st.integers(1, 60))
histories = st.lists(st.integers(1, 400), min_size=1, max_size=30, unique=True).map(sorted)


def saved(tokens: int) -> Saved:
    return Saved(f"step_{tokens:08d}", tokens)


@given(histories, policies, st.data())
def test_the_newest_few_and_the_needed_stay(history, policy, data):
    there = [saved(tokens) for tokens in history]
    needed = data.draw(st.sets(st.sampled_from([item.name for item in there])))
    gone = set(removable(there, policy, needed))
    assert not gone & needed
    assert not gone & {item.name for item in there[-policy.keep :]}
    assert there[-1].name not in gone
    assert gone <= {item.name for item in there}
    if policy.keep_every is None:
        assert gone == {item.name for item in there[: -policy.keep]} - needed


@settings(max_examples=300)
@given(histories, policies)
def test_the_first_at_or_after_each_multiple_stays_through_all_prunings(history, policy):
    """A save and a pruning after the other, as a run does it: what is there at the end follows from the history."""
    there: list[Saved] = []
    for tokens in history:
        there.append(saved(tokens))
        gone = set(removable(there, policy, {there[-1].name}))
        there = [item for item in there if item.name not in gone]
    expected = {saved(tokens).name for tokens in history[-policy.keep :]}
    if policy.keep_every is not None:
        multiples = range(policy.keep_every, history[-1] + 1, policy.keep_every)
        expected |= {saved(min(t for t in history if t >= multiple)).name for multiple in multiples}
    assert {item.name for item in there} == expected


@given(histories, policies)
def test_pruning_twice_removes_nothing_more(history, policy):
    there = [saved(tokens) for tokens in history]
    gone = set(removable(there, policy, ()))
    left = [item for item in there if item.name not in gone]
    assert removable(left, policy, ()) == []


@given(histories, st.integers(1, 3), st.integers(1, 60), st.data())
def test_a_checkpoint_of_unknown_position_stays_where_positions_decide(history, keep, every, data):
    there = [saved(tokens) for tokens in history]
    blind = data.draw(st.sets(st.sampled_from(range(len(there)))))
    there = [item._replace(run_tokens=None) if place in blind else item for place, item in enumerate(there)]
    gone = removable(there, Policy(keep, every), ())
    assert not {there[place].name for place in blind} & set(gone)
