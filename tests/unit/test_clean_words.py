"""Words: what is spelled differently and is the same, and what is not."""

from __future__ import annotations

import numpy as np
import pytest

from megatron_octo.data.clean import words
from megatron_octo.data.clean.words import ngrams, plain, words_of


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (r"$\frac{1}{2}$ of $x$", r"\(\dfrac12\) of \( x \)"),
        (r"\frac{x}{2}", r"\frac{x}2"),
        ("\u00bd cup, 2\u00bd cups", "1/2 cup, 2 1/2 cups"),
        (r"\left(a, b\right)", "(a,b)"),
        (r"10^2 and x^2", "10\u00b2 and x\u00b2"),
        (r"$10{,}000$ and 10,\!000", "10000 and 10,000"),
        (r"1\,000\,000", "1,000,000"),
        (r"\text{if } x \le \sqrt{5}", "if x \u2264 \u221a5"),
        (r"\pi r^2, \alpha", "\u03c0 r\u00b2, \u03b1"),
        ("Janet\u2019s ducks", "**Janet's** DUCKS!"),
        ("multi-\n  plication of well-known", "multiplication of well-\n> known"),
        ("# it is multi-\n# plication", "it is multiplication"),
        ("> a quoted\n> line", "a quoted line"),
        ("one<br/>two &amp; three", "one two & three"),
        ("Natalia&nbsp;sold&#160;48&NBSP;clips", "Natalia sold 48 NBSP clips"),
        ("Ida&rsquo;s x&le;y, 3&times;4, 2&frac12;, &Delta;t", "Ida's x\u2264y, 3\u00d74, 2\u00bd, \u0394t"),
        ("a &lt; b", "a < b"),
        (r"\begin{align*} a &= b \\ c \end{align*}", "a = b, c"),
        ("\ufeffsoft\u00adhyphen", "softhyphen"),
        ("caf\u00e9 \uff21\uff22", "cafe\u0301 AB"),
    ],
)  # fmt: skip
def test_spellings_agree(one: str, other: str) -> None:
    assert words_of(one).hashes.tolist() == words_of(other).hashes.tolist(), (plain(one), plain(other))


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("3 apples", "4 apples"), ("10 2", "102"), ("x 2", "2 x"), ("sin x", "cos x"), ("1 000", "1,000"),
        ("the cat", "thecat"), (r"\alpha", r"\beta"),
    ],
)  # fmt: skip
def test_other_things_differ(one: str, other: str) -> None:
    assert words_of(one).hashes.tolist() != words_of(other).hashes.tolist()


def test_long_texts_are_hashed_in_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    text = " ".join(f"word{number} {'x' * (number % 90)}" for number in range(300))
    whole = words_of(text).hashes
    words._powers.cache_clear()
    monkeypatch.setattr(words, "_CHUNK", 64)
    assert words_of(text).hashes.tolist() == whole.tolist()
    words._powers.cache_clear()


def test_ngrams() -> None:
    hashes = words_of("a b c a b c a").hashes
    grams = ngrams(hashes, 3)
    for n in range(1, 8):
        runs = {tuple(hashes[place : place + n].tolist()) for place in range(8 - n)}
        assert len(ngrams(hashes, n)) == 8 - n and len(set(ngrams(hashes, n).tolist())) == len(runs)
    assert len(grams) == 5 and len(np.unique(grams)) == 3 and grams[0] == grams[3]
    assert not len(ngrams(hashes, 8)) and ngrams(hashes[:1], 1)[0] != hashes[0]
