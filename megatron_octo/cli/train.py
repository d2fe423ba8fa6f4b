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
    dry_run: Annotated[bool, typer.Option("--dry-run", help="check and count all, start and write nothing")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="with --dry-run: print JSON for machines")] = False,
) -> None:
    """Train a run on this machine, or go on with it; starts as many processes as its layout needs.

    Run files under recipes/runs/ come with the package.

    Example: octo train run.yaml parallel.tensor=2 --until 1M

    Example: octo train recipes/runs/llama32_3b_stable_64xh100_fp8.yaml --dry-run
    """
    if as_json and not dry_run:
        raise typer.BadParameter("only a dry run prints facts: add --dry-run", param_hint="--json")
    if dry_run:
        from megatron_octo.cli.dry_run import show_dry_run

        show_dry_run(file, overrides or [], as_json)
        return
    from megatron_octo.train.api import train_run

    train_run(file, overrides or [], None if until is None else _tokens(until))


def _tokens(text: str) -> int:
    from megatron_octo.units import parse_tokens

    try:
        return parse_tokens(text)
    except ValueError as error:
        raise typer.BadParameter(str(error), param_hint="--until") from None
