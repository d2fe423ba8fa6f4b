r"""The words of a text, in a form in which spellings of the same thing agree, as numbers that compare fast.

White space, lines, case, punctuation, operators, Markdown and HTML do not count; neither does how LaTeX is spelled
(`\dfrac` or `\frac`, `\left(`, `$` or `\(`, `\text{}`, spacing), nor whether a symbol is LaTeX or Unicode (`\pi`, a
fraction, a superscript). A word is a run of letters or a run of digits, `1,000` is one number, and a word that was
hyphenated at the end of a line is one again. What does count: the words, the numbers, their order.
"""

from __future__ import annotations

import html
import re
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

_INVISIBLE = re.compile("[\u00ad\u200b-\u200d\u2060\ufeff]")
_RAISED = re.compile("[\u00b2\u00b3\u00b9\u2070-\u208e\u00bc-\u00be\u2150-\u215f]+")  # a digit of its own, not of 10
_SYMBOLS = {
    "\u2010": "-", "\u2212": "-", "\u2264": "<", "\u2265": ">", "\u221a": " sqrt ", "\u221e": " infty ",
    "\u2220": " angle ", "\u25b3": " triangle ", "\u2206": " delta ", "\u2211": " sum ", "\u220f": " prod ",
    "\u222b": " int ",
}  # fmt: skip
_SYMBOLS |= {chr(code): f" {unicodedata.name(chr(code)).split()[-1].lower()} " for code in range(0x3B1, 0x3CA)}
_SYMBOL = re.compile(f"[{''.join(_SYMBOLS)}]")
_NO_WORD = re.compile(r"[^\x00-\x7f\w]+")

_TAG = re.compile(r"</?(?:p|br|b|i|u|em|strong|sub|sup|span|div|li|ul|ol|tt|code|pre|h[1-6])\b[^<>\n]{0,200}>")
_ENTITY = re.compile(r"&(?:#\d{1,7}|#[xX][0-9a-fA-F]{1,6}|[a-zA-Z][a-zA-Z0-9]{1,31});")
_THOUSANDS = re.compile(r",(?<=\d,)(?=\d{3}(?!\d))")
_HYPHEN = re.compile(r"-(?<=[a-z]{2}-)(?:[ \t]*\n[\s>/#*%|]*)?(?=[a-z]{2})")
_QUOTED = re.compile(r"\n[ \t]*(?:>[ \t]?)+")

_LATEX_THOUSANDS = re.compile(r"(?<=\d)(?:\\[,!;:]|\{,\}|,){1,3}(?=\d{3}(?!\d))")
_FRACTION = re.compile(r"\\[dtc]?frac(?![a-z])\s*(\d?)")
_COMMAND = re.compile(r"\\(?:(?:begin|end)\s*\{[^{}\n]{0,40}\}|([a-z]+)|.|$)", re.DOTALL)
_GROUPING = (
    "left right middle big bigl bigr bigg biggl biggr displaystyle textstyle scriptstyle limits nolimits text textrm "
    "textbf textit textsf texttt textup textnormal emph underline mathrm mathbf mathit mathsf mathtt mathbb mathcal "
    "mathfrak mathscr boldsymbol bm mbox hbox fbox boxed operatorname overline overrightarrow vec hat widehat bar "
    "tilde widetilde dot ddot ensuremath rm bf it tt sf"
)
_SPACING = "quad qquad hspace vspace hfill hskip enspace thinspace newline linebreak noindent par item"
_OPERATORS = (  # punctuation, like their plain forms
    "times cdot div ast star pm mp ne neq equiv approx sim cong circ degree "
    "prime ldots dots cdots vdots ddots dotsc dotsb to rightarrow leftarrow longrightarrow implies iff colon mid vert "
    "lvert rvert lbrace rbrace langle rangle lfloor rfloor lceil rceil in notin subset subseteq cup cap setminus "
    "backslash perp parallel"
)
_SILENT = frozenset(f"{_GROUPING} {_SPACING} {_OPERATORS}".split())
_SIGNS = dict.fromkeys(("le", "leq", "leqslant", "lt"), "<") | dict.fromkeys(("ge", "geq", "geqslant", "gt"), ">")
_SPELLED = {"varepsilon": "epsilon", "varphi": "phi", "vartheta": "theta", "bigtriangleup": "triangle", **_SIGNS}

_MARK = "\x01"
_BETWEEN = f"\n{_MARK}\n"
_ROOT = 0x9E3779B97F4A7C15  # odd, so that it has an inverse modulo 2**64
_CHUNK = 1 << 18  # bytes hashed at a time
_DIGIT = 2
_KINDS = np.zeros(256, np.uint8)
_KINDS[ord("a") : ord("z") + 1] = 1
_KINDS[ord("0") : ord("9") + 1] = _DIGIT
_KINDS[128:] = 1


def plain(text: str) -> str:
    """A text in its plain spelling: what differs between two spellings of the same words becomes white space."""
    if "&" in text:  # first: most of what entities stand for is then told apart as what it is, `&nbsp;` as a blank
        text = _ENTITY.sub(lambda found: html.unescape(found[0]), text)
    if not text.isascii():
        text = _RAISED.sub(r" \g<0> ", _INVISIBLE.sub("", text))
        text = unicodedata.normalize("NFKC", text).lower()
        text = _NO_WORD.sub(" ", _SYMBOL.sub(lambda found: _SYMBOLS[found[0]], text))
    else:
        text = text.lower()
    if "<" in text:
        text = _TAG.sub(" ", text)
    if ">" in text:
        text = _QUOTED.sub("\n", text)
    if "{,}" in text or "\\" in text:
        text = _FRACTION.sub(r" \1 ", _LATEX_THOUSANDS.sub("", text))
        text = _COMMAND.sub(_spoken, text)
    return _HYPHEN.sub("", _THOUSANDS.sub("", text))


def _spoken(command: re.Match[str]) -> str:
    name = command[1]
    if command[0] == "\\]":
        return " $$ "  # the end of a displayed formula, whichever way it is written
    return f" {_SPELLED[name]} " if name in _SPELLED else " " if name is None or name in _SILENT else f" {name} "


@dataclass(frozen=True)
class Words:
    """The words of a text.

    Args:
        text: the text in its plain spelling, UTF-8.
        hashes: of each word, uint64 [w].
        starts: where each word starts in `text`, int64 [w].
        ends: where each word ends, int64 [w].
        digits: which words are runs of digits, bool [w].
    """

    text: bytes
    hashes: np.ndarray
    starts: np.ndarray
    ends: np.ndarray
    digits: np.ndarray

    def __len__(self) -> int:
        return len(self.hashes)

    def shown(self, first: int, count: int) -> str:
        """Some words, with what stands between them."""
        last = min(first + count, len(self)) - 1
        return self.text[self.starts[first] : self.ends[last]].decode(errors="replace")


class Batch:
    """The words of several texts, found together: a text of a few lines costs no more than its bytes.

    Args:
        texts: each on its own; no word, hyphen or command reaches from one into the next.
    """

    def __init__(self, texts: Sequence[str]) -> None:
        joined = _BETWEEN.join(text.replace(_MARK, " ") for text in texts)
        self.words = _cut(plain(joined).encode("utf-8", "replace"))
        marks = np.flatnonzero(np.frombuffer(self.words.text, np.uint8) == ord(_MARK))
        self._bytes = np.concatenate(([0], marks, [len(self.words.text)])) if len(texts) else np.zeros(1, np.int64)
        self.first = np.searchsorted(self.words.starts, self._bytes)
        """Number of the first word of each text, and one beyond the last; int64 [texts + 1]."""

    def __getitem__(self, number: int) -> Words:
        words, origin = self.words, int(self._bytes[number])
        own = slice(int(self.first[number]), int(self.first[number + 1]))
        text = words.text[origin : int(self._bytes[number + 1])].replace(_MARK.encode(), b"\n")
        return Words(text, words.hashes[own], words.starts[own] - origin, words.ends[own] - origin, words.digits[own])

    def text_of(self, places: np.ndarray) -> np.ndarray:
        """To which texts some words belong, each named once; int64 [texts found]."""
        return np.unique(np.searchsorted(self.first, places, "right") - 1)


def words_of(text: str) -> Words:
    """The words of a text, from any spelling of it."""
    return Batch([text])[0]


def _cut(content: bytes) -> Words:
    kinds = _KINDS[np.frombuffer(content, np.uint8)]
    edges = np.flatnonzero(np.diff(kinds, prepend=np.uint8(0), append=np.uint8(0)))
    begins = np.flatnonzero(kinds[edges[:-1]]) if len(edges) else edges
    starts, ends = edges[begins], edges[begins + 1] if len(edges) else edges
    hashes = _hash_pieces(np.frombuffer(content, np.uint8), starts, ends)
    return Words(content, hashes, starts, ends, kinds[starts] == _DIGIT)


def _hash_pieces(content: np.ndarray, starts: np.ndarray, ends: np.ndarray) -> np.ndarray:
    """Polynomial hashes modulo 2**64 of pieces of some bytes, by differences of running sums; uint64 [pieces]."""
    found = np.empty(len(starts), np.uint64)
    first = 0
    while first < len(starts):
        origin = int(starts[first])
        end = max(first + 1, int(np.searchsorted(ends, origin + _CHUNK, "right")))
        size = int(ends[end - 1]) - origin
        powers, inverse = _powers(1 << max(_CHUNK.bit_length(), (size + 1).bit_length()))
        sums = np.zeros(size + 1, np.uint64)
        np.cumsum((content[origin : origin + size].astype(np.uint64) + np.uint64(1)) * powers[:size], out=sums[1:])
        begin, stop = starts[first:end] - origin, ends[first:end] - origin
        found[first:end] = (sums[stop] - sums[begin]) * inverse[begin]
        first = end
    return mixed(found)


def mixed(values: np.ndarray) -> np.ndarray:
    """Spread what differs anywhere in 64 bits over all of them; uint64, same shape."""
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))


@lru_cache(maxsize=2)
def _powers(count: int) -> tuple[np.ndarray, np.ndarray]:
    """The powers of the root and of its inverse, modulo 2**64; two of uint64 [count]."""

    def of(base: int) -> np.ndarray:
        steps = np.full(count, base, np.uint64)
        steps[0] = 1
        return np.cumprod(steps)

    return of(_ROOT), of(pow(_ROOT, -1, 1 << 64))


def ngrams(hashes: np.ndarray, n: int) -> np.ndarray:
    """Hashes of all runs of n words.

    Args:
        hashes: of the words, uint64 [w].
        n: words in a run.

    Returns:
        uint64 [w - n + 1], empty where there are fewer words. Runs of different lengths have different hashes.
    """
    count = len(hashes) - n + 1
    if count <= 0:
        return np.empty(0, np.uint64)
    # Runs are put together from runs of 1, 2, 4, ... words, the longest first: about 2 log2(n) steps and not n.
    found, done = np.full(count, n, np.uint64), 0
    for size, runs in reversed(_doubled(hashes, n)):
        if n & size:
            found *= np.uint64(pow(_ROOT, size, 1 << 64))
            found += runs[done : done + count]
            done += size
    return mixed(found)


def _doubled(hashes: np.ndarray, n: int) -> list[tuple[int, np.ndarray]]:
    """Polynomial hashes of all runs of 1, 2, 4, ... words, up to n."""
    several, size = [(1, hashes)], 1
    while 2 * size <= n:
        runs = several[-1][1]
        several.append((2 * size, runs[:-size] * np.uint64(pow(_ROOT, size, 1 << 64)) + runs[size:]))
        size *= 2
    return several
