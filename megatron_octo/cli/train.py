"""Training on the command line."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from megatron_octo.cli.shared import Overrides


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


def _tokens(text: str) -> int:
    from megatron_octo.units import parse_tokens

    try:
        return parse_tokens(text)
    except ValueError as error:
        raise typer.BadParameter(str(error), param_hint="--until") from None
