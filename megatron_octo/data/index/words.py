"""Byte-level BPE by a table of words: the same tokens as the tokenizers library, several times as fast.

A byte-level tokenizer cuts a text into words by a regular expression and merges each word on its own. Texts repeat
their words, so what a word becomes is looked up, and the library is asked only for new ones. Three things make the
result equal to the library's own, and each is a condition here, not a hope:

- The cut: only published expressions are known, each with a translation for Python's `re` whose classes of letters,
  digits and spaces are spelled out from Unicode. A text with a character outside the Basic Multilingual Plane, or one
  that this Python's Unicode does not know yet, is left to the library, as are those on which the two could differ.
- The merging: a word's tokens come from the library's own model.
- The vocabulary's added tokens are cut out first by the library; a text that holds one is left to it.
"""

from __future__ import annotations

import re
import unicodedata
from array import array
from collections.abc import Iterator
from functools import cache
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from tokenizers import Tokenizer

_KEPT = 400_000  # words; about 80 MB
_LONGEST = 64  # characters of a word that is kept
_STRETCH = 1 << 18  # characters cut into words in one go

MODEL_SETTINGS = (
    "dropout",
    "continuing_subword_prefix",
    "end_of_word_suffix",
    "fuse_unk",
    "byte_fallback",
    "unk_token",
)
"""Settings of a BPE model that a byte-level one does without; a tokenizer that sets one is not known here."""

_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
    r"|\s+(?!\S)|\s+"
)
_QWEN2 = _LLAMA3.replace(r"\p{N}{1,3}", r"\p{N}")
_DIGITS = r"\p{N}{1,3}"  # this project's own tokenizers: cut here first, then as GPT-2 does

_SPACES = "\t\n\x0b\x0c\r \x85\xa0\u1680\u2000-\u200a\u2028\u2029\u202f\u205f\u3000"
_FOLDED = "\u017f\u212a"  # the long s and the kelvin sign equal letters of ASCII where case is ignored
_PLANE = 0x10000


class WordEncoder:
    """Texts -> stored tokens, through a table of words that fills while it is used.

    Args:
        tokenizer: of the tokenizers library.
        expression: one of the published expressions above.
        dtype: type of a stored token.
        added: texts of the added tokens that the library cuts out of a text.
        composed: the library composes characters first (NFC); a text that is not composed yet is left to it.
    """

    def __init__(
        self, tokenizer: Tokenizer, expression: str, dtype: np.dtype[Any], added: list[str], composed: bool
    ) -> None:
        self._tokenizer, self._dtype, self._composed = tokenizer, dtype, composed
        self._words = _Words(tokenizer.model, dtype)
        self._cut = re.compile(_spelled(expression)).findall
        self._foreign = re.compile(f"[^{_ranges(_known())}]").search
        self._added = re.compile("|".join(map(re.escape, sorted(added)))).search if added else None

    @classmethod
    def of(cls, tokenizer: Tokenizer, form: dict[str, Any], dtype: np.dtype[Any], text: bool) -> WordEncoder | None:
        """The encoder for a tokenizer whose way of cutting words is known; None for any other.

        Args:
            tokenizer: of the tokenizers library.
            form: its `tokenizer.json`, or `form_of` it.
            dtype: type of a stored token.
            text: marks written in a text stay text: special tokens are not cut out.
        """
        expression, model, normalizer = _expression_of(form.get("pre_tokenizer")), form["model"], form.get("normalizer")
        if expression is None or model["type"] != "BPE" or any(model.get(name) for name in MODEL_SETTINGS):
            return None
        if normalizer not in (None, {"type": "NFC"}):
            return None
        added = [token for token in form.get("added_tokens") or [] if not (text and token["special"])]
        if any(token["lstrip"] or token["rstrip"] or token["single_word"] for token in added):
            return None
        contents = [token["content"] for token in added]
        if not all(content.isascii() and " " not in content for content in contents):
            return None
        return cls(tokenizer, expression, dtype, contents, normalizer is not None)

    def encode(self, text: str) -> bytes:
        """Stored tokens of a text, without marks."""
        if len(text) <= _STRETCH:
            return self._encode(text)
        return b"".join(map(self._encode, _stretches(text)))

    def _encode(self, text: str) -> bytes:
        if self._is_for_library(text):
            [found] = self._tokenizer.encode_batch_fast([text], add_special_tokens=False)
            return np.array(found.ids, self._dtype).tobytes()
        return b"".join(map(self._words.__getitem__, self._cut(text)))

    def _is_for_library(self, text: str) -> bool:
        if self._added is not None and self._added(text):
            return True
        if text.isascii():
            return False
        return bool(self._foreign(text)) or (self._composed and not unicodedata.is_normalized("NFC", text))


class _Words(dict[str, bytes]):
    """Stored tokens of each word; asks the model for new ones, and starts over when it is full."""

    def __init__(self, model: Any, dtype: np.dtype[Any]) -> None:
        self._model, self._type = model, dtype.char
        self._letters = dict(enumerate(letters_of_bytes()))

    def __missing__(self, word: str) -> bytes:
        letters = word.encode().decode("latin-1").translate(self._letters)
        tokens = array(self._type, [token.id for token in self._model.tokenize(letters)]).tobytes()
        if len(word) <= _LONGEST:
            if len(self) >= _KEPT:
                self.clear()
            self[word] = tokens
        return tokens


def letters_of_bytes() -> str:
    """The letter that stands for each byte in a byte-level vocabulary.

    Bytes that print as one sign stand for themselves, in Latin-1; the others take the letters from U+0100 on.
    """
    printed = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = iter(range(0x100, 0x200))
    return "".join(chr(byte if byte in printed else next(others)) for byte in range(256))


def _expression_of(steps: dict[str, Any] | None) -> str | None:
    """The published expression a pre-tokenizer cuts words by; None for any other."""
    listed = steps["pretokenizers"] if steps and steps["type"] == "Sequence" else [steps]
    *splits, last = listed
    if not last or last["type"] != "ByteLevel" or last.get("add_prefix_space"):
        return None
    found = [split["pattern"].get("Regex") for split in splits if _is_plain(split)]
    if len(found) != len(splits):
        return None
    if found == [_DIGITS] and last.get("use_regex", True):
        return _DIGITS
    if found == [] and last.get("use_regex", True):
        return _GPT2
    if found in ([_LLAMA3], [_QWEN2], [_GPT2]) and not last.get("use_regex", True):
        return found[0]
    return None


def _is_plain(split: dict[str, Any]) -> bool:
    return split["type"] == "Split" and split["behavior"] == "Isolated" and not split["invert"]


def _spelled(expression: str) -> str:
    """A published expression with its classes spelled out for `re`."""
    letters, digits = (_ranges(frozenset(_of_kind(kind))) for kind in "LN")
    if expression == _DIGITS:  # what lies between groups of digits is cut by itself, so spaces end before a digit
        outside = _spelled(_GPT2.replace(r"| ?\p{N}+", "").replace(r"(?!\S)", r"(?=\s|\p{N}|\Z)"))
        return f"[{digits}]{{1,3}}|{outside}"
    inside = {r"\p{L}": letters, r"\p{N}": digits, r"\s": _SPACES}
    spelled, in_class = "", False
    for part in re.findall(r"\\p\{[LN]\}|\\.|.", expression):
        in_class = (in_class or part == "[") and part != "]"
        if part == r"\S":
            spelled += f"[^{_SPACES}]"
        elif part in inside:
            spelled += inside[part] if in_class else f"[{inside[part]}]"
        else:
            spelled += part
    return spelled


@cache
def _known() -> frozenset[int]:
    """Characters that are the same to this Python and to the library: the assigned ones of the plane, less a few."""
    return frozenset(
        code
        for code in range(_PLANE)
        if unicodedata.category(chr(code)) not in ("Cn", "Cs") and chr(code) not in _FOLDED
    )


def _of_kind(kind: str) -> Iterator[int]:
    return (code for code in _known() if unicodedata.category(chr(code))[0] == kind)


def _ranges(codes: frozenset[int]) -> str:
    """Inside of a character class that holds exactly these."""
    found, first, last = "", -1, -2
    for code in [*sorted(codes), _PLANE + 1]:
        if code != last + 1:
            if first >= 0:
                found += rf"\u{first:04x}-\u{last:04x}"
            first = code
        last = code
    return found


_BORDER = re.compile("[A-Za-z](?= [A-Za-z])")


def _stretches(text: str) -> Iterator[str]:
    """A long text in parts that end after a letter and before a space and a letter: every expression cuts there."""
    first = 0
    while len(text) - first > _STRETCH and (border := _BORDER.search(text, first + _STRETCH)):
        yield text[first : border.end()]
        first = border.end()
    yield text[first:]
