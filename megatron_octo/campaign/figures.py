"""The report's pictures, drawn with matplotlib; figures come from the facts, curves from the record."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from megatron_octo.campaign.curves import MOST_POINTS, Series, rl_series, smooth, thin, training_series, window_for
from megatron_octo.campaign.facts import layouts
from megatron_octo.campaign.palette import branch_colours
from megatron_octo.campaign.record import Record, Run
from megatron_octo.page.drawing import HALF, WIDE, new_figure, styled
from megatron_octo.page.markup import look
from megatron_octo.page.palette import INK, MUTED, SURFACE
from megatron_octo.units import format_tokens

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


@styled
def training_figure(record: Record, wide: bool) -> Figure | None:
    """Loss of all runs on one token axis with forks and layout changes, and the learning rate under it."""
    losses, rates = training_series(record, "loss"), training_series(record, "learning_rate")
    if not losses:
        return None
    figure = new_figure(WIDE if wide else HALF, 4.9 if wide else 4.6)
    upper, lower = figure.subplots(2, 1, sharex=True, height_ratios=(3.4, 1))
    _draw_losses(upper, record, losses, label_layouts=wide)
    for index, series in enumerate(rates):
        lower.plot(
            series.x, series.y, color=series.colour, linewidth=1.8, linestyle=_taking_turns(series, index, rates)
        )
    highest = max((series.y.max() for series in rates), default=0) or 1
    lower.set_ylim(0, 1.08 * highest)
    lower.set_yticks([0, highest / 2, highest])
    lower.set_ylabel("learning rate")
    lower.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
    lower.set_xlabel("training tokens, counted along the lineage")
    return figure


@styled
def accuracy_figure(facts: dict[str, Any], kind: str) -> Figure | None:
    """Accuracy before and after RL with intervals, one pair of rows a branch; `kind` is greedy or sampled."""
    if not any(look(branch, f"{when}/{kind}/accuracy") is not None for branch, when in _measured(facts)):
        return None
    figure = new_figure(HALF, 1.1 + 0.75 * len(facts["branches"]))
    _draw_accuracy(figure.subplots(), facts, kind)
    return figure


@styled
def length_figure(facts: dict[str, Any]) -> Figure | None:
    """Mean response length of greedy answers before and after RL, one pair of bars a branch."""
    lengths = [look(branch, f"{when}/sampled/response_length") for branch, when in _measured(facts)]
    if not any(length is not None for length in lengths):
        return None
    figure = new_figure(HALF, 1.1 + 0.75 * len(facts["branches"]))
    axes = figure.subplots()
    for row, (_, branch, colour) in enumerate(_rows(facts)):
        for when, offset in (("before", -0.19), ("after", 0.19)):
            length = look(branch, f"{when}/sampled/response_length")
            if length is not None:
                fill = colour if when == "after" else SURFACE
                axes.barh(row + offset, length, 0.32, color=fill, edgecolor=colour, linewidth=1.2)
                axes.annotate(f"{length:.1f}", (length, row + offset), (4, 0), textcoords="offset points", va="center")
    _branch_rows(axes, facts)
    _when_legend(axes, marker="s")
    axes.set_xlim(0, 1.18 * max(length or 0 for length in lengths) or 1)
    axes.set_xlabel("mean answer length, tokens")
    return figure


@styled
def rl_figure(record: Record, column: str, label: str, percent: bool = False) -> Figure | None:
    """A column of the RL metrics by rollout step: every step faint, the running mean strong."""
    found = rl_series(record, column)
    if not found:
        return None
    figure = new_figure(HALF, 3.0)
    axes = figure.subplots()
    for series in found:
        _curve(axes, series)
    axes.set_ylim(0, 1.02 if percent else None)
    if percent:
        _percent(axes.yaxis)
    _whole_steps(axes)
    axes.set_xlabel("rollout step")
    axes.set_ylabel(label)
    _legend_above(axes)
    return figure


@styled
def overview_figure(record: Record, facts: dict[str, Any]) -> Figure:
    """One wide picture: losses left, accuracy before and after RL right; an absent part is said in words."""
    figure = new_figure(10.0, 4.375)
    left, right = figure.subplots(1, 2, width_ratios=(1.65, 1))
    losses = training_series(record, "loss")
    if losses:
        _draw_losses(left, record, losses, label_layouts=True)
        left.set_xlabel("training tokens, counted along the lineage")
    else:
        _say(left, "no training metrics yet")
    kinds = [
        k for k in ("sampled", "greedy") if any(look(b, f"{w}/{k}/accuracy") is not None for b, w in _measured(facts))
    ]
    if kinds:
        _draw_accuracy(right, facts, kinds[0])
        right.set_title(f"Accuracy, {kinds[0]}", pad=8)
    else:
        _say(right, "not evaluated yet")
    left.set_title("Mid-training loss: one stable stage, forked into decay branches", pad=18)
    return figure


def _taking_turns(series: Series, index: int, all_series: list[Series]) -> Any:
    """Dashes that leave room for equal curves under one another: each shows in its own colour."""
    twins = [other for other in all_series if other.x.size == series.x.size and np.array_equal(other.x, series.x)]
    if len(twins) == 1:
        return "-"
    return (5 * index, (5, 5 * (len(twins) - 1)))


def _draw_losses(axes: Axes, record: Record, losses: list[Series], label_layouts: bool) -> None:
    for series in losses:
        _curve(axes, series)
    smallest, largest = min(s.y.min() for s in losses), max(s.y.max() for s in losses)
    if smallest > 0 and largest / smallest > 4:
        _log_axis(axes, smallest, largest)
    axes.set_ylabel("loss, nats per token")
    axes.margins(x=0.01)
    axes.set_xlim(left=0)
    axes.xaxis.set_major_formatter(lambda value, _: format_tokens(round(value)))
    _mark_layouts(axes, record.stable, label_layouts)
    _mark_forks(axes, record)
    _legend(axes)


def _curve(axes: Axes, series: Series) -> None:
    """Raw values faint, their running mean strong on top; a few points are drawn as points."""
    few = series.x.size < 3
    x, y = thin(series.x, series.y)
    axes.plot(x, y, color=series.colour, linewidth=0.8, alpha=0.3, marker="o" if few else "")
    mean = smooth(series.y, window_for(series.y.size))
    keep = np.unique(np.linspace(0, series.x.size - 1, min(series.x.size, MOST_POINTS)).astype(int))
    axes.plot(series.x[keep], mean[keep], color=series.colour, linewidth=1.8, label=series.name)


def _log_axis(axes: Axes, smallest: float, largest: float) -> None:
    axes.set_yscale("log")
    steps = [mantissa * 10.0**power for power in range(-4, 5) for mantissa in (1, 1.5, 2, 3, 5, 7)]
    axes.set_yticks([step for step in steps if smallest * 0.97 <= step <= largest * 1.03], minor=False)
    axes.set_yticks([], minor=True)
    axes.yaxis.set_major_formatter(lambda value, _: f"{value:g}")


def _mark_layouts(axes: Axes, run: Run, label: bool) -> None:
    """A dashed line where the run went on with another layout, and the layouts' names along the top."""
    stretches = layouts(run)
    if not stretches:
        return
    for stretch in stretches[1:]:
        axes.axvline(stretch["from"], color=MUTED, linewidth=0.9, linestyle=(0, (3, 3)))
    if label and len(stretches) <= 5:
        for stretch in stretches:
            middle = (stretch["from"] + stretch["to"]) / 2
            axes.annotate(
                stretch["label"], (middle, 1), (0, 3), xycoords=axes.get_xaxis_transform(),
                textcoords="offset points", ha="center", va="bottom", color=MUTED, fontsize=8, annotation_clip=False,
            )  # fmt: skip


def _mark_forks(axes: Axes, record: Record) -> None:
    forks = {layouts(branch.run)[0]["from"] for branch in record.branches if branch.run.rows}
    for fork in sorted(forks):
        axes.axvline(fork, color=INK, linewidth=1.0)
        axes.annotate(
            f"fork at {format_tokens(int(fork))}", (fork, 0.97), (-5, 0), xycoords=axes.get_xaxis_transform(),
            textcoords="offset points", ha="right", va="top", fontsize=8.5,
        )  # fmt: skip


def _draw_accuracy(axes: Axes, facts: dict[str, Any], kind: str) -> None:
    for row, (_, branch, colour) in enumerate(_rows(facts)):
        for when, offset in (("before", -0.17), ("after", 0.17)):
            _draw_estimate(axes, look(branch, f"{when}/{kind}") or {}, row + offset, colour, solid=when == "after")
    _branch_rows(axes, facts)
    _when_legend(axes, marker="o")
    axes.set_xlim(0, 1)
    _percent(axes.xaxis)
    axes.set_xlabel("problems answered correctly, with 95% interval")


def _draw_estimate(axes: Axes, measure: dict[str, Any], y: float, colour: str, solid: bool) -> None:
    accuracy, low, high = (measure.get(name) for name in ("accuracy", "low", "high"))
    if accuracy is None:
        return
    if low is not None and high is not None:
        axes.plot([low, high], [y, y], color=colour, linewidth=1.6, solid_capstyle="butt", clip_on=False)
        axes.plot([low, high], [y, y], color=colour, linestyle="", marker="|", markersize=6, clip_on=False)
    fill = colour if solid else SURFACE
    axes.plot([accuracy], [y], color=colour, marker="o", markersize=7, markerfacecolor=fill, clip_on=False, zorder=3)
    edge = max(accuracy if high is None else high, accuracy)
    left = edge > 0.86
    start = min(accuracy if low is None else low, accuracy) if left else edge
    axes.annotate(
        f"{accuracy:.1%}", (start, y), (-6 if left else 6, 0), textcoords="offset points",
        ha="right" if left else "left", va="center", fontweight="bold" if solid else "normal",
    )  # fmt: skip


def _rows(facts: dict[str, Any]) -> list[tuple[str, dict[str, Any], str]]:
    colours = branch_colours(list(facts["branches"]))
    return [(name, branch, colours[name]) for name, branch in facts["branches"].items()]


def _measured(facts: dict[str, Any]) -> list[tuple[dict[str, Any], str]]:
    return [(branch, when) for branch in facts["branches"].values() for when in ("before", "after")]


def _branch_rows(axes: Axes, facts: dict[str, Any]) -> None:
    names = list(facts["branches"])
    axes.set_yticks(range(len(names)), names, color=INK, fontsize=9.5)
    axes.set_ylim(len(names) - 0.5, -0.5)
    axes.tick_params(axis="y", length=0)
    axes.grid(visible=False, axis="y")


def _when_legend(axes: Axes, marker: str) -> None:
    """Above the axes: hollow is before RL, solid after it."""
    for label, fill in (("before RL", SURFACE), ("after RL", MUTED)):
        axes.plot([], [], color=MUTED, marker=marker, markersize=7, linestyle="", markerfacecolor=fill, label=label)
    axes.legend(loc="lower right", bbox_to_anchor=(1, 1), ncols=2, borderpad=0, handletextpad=0.2, columnspacing=1.2)


def _percent(axis: Any) -> None:
    axis.set_major_formatter(lambda value, _: f"{value:.0%}")


def _whole_steps(axes: Axes) -> None:
    from matplotlib.ticker import MaxNLocator

    axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=8))


def _legend(axes: Axes) -> None:
    if axes.get_legend_handles_labels()[0]:
        axes.legend(loc="best", handlelength=1.4)


def _legend_above(axes: Axes) -> None:
    axes.legend(
        loc="lower right",
        bbox_to_anchor=(1, 1),
        ncols=4,
        borderpad=0,
        handlelength=1.2,
        handletextpad=0.4,
        columnspacing=1.2,
    )


def _say(axes: Axes, text: str) -> None:
    axes.axis("off")
    axes.text(0.5, 0.5, text, ha="center", va="center", color=MUTED, transform=axes.transAxes)
