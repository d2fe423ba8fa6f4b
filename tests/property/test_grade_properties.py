"""The grader on arbitrary text: always a verdict, never an exception, no symbols needed."""

from __future__ import annotations

from fractions import Fraction

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from megatron_octo.evaluate import symbolic
from megatron_octo.evaluate.extract import canonical, last_boxed
from megatron_octo.evaluate.grade import VERDICTS, Verdict, grade
from megatron_octo.evaluate.numeric import read_number

PIECES = ["\\boxed{", "}", "{", "\\frac", "\\text{", "1", "23", ",", ".", "/", "-", "%", "(", "]", "[", ")", " ", "\\",
          "^", "=", "\\cup", "\\circ", "x", "cm", "\u2212", "\u00bd", "\ud800", "\x00", "\\left", "e"]  # fmt: skip
tex = st.lists(st.sampled_from(PIECES), max_size=40).map("".join)
anything = st.one_of(st.text(max_size=200), tex)


class _NoPool:
    """Stands for the children, so that the property runs in this process alone."""

    def equal(self, gold: str, answer: str) -> bool:
        gold.encode("utf-8", "surrogatepass")
        return False


@pytest.fixture(autouse=True, scope="module")
def no_pool():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(symbolic.shared, "get", _NoPool)
        yield


@settings(max_examples=400, deadline=None)
@given(anything, anything, st.booleans(), st.booleans())
def test_always_a_verdict(nothing_swallowed: None, response: str, gold: str, stopped: bool, require: bool) -> None:
    verdict = grade(response, gold, stopped=stopped, require_stop=require)
    assert isinstance(verdict, Verdict) and verdict.verdict in VERDICTS
    assert verdict.correct == (verdict.verdict == "correct") and verdict.reward in (0.0, 1.0)
    if require and not stopped:
        assert not verdict.correct


@pytest.fixture(scope="module")
def nothing_swallowed():
    """A swallowed exception is a bug too: the grader's last resort must not be needed."""
    with pytest.MonkeyPatch.context() as patch:

        def fail(*args: object) -> None:
            pytest.fail("the grader swallowed an exception")

        patch.setattr("megatron_octo.evaluate.grade._log.exception", fail)
        yield


@settings(max_examples=200, deadline=None)
@given(anything)
@example("\\ ")
def test_a_boxed_answer_answers_itself(answer: str) -> None:
    boxed = "\\boxed{" + answer + "}"
    found = last_boxed(boxed)
    if found and found == answer.strip():
        assert grade(boxed, answer, stopped=True).correct


@settings(max_examples=200, deadline=None)
@given(anything)
def test_canonical_spelling_is_a_fixed_point_for_numbers(answer: str) -> None:
    once = canonical(answer)
    if read_number(once) is not None:
        assert read_number(canonical(once)) == read_number(once)


@settings(max_examples=200, deadline=None)
@given(st.integers(-(10**9), 10**9), st.integers(1, 10**4), st.integers(-(10**9), 10**9))
def test_numbers_are_compared_exactly(upper: int, lower: int, other: int) -> None:
    fraction = rf"\frac{{{upper}}}{{{lower}}}"
    assert grade(rf"\boxed{{{fraction}}}", f"{upper}/{lower}", stopped=True).correct
    assert grade(rf"\boxed{{{upper:,}}}", str(upper), stopped=True).correct
    same = Fraction(upper, lower) == other
    assert grade(rf"\boxed{{{fraction}}}", str(other), stopped=True).correct == same
