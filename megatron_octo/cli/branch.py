"""Runs and their forks on the command line."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from megatron_octo.cli.shared import AsJson, print_json

if TYPE_CHECKING:
    from megatron_octo.checkpoint.family import Member

app = typer.Typer(no_args_is_help=True, help="Runs and their forks.")

_COLOURS = {"training": "yellow", "finished": "green", "stopped": "magenta", "missing": "red"}


@app.command("show")
def show(directory: Path, as_json: AsJson = False) -> None:
    """Show the tree of runs: who forked from whom, at which token, carrying what, and how far each is.

    DIRECTORY is a run directory (its whole family is shown) or holds run directories (every tree below it is).

    Example: octo branch show runs/demo
    """
    from dataclasses import asdict

    from megatron_octo.checkpoint.family import families

    roots = families(directory)
    if as_json:
        print_json([asdict(root) for root in roots])
        return
    from rich.console import Console

    console = Console(highlight=False)
    if not console.is_terminal:
        console.width = 1000  # lines in a file or pipe are not broken
    for root in roots:
        console.print(_drawn(root))


def _drawn(member: Member, tree: Any = None) -> Any:
    from rich.tree import Tree

    label = _label(member)
    branch = Tree(label, guide_style="dim") if tree is None else tree.add(label)
    for child in member.children:
        _drawn(child, branch)
    return branch


def _label(member: Member) -> Any:
    from rich.text import Text

    from megatron_octo.units import format_tokens

    label = Text(member.run, style="bold reverse" if member.asked else "bold")
    if member.checkpoint is not None:
        label.append(f"  from {format_tokens(member.position)} tokens", style="not bold not reverse")
    if member.tokens is not None:
        of = "" if member.planned in (None, member.tokens) else f" of {format_tokens(member.planned)}"
        label.append(f"  {format_tokens(member.tokens)}{of} own tokens", style="not bold not reverse")
    label.append(f"  {member.state}", style=f"not bold not reverse {_COLOURS[member.state]}")
    for line in _lines(member):
        label.append(f"\n{line}", style="not bold not reverse dim")
    return label


def _lines(member: Member) -> list[str]:
    lines = []
    if member.carried is not None:
        kept = member.carried
        moments = "Adam's moments" if kept.get("moments") else "no moments"
        lines.append(
            f"carried: weights, {moments}; data {kept.get('data')}; random numbers: {kept.get('rng')}; "
            f"learning rate at the seam {member.learning_rate:.6g}"
        )
    if member.checkpoint is not None:
        loose = "" if member.pinned or member.state == "missing" else ", not kept for it: its parent has no record"
        lines.append(f"left from {member.checkpoint}{loose}")
    if member.directory is not None:
        lines.append(f"not at {member.directory}" if member.state == "missing" else member.directory)
    if member.problem is not None:
        lines.append(f"problem: {member.problem}")
    return lines
