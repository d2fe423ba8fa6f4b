"""A text flame: where time goes, as an indented tree with bars that lie under their parents."""

from __future__ import annotations

from collections.abc import Iterator

WIDTH = 100
"""Columns of a flame; fits a terminal of that width and a log."""

_ORDER = (
    "data", "forward", "recompute", "backward", "forward_backward", "waiting for stages", "gradients", "update",
    "hooks", "embedding", "norms", "attention", "mlp", "output and loss", "clear", "reduce", "norm", "other",
)  # fmt: skip
_PARTS = " ▏▎▍▌▋▊▉"
_NAME, _FIGURES = 24, 20

Times = dict[tuple[str, ...], float]
"""Seconds by path, e.g. ("forward", "attention"); a path's own time and not that of longer ones."""


def flame(title: str, times: Times, ranks: list[Times] | None = None) -> str:
    """Draw the times of one step, or of many.

    Args:
        title: the first line.
        times: seconds by path; together they are the whole.
        ranks: times of single ranks whose mean `times` is; each line then says the least and the most of them.

    Returns:
        Lines of at most `WIDTH` columns.
    """
    total = sum(times.values()) or 1.0
    spread = ranks is not None and len(ranks) > 1
    room = WIDTH - _NAME - _FIGURES - (20 if spread else 0)
    lines = [title]
    for path, start in _walk(times):
        seconds = _below(times, path)
        name = "  " * len(path) + (path[-1] if path else "step")
        figures = f"{seconds * 1e3:10.2f} ms {seconds / total:6.1%}"
        if spread:
            each = [_below(rank, path) * 1e3 for rank in ranks or []]
            figures += f"{min(each):9.2f}..{max(each):<9.2f}"
        lines.append(f"{name:<{_NAME}}{figures} {_bar(start / total, seconds / total, room - 1)}".rstrip())
    return "\n".join(lines)


def mean(ranks: list[Times]) -> Times:
    """The mean of several ranks' times."""
    paths = {path for times in ranks for path in times}
    return {path: sum(times.get(path, 0.0) for times in ranks) / len(ranks) for path in paths}


def stages(ranks: list[tuple[int, Times]]) -> str:
    """A line for each pipeline stage: how much of the step it computes, and how much it waits for others.

    Args:
        ranks: (stage, times) of each rank.
    """
    lines = ["stage   █ forward  ▓ backward  ░ waiting for stages"]
    for stage in sorted({stage for stage, _ in ranks}):
        times = mean([times for own, times in ranks if own == stage])
        total = sum(times.values()) or 1.0
        ahead, back, wait = (_below(times, (name,)) / total for name in ("forward", "backward", "waiting for stages"))
        back += _below(times, ("recompute",)) / total
        room = WIDTH - 56
        drawn = "█" * round(ahead * room) + "▓" * round(back * room) + "░" * round(wait * room)
        lines.append(f"{stage:>5}   forward {ahead:6.1%}  backward {back:6.1%}  waiting {wait:6.1%} {drawn}")
    return "\n".join(lines)


def _walk(times: Times) -> Iterator[tuple[tuple[str, ...], float]]:
    """Every path and those above it, parents first, with the place in time where its bar begins."""

    def below(path: tuple[str, ...], start: float) -> Iterator[tuple[tuple[str, ...], float]]:
        yield path, start
        depth = len(path)
        children = {full[: depth + 1] for full in times if len(full) > depth and full[:depth] == path}
        for child in sorted(children, key=_place):
            yield from below(child, start)
            start += _below(times, child)

    yield from below((), 0.0)


def _place(path: tuple[str, ...]) -> tuple[int, str]:
    name = path[-1]
    return (_ORDER.index(name) if name in _ORDER else len(_ORDER), name)


def _below(times: Times, path: tuple[str, ...]) -> float:
    return sum(seconds for full, seconds in times.items() if full[: len(path)] == path)


def _bar(start: float, share: float, room: int) -> str:
    """A bar of eighths of a column; it begins in the column its start falls into."""
    eighths = round(share * room * 8)
    return " " * min(int(start * room), room - 1) + "█" * (eighths // 8) + _PARTS[eighths % 8].strip()
