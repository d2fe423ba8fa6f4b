"""Numbers as people and models write them, read exactly and compared by rule, without evaluating anything."""

from __future__ import annotations

import re
from dataclasses import dataclass
from fractions import Fraction

from megatron_octo.evaluate.extract import without_wrapping

_PLAIN = r"(?:[1-9][0-9]{0,2}(?:,[0-9]{3})+|[0-9]+)(?:\.[0-9]*)?|\.[0-9]+"
_QUOTIENT = rf"\\frac\{{(?P<fs>-?) ?(?P<fn>{_PLAIN})\}}\{{(?P<fd>{_PLAIN})\}}"
_NUMBER = re.compile(
    rf"(?P<sign>[-+]?) ?[£€]? ?(?:"
    rf"(?P<whole>[0-9]+) ?{_QUOTIENT.replace('<f', '<m')}|(?P<whole2>[0-9]+) (?P<nn>[0-9]+)/(?P<nd>[0-9]+)|"
    rf"{_QUOTIENT}|(?P<sn>{_PLAIN}) ?/ ?(?P<sd>{_PLAIN})|(?P<plain>{_PLAIN}))(?P<rest>.*)",
    re.DOTALL,
)
_LONGEST = 400  # characters; beyond it only equal spelling counts, and int() stays far from its own limit

_TEXT_UNIT = re.compile(r"\\text\{ ?([a-zA-Z][a-zA-Z ]*)\}(?:\^\{?[23]\}?)?")
_WORD_UNIT = re.compile(r" ([mgshL]|[a-zA-Z]{2,}(?: [a-zA-Z]{2,}){0,2})")
_MEASURES = ("mm", "cm", "km", "kg", "mg", "ml", "ft", "in", "mph", "dollars", "cents", "degrees", "inches", "feet")
_ATTACHED_UNIT = re.compile(rf"({'|'.join(_MEASURES)})")
_MAGNITUDES = {"dozen": 12, "hundred": 100, "thousand": 10**3, "million": 10**6, "billion": 10**9, "trillion": 10**12}
# Words that would make a longer expression of the number and so are no unit.
_NOT_UNITS = frozenset(
    {"and", "or", "plus", "minus", "times", "over", "by", "to", "mod", "of", "half", "third", "quarter", "squared"}
    | {"cubed", "factorial", "pi", "sqrt", "sin", "cos", "tan", "log", "ln", "exp", "infinity", "alpha", "beta"}
    | {"theta", "percent", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten"}
)
_ROUNDED_PLACES = 6
_ROUNDED_ERROR = Fraction(1, 10**_ROUNDED_PLACES)


@dataclass(frozen=True)
class Number:
    """A rational number and how it was written.

    Args:
        value: the exact value, magnitude words such as 'million' applied, a percent sign not applied.
        percent: written with a percent sign or the word.
        unit: what follows the number, lower case, or "".
        places: decimal places written.
    """

    value: Fraction
    percent: bool = False
    unit: str = ""
    places: int = 0


def read_number(text: str) -> Number | None:
    r"""Read an integer, decimal, fraction or mixed number with an optional unit.

    Args:
        text: an answer in canonical spelling.

    Returns:
        The number, or None when the text is anything else; a sum still to be done is not a number.
    """
    text = without_wrapping(text)
    match = _NUMBER.fullmatch(text) if len(text) <= _LONGEST else None
    if match is None:
        return None
    suffix = _read_suffix(match["rest"].rstrip())
    value = _value(match)
    if suffix is None or value is None:
        return None
    percent, scale, unit = suffix
    places = len(match["plain"].partition(".")[2]) if match["plain"] else 0
    return Number(value * scale * (-1 if match["sign"] == "-" else 1), percent, unit, places)


def _value(match: re.Match[str]) -> Fraction | None:
    """The unsigned value of a match, or None for a division by zero."""
    if match["plain"]:
        return _exact(match["plain"])
    for whole, sign, upper, lower in (
        ("whole", "ms", "mn", "md"), ("whole2", None, "nn", "nd"), (None, "fs", "fn", "fd"), (None, None, "sn", "sd"),
    ):  # fmt: skip
        if match[upper] is None:
            continue
        denominator = _exact(match[lower])
        negative = bool(sign and match[sign])
        if denominator == 0 or (whole and negative):
            return None
        quotient = _exact(match[upper]) / denominator * (-1 if negative else 1)
        return quotient + (_exact(match[whole]) if whole else 0)
    return None


def _exact(digits: str) -> Fraction:
    whole, _, places = digits.replace(",", "").partition(".")
    return Fraction(int(f"{whole}{places}" or "0"), 10 ** len(places))


def _read_suffix(text: str) -> tuple[bool, int, str] | None:
    """What follows the digits: (percent, magnitude, unit), or None when it is no suffix of a number."""
    if not text:
        return False, 1, ""
    if text.strip() == "%":
        return True, 1, ""
    if text.strip() == r"^{\circ}":
        return False, 1, "degrees"
    stripped = text.lstrip()
    match = _TEXT_UNIT.fullmatch(stripped) or _WORD_UNIT.fullmatch(text) or _ATTACHED_UNIT.fullmatch(text)
    return None if match is None else _read_words(match[1].casefold().split())


def _read_words(words: list[str]) -> tuple[bool, int, str] | None:
    if words == ["percent"]:
        return True, 1, ""
    scale = _MAGNITUDES.get(words[0], 1)
    if scale != 1:
        words = words[1:]
    if _NOT_UNITS.intersection(words):
        return None
    return False, scale, " ".join(words)


def same_number(gold: Number, answer: Number) -> bool:
    """Compare two numbers.

    Units: one side may leave its unit out; two different units differ. Percent: a percent sign on one side only may
    be that side's unit (25% answers 25) or a hundredth (25% answers 0.25); without a sign no factor of a hundred is
    forgiven. Rounding: a decimal written to six or more places stands for what it rounds, to a millionth.
    """
    if gold.unit and answer.unit and gold.unit != answer.unit:
        return False
    readings = [(gold.value, answer.value)]
    if gold.percent and not answer.percent:
        readings.append((gold.value / 100, answer.value))
    elif answer.percent and not gold.percent:
        readings.append((gold.value, answer.value / 100))
    rounded = max(gold.places, answer.places) >= _ROUNDED_PLACES
    return any(a == b or (rounded and abs(a - b) <= _ROUNDED_ERROR * abs(a)) for a, b in readings)
