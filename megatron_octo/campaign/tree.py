"""The campaign drawn as a tree of boxes: data, stable stage, and a line of stages for every branch."""

from __future__ import annotations

from html import escape

from megatron_octo.campaign.palette import STABLE
from megatron_octo.page.markup import Facts, badge, coloured, look


def campaign_tree(show: Facts, colours: dict[str, str], with_rl: bool) -> str:
    """The tree as HTML: left to right on a wide screen, top to bottom on a phone.

    Args:
        show: the report's values.
        colours: colour of every branch.
        with_rl: whether the campaign has an RL stage.
    """
    lines = "".join(_line(show, name, colour, with_rl) for name, colour in colours.items())
    stable = _training_node(show, "stable", "stable")
    return f'<div class="tree">{_data_node(show)}{stable}<div class="forks">{lines}</div></div>'


def _line(show: Facts, name: str, colour: str, with_rl: bool) -> str:
    nodes = [_training_node(show, name, name), _convert_node(show, name), _evaluate_node(show, name, "before", "base")]
    if with_rl:
        nodes += [_rl_node(show, name), _evaluate_node(show, name, "after", "rl")]
    return f'<div class="line" {coloured(colour)}>{"".join(nodes)}</div>'


def _node(title: str, there: bool, lines: list[str], style: str = "") -> str:
    body = "".join(f"<div>{line}</div>" for line in lines if line) if there else "<div>not yet</div>"
    return f'<div class="node{"" if there else " waiting"}" {style}><b>{escape(title)}</b>{body}</div>'


def _data_node(show: Facts) -> str:
    documents, tokens = show("data/documents", "count", "?"), show("data/tokens", "tokens", "?")
    return _node("data", show.has("data"), [f"{tokens} tokens", f"{documents} documents", _time(show, "data")])


def _training_node(show: Facts, stage: str, title: str) -> str:
    path = f"stages/{stage}"
    amount = f"{show(f'{path}/tokens', 'tokens')} tokens"
    if look(show.values, f"{path}/tokens") != look(show.values, f"{path}/planned_tokens") and _short(show, path):
        amount += f" of {show(f'{path}/planned_tokens', 'tokens')}"
    layouts = look(show.values, f"{path}/layouts") or []
    used = " → ".join(f'<span class="nb">{escape(stretch["label"])}</span>' for stretch in layouts)
    loss = f"loss {show(f'{path}/mean_last_loss', 'loss', 'unknown')}"
    style = coloured(STABLE) if stage == "stable" else ""
    return _node(title, show.has(f"{path}/tokens"), [amount, loss, used, _time(show, stage)], style)


def _short(show: Facts, path: str) -> bool:
    return (look(show.values, f"{path}/tokens") or 0) < (look(show.values, f"{path}/planned_tokens") or 0)


def _convert_node(show: Facts, name: str) -> str:
    valid = look(show.values, f"branches/{name}/certificate/valid")
    return _node("convert", valid is not None, [badge(valid, "certified", "INVALID", ""), _time(show, "convert")])


def _rl_node(show: Facts, name: str) -> str:
    path = f"branches/{name}/rl"
    steps = f"{show(f'{path}/steps', 'count')} rollout steps"
    reward = f"reward {show(f'{path}/first_reward', 'loss', '?')} → {show(f'{path}/last_reward', 'loss', '?')}"
    return _node("RL", show.has(path), [steps, reward, _time(show, "rl")])


def _evaluate_node(show: Facts, name: str, when: str, stage: str) -> str:
    path = f"branches/{name}/{when}"
    scores = [f"{show(f'{path}/{kind}/accuracy', 'percent')} {kind}" for kind in ("greedy", "sampled")]
    return _node("evaluate", show.has(path), [f"{when} RL", *scores, _time(show, f"evaluate-{stage}")])


def _time(show: Facts, stage: str) -> str:
    return (
        show(f"stages/{stage}/wall_seconds", "duration", "")
        if look(show.values, f"stages/{stage}/wall_seconds")
        else ""
    )
