"""What `octo train --check-layout` prints."""

from __future__ import annotations

from pathlib import Path

import typer

from megatron_octo.cli.shared import print_json
from megatron_octo.train.check_layout import LayoutReport, check_layout


def show_check_layout(file: Path, overrides: list[str], as_json: bool) -> None:
    """Check a run file's layout and print the findings.

    Raises:
        OctoError: a mistake in the file, or a layout that does not train the same model.
    """
    from megatron_octo.train.api import load_run

    report = check_layout(load_run(file, overrides))
    print_json(report.facts()) if as_json else _print_table(report)
    report.raise_if_not_normal()


def _print_table(report: LayoutReport) -> None:
    from rich.console import Console
    from rich.table import Table

    title = f"{report.layout}, {report.processes} processes, {report.steps} steps: {report.tiny}"
    table = Table(title=title, caption="relative differences from one process")
    table.add_column("quantity", no_wrap=True)
    for name in ("rounding", "normal to", "observed", "step"):
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("verdict", no_wrap=True)
    for one in report.findings:
        figures = [f"{value:.1e}" for value in (one.rounding, one.allowed, one.observed)]
        verdict = "normal" if one.normal else "[bold red]NOT normal"
        table.add_row(f"{one.precision} {one.quantity}", *figures, str(one.step), verdict)
    Console().print(table)
    for note in report.left_out:
        typer.echo(f"note: {note}")
    if report.normal:
        typer.echo(report.verdict())
