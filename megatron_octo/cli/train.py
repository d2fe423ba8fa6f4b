"""Training and branches on the command line."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from megatron_octo.cli.shared import AsJson, Overrides, print_json

branch_app = typer.Typer(no_args_is_help=True, help="Runs and their forks.")


def train(
    file: Path,
    overrides: Overrides = None,
    until: Annotated[str | None, typer.Option(help="stop, with a checkpoint, at this token position: 40K")] = None,
) -> None:
    """Train a run on this machine, or go on with it; starts as many processes as its layout needs.

    Example: octo train run.yaml parallel.tensor=2 --until 1M
    """
    from megatron_octo.train.api import train_run

    train_run(file, overrides or [], None if until is None else _tokens(until))


@branch_app.command("show")
def branch_show(directory: Path, as_json: AsJson = False) -> None:
    """Show a run's ancestors: who forked from whom, at which token, carrying what.

    Example: octo branch show runs/demo/long
    """
    from megatron_octo.schedule.fork import describe_lineage, read_lineage

    lineage = read_lineage(directory)
    print_json(lineage) if as_json else typer.echo(describe_lineage(lineage))


def _tokens(text: str) -> int:
    from megatron_octo.units import parse_tokens

    try:
        return parse_tokens(text)
    except ValueError as error:
        raise typer.BadParameter(str(error), param_hint="--until") from None
