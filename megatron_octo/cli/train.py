"""Training on the command line."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from megatron_octo.cli.shared import Overrides
from megatron_octo.errors import ConfigError


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
        rule = "a run that trains writes its facts to metrics.jsonl"
        raise ConfigError("--json without --dry-run", rule, "add --dry-run")
    position = None if until is None else _tokens(until)
    if dry_run:
        from megatron_octo.cli.dry_run import show_dry_run

        show_dry_run(file, overrides or [], as_json)
        return
    from megatron_octo.train.api import train_run

    train_run(file, overrides or [], position)


def _tokens(text: str) -> int:
    from megatron_octo.units import parse_tokens

    try:
        return parse_tokens(text)
    except ValueError as error:
        raise ConfigError(f"--until: {error}", fix="give the position in tokens of this run") from None
