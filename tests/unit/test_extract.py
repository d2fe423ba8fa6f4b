"""The last box of a response, and canonical spelling."""

from __future__ import annotations

import time

import pytest

from megatron_octo.evaluate.extract import canonical, last_boxed, without_wrapping


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (r"so \boxed{42}.", "42"),
        (r"\boxed{\frac{1}{2}}", r"\frac{1}{2}"),
        (r"\boxed{1} then \boxed{2}", "2"),
        (r"\boxed{\{1,2\}}", r"\{1,2\}"),
        (r"\boxed{\left\{ x \right.}", r"\left\{ x \right."),
        (r"\boxed{x=\boxed{5}}", "5"),
        (r"\boxed {7}", "7"),
        (r"\boxed{}", ""),
        (r"\boxed{1} then \boxed{2", None),
        (r"\boxed{", None),
        (r"\boxed 5", None),
        ("the answer is 5", None),
        ("", None),
        ("\\boxed{a\nb}", "a\nb"),
    ],
)
def test_last_boxed(text: str, expected: str | None) -> None:
    assert last_boxed(text) == expected


@pytest.mark.parametrize("text", [r"\boxed{" * 100_000, r"\boxed{" + "{" * 1_000_000, "\\" * 1_000_000])
def test_hostile_text_is_read_in_linear_time(text: str) -> None:
    started = time.process_time()
    assert last_boxed(text) is None
    assert time.process_time() - started < 5


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (r"\dfrac14", r"\frac{1}{4}"),
        (r"\tfrac{1}{4}", r"\frac{1}{4}"),
        ("\u00bd", r"\frac{1}{2}"),
        ("\u22125", "-5"),
        ("\uff15", "5"),
        (r"\left( 1, 2 \right)", "( 1, 2 )"),
        (r"\leftarrow", r"\leftarrow"),
        (r"1\,000\ m", "1 000 m"),
        (r"\begin{pmatrix} 1 \\ 2 \end{pmatrix}", r"\begin{pmatrix} 1 \\ 2 \end{pmatrix}"),
        (r"$\$18.$", "18"),
        ("{{5}}", "5"),
        ("{1}{2}", "{1}{2}"),
        ("{ {5} }", "5"),
        ("{5}}", "{5}}"),
        ("{{5}", "{{5}"),
        (r"1{,}234", "1,234"),
        (r"90^\circ", r"90^{\circ}"),
    ],
)
def test_canonical(text: str, expected: str) -> None:
    assert canonical(text) == expected


@pytest.mark.parametrize(
    ("text", "expected"), [("((5))", "5"), ("( 5 )", "5"), ("(1,2)", "(1,2)"), ("(1)(2)", "(1)(2)")]
)
def test_round_brackets_around_all(text: str, expected: str) -> None:
    assert without_wrapping(text) == expected


def test_deep_brackets_are_removed_in_linear_time() -> None:
    started = time.process_time()
    assert canonical("{" * 200_000 + "5" + "}" * 200_000) == "5"
    assert without_wrapping("(" * 200_000 + "5" + ")" * 200_000) == "5"
    assert time.process_time() - started < 5
