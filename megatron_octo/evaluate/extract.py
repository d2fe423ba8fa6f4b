"""What a response claims: its last boxed answer, in one canonical spelling. Text work only, in linear time."""

from __future__ import annotations

import re
import unicodedata

_BOX = re.compile(r"\\boxed\s*\{")
# A backslash takes the next character with it, so \{ and \} do not count as braces.
_BRACE = re.compile(r"\\.|[{}]", re.DOTALL)


def last_boxed(text: str) -> str | None:
    r"""Find the last `\boxed{...}` of a response.

    Args:
        text: the response. Braces may nest; of nested boxes the innermost, being opened last, counts.

    Returns:
        The content between the braces, or None when there is no box or the last one is never closed:
        an answer that was begun again and cut off is not replaced by an earlier one.
    """
    starts = [match.end() for match in _BOX.finditer(text)]
    if not starts:
        return None
    depth = 1
    for brace in _BRACE.finditer(text, starts[-1]):
        if brace[0] == "{":
            depth += 1
        elif brace[0] == "}":
            depth -= 1
            if depth == 0:
                return text[starts[-1] : brace.start()].strip()
    return None


_CHARACTERS = str.maketrans(
    {
        **dict.fromkeys("\u2212\u2012\u2013\u2014\ufe63\uff0d", "-"),
        **dict.fromkeys("\u00a0\u2009\u200a\u202f\u3000\u200b\t\n\r~", " "),
        "\u00d7": "\\times ",
        "\u00b7": "\\cdot ",
        "\u00f7": "/",
        "\u2044": "/",
        "\u03c0": "\\pi ",
        "\u221e": "\\infty ",
        "\u222a": "\\cup ",
        "\u221a": "\\sqrt ",
        "\u00b0": "^{\\circ}",
        "\u00b2": "^{2}",
        "\u00b3": "^{3}",
        **{chr(0xFF01 + offset): chr(0x21 + offset) for offset in range(94) if chr(0xFF01 + offset) != "\uff0d"},
    }
)
_VULGAR = re.compile("[\u00bc-\u00be\u2150-\u215e]")
_REWRITES = [
    (re.compile(r"\\[dtc]frac(?![a-zA-Z])"), r"\\frac"),
    (re.compile(r"\\(?:left|right|displaystyle|big|Big|bigl|bigr)(?![a-zA-Z])"), ""),
    # Spacing commands; the second backslash of a line break in a matrix begins none.
    (re.compile(r"(?<!\\)\\(?:[!,;:]|(?= )|q?quad(?![a-zA-Z]))"), " "),
    (re.compile(r"\{,\}"), ","),
    (re.compile(r"\\?\$"), ""),
    (re.compile(r"\\%"), "%"),
    (re.compile(r"\\(?:mathrm|textbf|textit|textrm|mbox|operatorname|mathbf)\s*\{"), r"\\text{"),
    (re.compile(r"\\frac\s*(?:\{([^{}]*)\}|(\w))\s*(?:\{([^{}]*)\}|(\w))"), r"\\frac{\1\2}{\3\4}"),
    (re.compile(r"\^\s*(?:\{\s*\\circ\s*\}|\\circ(?![a-zA-Z]))"), r"^{\\circ}"),
    (re.compile(r" +"), " "),
]


def canonical(text: str) -> str:
    r"""Give equal spellings of an answer one form: `\dfrac14`, `\frac{1}{4}` and a vulgar fraction sign alike.

    Args:
        text: an answer, at most a few thousand characters.

    Returns:
        The answer with Unicode signs as LaTeX or ASCII, sizing commands, dollar signs, outer braces and a final
        full stop removed, and single spaces.
    """
    text = _VULGAR.sub(_spell_fraction, text).translate(_CHARACTERS)
    for pattern, replacement in _REWRITES:
        text = pattern.sub(replacement, text)
    return _unwrapped(text.strip().removesuffix(".").strip(), "{", "}")


def _spell_fraction(sign: re.Match[str]) -> str:
    numerator, _, denominator = unicodedata.normalize("NFKC", sign[0]).partition("\u2044")
    return rf"\frac{{{numerator}}}{{{denominator}}}"


def without_wrapping(text: str) -> str:
    """Remove round brackets around a whole answer: `(5)` is 5; `(1,234)` is a pair and keeps them."""
    return text if "," in text else _unwrapped(text, "(", ")")


def _unwrapped(text: str, opening: str, closing: str) -> str:
    """Remove every pair of brackets that encloses the whole text, and white space inside them."""
    partner: dict[int, int] = {}
    unclosed: list[int] = []
    for position, character in enumerate(text if text[:1] == opening else ""):
        if character == opening:
            unclosed.append(position)
        elif character == closing and unclosed:
            partner[unclosed.pop()] = position
    start, end = 0, len(text)
    while start < end and partner.get(start) == end - 1:
        start, end = start + 1, end - 1
        while start < end and text[start].isspace():
            start += 1
        while start < end and text[end - 1].isspace():
            end -= 1
    return text[start:end]
