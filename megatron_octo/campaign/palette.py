"""Colours of a campaign's report: one a branch everywhere."""

from __future__ import annotations

from megatron_octo.page.palette import BLUE, GREEN, NEUTRAL, VERMILION, colours_of

STABLE = NEUTRAL
_NAMED = {"long": BLUE, "short": VERMILION, "hybrid": GREEN}


def branch_colours(names: list[str]) -> dict[str, str]:
    """Give every branch its colour: fixed for long, short and hybrid, the next spare one for others."""
    return colours_of(names, _NAMED)
