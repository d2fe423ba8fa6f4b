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
    check_layout: Annotated[
        bool, typer.Option("--check-layout", help="train nothing: compare the layout, at tiny width, with one process")
    ] = False,
    nproc: Annotated[
        int | None, typer.Option(min=1, help="processes: data parallelism becomes what tensor, pipeline, context leave")
    ] = None,
    as_json: Annotated[
        bool, typer.Option("--json", help="with --dry-run or --check-layout: print JSON for machines")
    ] = False,
) -> None:
    """Train a run on this machine, or go on with it; starts as many processes as its layout needs.

    Run files under recipes/runs/ come with the package.

    --check-layout answers whether a difference between layouts is normal: it trains a tiny model of the run's family
    in its layout and in one process, and holds the difference against what rounding alone produces (exit code 7 where
    rounding does not explain it).

    Example: octo train run.yaml parallel.tensor=2 --until 1M

    Example: octo train recipes/runs/llama32_3b_stable_64xh100_fp8.yaml --dry-run

    Example: octo train run.yaml --nproc 8 --check-layout
    """
    if as_json and not (dry_run or check_layout):
        rule = "a run that trains writes its facts to metrics.jsonl"
        raise ConfigError("--json without --dry-run or --check-layout", rule, "add one of the two")
    position = None if until is None else _tokens(until)
    from megatron_octo.train.api import spread_over, train_run

    overrides = overrides or []
    if nproc is not None:
        overrides = spread_over(file, overrides, nproc)
    if dry_run:
        from megatron_octo.cli.dry_run import show_dry_run

        show_dry_run(file, overrides, as_json)
    elif check_layout:
        from megatron_octo.cli.check_layout import show_check_layout

        show_check_layout(file, overrides, as_json)
    else:
        train_run(file, overrides, position)


def _tokens(text: str) -> int:
    from megatron_octo.units import parse_tokens

    try:
        return parse_tokens(text)
    except ValueError as error:
        raise ConfigError(f"--until: {error}", fix="give the position in tokens of this run") from None
