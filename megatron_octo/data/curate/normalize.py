"""What the classifier sees of a text, as in MegaMath's released code."""

from __future__ import annotations

import re
import unicodedata
from itertools import islice

NUMBER = "<number>"
_LONGEST_WORD = 100
_WORDS = 1024
_WORD = re.compile(r"\d+|[^\W\d_]+")


def normalized(text: str) -> str:
    """A text as one line of words.

    Compatible characters are made one (NFKC), letters lower case, each run of digits one token; words of more than 100
    characters and whatever is neither letter nor digit are dropped; at most 1,024 words are kept.
    """
    if not text.isascii():
        text = unicodedata.normalize("NFKC", text)
    found = (match[0] for match in _WORD.finditer(text.lower()))
    words = (NUMBER if word[0].isdecimal() else word for word in found if len(word) <= _LONGEST_WORD)
    return " ".join(islice(words, _WORDS))
