"""The report's one HTML page, section by section; every figure on it is a value of report.json."""

from __future__ import annotations

from html import escape
from pathlib import Path
from typing import Any

from megatron_octo.campaign import figures
from megatron_octo.campaign.appendix import (
    branch_samples_section,
    certificate_badge,
    certificates_section,
    data_section,
    machine_section,
    notes_section,
    times_section,
)
from megatron_octo.campaign.curves import window_for
from megatron_octo.campaign.facts import LOSS_WINDOW, REWARD_WINDOW
from megatron_octo.campaign.palette import STABLE, branch_colours
from megatron_octo.campaign.record import Record
from megatron_octo.campaign.tree import campaign_tree
from megatron_octo.page.drawing import to_svg
from megatron_octo.page.frame import framed
from megatron_octo.page.markup import Facts, absent, coloured, key, listed, look, table


def render_page(record: Record, values: dict[str, Any]) -> str:
    """Draw the page.

    Args:
        record: the campaign directory as read (curves and sample answers).
        values: content of report.json (all figures).

    Returns:
        HTML that needs no other file and no network.
    """
    show = Facts(values)
    colours = branch_colours(list(values["branches"]))
    return framed(
        Path(__file__).parent,
        title=escape(f"Campaign {values['name']}"),
        banner=_banner(values),
        summary=_summary(show),
        cards=_cards(show, colours),
        tree=campaign_tree(show, colours, record.wants_rl),
        training=_training(record, show, colours),
        accuracy=_accuracy(show, colours),
        length=_length(record, show),
        rl=_rl(record, show, colours),
        samples="".join(branch_samples_section(branch, colours[branch.name]) for branch in record.branches)
        or absent("No branches yet."),
        certificates=certificates_section(show, colours),
        data=data_section(show),
        times=times_section(show, colours),
        machine=machine_section(show),
        notes=notes_section(values),
    )


def _banner(values: dict[str, Any]) -> str:
    if values["complete"]:
        return ""
    items = "".join(f"<li>{escape(item)}</li>" for item in values["missing"])
    return f'<div class="banner"><b>This campaign is not finished.</b> Missing so far:<ul>{items}</ul></div>'


def _summary(show: Facts) -> str:
    sentences = [_said_of_training(show), _said_of_branches(show), _said_of_accuracy(show), _said_of_time(show)]
    return " ".join(sentence for sentence in sentences if sentence)


def _said_of_training(show: Facts) -> str:
    if not show.has("stages/stable/tokens"):
        return "The stable stage has not trained yet."
    count = len(show.values["stages"]["stable"]["layouts"])
    across = f" across {count} process layouts" if count > 1 else ""
    return (
        f"The stable stage trained on {show('stages/stable/tokens', 'tokens')} tokens{across} and took the loss from "
        f"{show('stages/stable/first_loss', 'loss')} to {show('stages/stable/mean_last_loss', 'loss')}."
    )


def _said_of_branches(show: Facts) -> str:
    trained = [name for name in show.values["branches"] if show.has(f"stages/{name}/tokens")]
    if not trained:
        return ""
    names = listed([f"{escape(name)} ({show(f'stages/{name}/tokens', 'tokens')})" for name in trained])
    certified = f"{show('certificates/valid', 'count')} of {show('certificates/branches', 'count')}"
    branches = "one decay branch was" if len(trained) == 1 else f"{len(trained)} decay branches were"
    return f"From its end {branches} forked: {names}. {certified} converted models carry a valid certificate."


def _said_of_accuracy(show: Facts) -> str:
    measured = [name for name in show.values["branches"] if show.has(f"branches/{name}/problems")]
    if not measured:
        return "No branch has been evaluated yet."
    parts = []
    for name in measured:
        moves = [_move(show, f"branches/{name}", kind) for kind in ("greedy", "sampled")]
        parts.append(f"<b>{escape(name)}</b> {', '.join(move for move in moves if move)}")
    both = any(show.has(f"branches/{name}/change/{kind}") for name in measured for kind in ("greedy", "sampled"))
    when = ", before → after reinforcement learning" if both else ""
    problems = show(f"branches/{measured[0]}/problems", "count")
    return f"Accuracy on {problems} held-out problems{when}: {'; '.join(parts)}."


def _move(show: Facts, path: str, kind: str) -> str:
    """'46.0% → 61.0% greedy', or what there is of it."""
    known = [side for side in ("before", "after") if show.has(f"{path}/{side}/{kind}/accuracy")]
    values = " → ".join(show(f"{path}/{side}/{kind}/accuracy", "percent") for side in known)
    return f'<span class="nb">{values}</span> {kind}{" (after)" if known == ["after"] else ""}' if known else ""


def _said_of_time(show: Facts) -> str:
    return f"The stages took {show('wall_seconds', 'duration')} in all." if show.values["wall_seconds"] else ""


def _cards(show: Facts, colours: dict[str, str]) -> str:
    return f'<div class="cards">{"".join(_card(show, name, colour) for name, colour in colours.items())}</div>'


def _card(show: Facts, name: str, colour: str) -> str:
    path = f"branches/{name}"
    rows = [(f"accuracy, {kind}", _measured(show, path, kind)) for kind in ("greedy", "sampled")]
    lengths = [
        show(f"{path}/response_length/{when}", "length") for when in ("before", "after") if show.has(f"{path}/{when}")
    ]
    rows.append(("mean answer length, tokens (sampled)", " → ".join(lengths) or show(path + "/before", "text")))
    rows.append(("converted model", certificate_badge(show, name)))
    items = "".join(f"<dt>{label}</dt><dd>{value}</dd>" for label, value in rows)
    return f'<div class="card" {coloured(colour)}><h3>{escape(name)}</h3><dl>{items}</dl></div>'


def _measured(show: Facts, path: str, kind: str) -> str:
    sides = [f"{path}/{when}/{kind}/accuracy" for when in ("before", "after")]
    known = [show(side, "percent") for side in sides if show.has(side)]
    if not known:
        return show(sides[0], "percent")
    text = f'<span class="big">{" → ".join(known)}</span>'
    if not show.has(f"{path}/change/{kind}"):
        return f"{text}<br><small>{'before' if show.has(sides[0]) else 'after'} RL</small>"
    apart = look(show.values, f"{path}/change/{kind}/intervals_apart")
    verdict = {True: ", intervals apart", False: ", intervals overlap", None: ""}[apart]
    return f"{text}<br><small>{show(f'{path}/change/{kind}/accuracy', 'points')}{verdict}</small>"


def _training(record: Record, show: Facts, colours: dict[str, str]) -> str:
    wide, narrow = figures.training_figure(record, wide=True), figures.training_figure(record, wide=False)
    if wide is None or narrow is None:
        return absent("No training metrics yet.")
    window = max(window_for(len(run.rows)) for run in record.runs)
    label = "Loss and learning rate of all stages over training tokens"
    caption = (
        f"Faint: every step. Strong: running mean over up to {window} steps. Each stage's loss is on its own mixture, "
        "so levels of different stages do not compare. Dashed: training went on from the same checkpoint in another "
        "process layout."
    )
    drawn = "".join(
        f'<div class="{name}">{to_svg(figure, name, label)}</div>'
        for name, figure in (("wide", wide), ("narrow", narrow))
    )
    return f"<figure>{drawn}<figcaption>{caption}</figcaption></figure>{_training_table(show, colours)}"


def _training_table(show: Facts, colours: dict[str, str]) -> str:
    rows = []
    for name, colour in {"stable": STABLE, **colours}.items():
        path = f"stages/{name}"
        if show.has(f"{path}/tokens"):
            values = [show(f"{path}/{field}", kind, absent="unknown") for field, kind in _TRAINING_COLUMNS.values()]
            used = " → ".join(escape(stretch["label"]) for stretch in show.values["stages"][name]["layouts"])
            rows.append([key(colour, name), *values, used])
    return table(["stage", *_TRAINING_COLUMNS, "layouts"], rows) + _forks(show)


def _forks(show: Facts) -> str:
    """Where the branches left their parent and what they took along, one sentence for those that did alike."""
    alike: dict[str, list[str]] = {}
    for name in show.values["branches"]:
        path = f"branches/{name}/fork"
        if show.has(path):
            carried = look(show.values, f"{path}/carried")
            kept = [what for what, kept in carried.items() if kept is True] if isinstance(carried, dict) else []
            taking = f", carrying {escape(listed(kept))}" if kept else ""
            where = look(show.values, f"{path}/parent"), look(show.values, f"{path}/tokens")
            said = f"{escape(str(where[0] or 'the parent'))} at {show(f'{path}/tokens', 'count', '?')} tokens{taking}."
            alike.setdefault(f"{where}{taking}", [said]).append(escape(name))
    return "".join(f'<p class="small">Forked from {said} ({listed(names)})</p>' for said, *names in alike.values())


_TRAINING_COLUMNS = {
    "tokens": ("tokens", "tokens"),
    "steps": ("steps", "count"),
    "first loss": ("first_loss", "loss"),
    "last loss": ("last_loss", "loss"),
    f"mean of last {LOSS_WINDOW}": ("mean_last_loss", "loss"),
    "tokens/s (median)": ("tokens_per_second", "tokens"),
    "wall time": ("wall_seconds", "duration"),
}


def _accuracy(show: Facts, colours: dict[str, str]) -> str:
    drawn = [
        _figure(
            figures.accuracy_figure(show.values, kind),
            f"accuracy-{kind}",
            title,
            f"Accuracy before and after RL, {kind}",
        )
        for kind, title in (("greedy", "Greedy: the most likely answer"), ("sampled", "Sampled at temperature 1"))
    ]
    if not any(drawn):
        return absent("Not evaluated yet.")
    return f'<div class="pair">{"".join(drawn)}</div>{_accuracy_table(show, colours)}'


def _accuracy_table(show: Facts, colours: dict[str, str]) -> str:
    rows = []
    for name, colour in colours.items():
        for kind in ("greedy", "sampled"):
            cells = [key(colour, name), kind, show(f"branches/{name}/problems", "count")]
            sides = [f"branches/{name}/{when}/{kind}" for when in ("before", "after")]
            cells += [show(f"{side}/accuracy", "percent") + show.interval(side) for side in sides]
            cells += [show(f"{side}/{rate}", "percent", "–") for rate in ("format_rate", "stop_rate") for side in sides]
            rows.append(cells)
    moved = [_problem_by_problem(show, name) for name in colours]
    wide = ["before RL", "after RL", "boxed, before", "after", "stopped, before", "after"]
    return table(["branch", "answers", "problems", *wide], rows) + "".join(moved)


def _problem_by_problem(show: Facts, name: str) -> str:
    path = f"branches/{name}/greedy_problem_by_problem"
    if not show.has(path):
        return ""
    right, wrong, compared = (
        show(f"{path}/{field}", "count") for field in ("became_right", "became_wrong", "compared")
    )
    return (
        f'<p class="small"><b>{escape(name)}</b>, greedy, problem by problem: {right} became right and {wrong} became '
        f"wrong of {compared} (two-sided sign test: p = {show(f'{path}/p_value', 'tiny')}).</p>"
    )


def _length(record: Record, show: Facts) -> str:
    drawn = [
        _figure(figures.length_figure(show.values), "length", "Before and after RL, sampled", "Mean answer length"),
        _figure(
            figures.rl_figure(record, "response_length", "mean response length, tokens"),
            "length-rl", "During RL, sampled", "Mean response length by rollout step",
        ),
    ]  # fmt: skip
    return f'<div class="pair">{"".join(drawn)}</div>' if any(drawn) else absent("No answers yet.")


def _rl(record: Record, show: Facts, colours: dict[str, str]) -> str:
    if not record.wants_rl:
        return absent("This campaign has no RL stage.")
    drawn = [
        _figure(figures.rl_figure(record, "reward", "mean reward"), "reward", "Reward", "Mean reward by rollout step"),
        _figure(
            figures.rl_figure(record, "format", "share of responses", percent=True),
            "format", "Responses with a boxed answer", "Share of responses with a boxed answer by rollout step",
        ),
    ]  # fmt: skip
    if not any(drawn):
        return absent("No RL metrics yet.")
    rows = [
        [key(colour, name), *(show(f"branches/{name}/rl/{field}", kind) for field, kind in _RL_COLUMNS.values())]
        for name, colour in colours.items()
    ]
    caption = f'<p class="small">First and last: mean over {REWARD_WINDOW} rollout steps.</p>'
    return f'<div class="pair">{"".join(drawn)}</div>{table(["branch", *_RL_COLUMNS], rows)}{caption}'


_RL_COLUMNS = {
    "rollout steps": ("steps", "count"),
    "first reward": ("first_reward", "loss"),
    "last reward": ("last_reward", "loss"),
    "first length": ("first_response_length", "length"),
    "last length": ("last_response_length", "length"),
}


def _figure(figure: Any, name: str, title: str, label: str) -> str:
    if figure is None:
        return ""
    return f"<figure><h3>{escape(title)}</h3>{to_svg(figure, name, label)}</figure>"
