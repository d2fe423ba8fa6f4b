"""Quantities as people write them: tokens ("20B", "1.5M"), bytes ("2 GiB"), durations ("1h30m").

Tokens are the project's unit of time. One suffix letter is a power of a thousand, never of 1024.
"""

from __future__ import annotations

import re
from typing import Annotated

from pydantic import BeforeValidator, PlainSerializer

_TOKEN_SUFFIX = {"": 1, "K": 10**3, "M": 10**6, "B": 10**9, "T": 10**12}
_TOKEN_PATTERN = re.compile(r"^\s*(\d[\d_]*)(?:\.(\d+))?\s*([KMBT]?)\s*$", re.IGNORECASE)


def parse_tokens(value: object) -> int:
    """Read a token count.

    Args:
        value: an integer, or text such as "4096", "40K", "1.5M", "20B".

    Returns:
        The count, exact.

    Raises:
        ValueError: not a whole, non-negative number of tokens.
    """
    if isinstance(value, bool) or not isinstance(value, (int, str)):
        raise ValueError(f"{value!r} is not a token count; write an integer or e.g. '40K', '1.5M', '20B'")
    if isinstance(value, int):
        if value < 0:
            raise ValueError(f"{value} tokens: a token count cannot be negative")
        return value
    match = _TOKEN_PATTERN.match(value)
    if match is None:
        raise ValueError(f"{value!r} is not a token count; write an integer or e.g. '40K', '1.5M', '20B'")
    whole, fraction, suffix = match[1].replace("_", ""), match[2] or "", match[3].upper()
    scaled = int(whole + fraction) * _TOKEN_SUFFIX[suffix]
    count, rest = divmod(scaled, 10 ** len(fraction))
    if rest:
        raise ValueError(f"{value!r} is not a whole number of tokens")
    return count


def format_tokens(count: int) -> str:
    """Write a token count briefly, three significant digits: 1048576 -> '1.05M'."""
    rounded = float(f"{count:.3g}")  # before a suffix is chosen: 999_999_000 is 1B
    for suffix in ("T", "B", "M", "K"):
        if rounded >= _TOKEN_SUFFIX[suffix]:
            return f"{rounded / _TOKEN_SUFFIX[suffix]:.4g}{suffix}"
    return str(count)


def format_flops(count: float) -> str:
    """Write floating-point operations with a prefix, three significant digits: 9.89e14 -> '989 T'; a unit follows."""
    for power, prefix in ((15, "P"), (12, "T"), (9, "G"), (6, "M"), (3, "K")):
        if count >= 10**power:
            return f"{count / 10**power:.3g} {prefix}"
    return f"{count:.3g} "


def format_bytes(count: float) -> str:
    """Write a byte count with a binary suffix: 1536 -> '1.5 KiB'."""
    for suffix in ("B", "KiB", "MiB", "GiB"):
        if count < 1024:
            return f"{count:.4g} {suffix}"
        count /= 1024
    return f"{count:.4g} TiB"


def format_duration(seconds: float) -> str:
    """Write seconds as people say them: 5400 -> '1h30m', 75 -> '1m15s'."""
    whole = round(seconds)
    hours, minutes, rest = whole // 3600, whole % 3600 // 60, whole % 60
    if hours:
        return f"{hours}h{minutes:02d}m"
    return f"{minutes}m{rest:02d}s" if minutes else f"{rest}s"


Tokens = Annotated[int, BeforeValidator(parse_tokens), PlainSerializer(int)]
"""A configuration field that holds a token count and accepts '40K', '1.5M', '20B'."""
