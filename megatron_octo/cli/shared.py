"""What commands of every room share: options, and how facts are printed."""

from __future__ import annotations

import json
from typing import Annotated, Any

import typer

Overrides = Annotated[list[str] | None, typer.Argument(help="dotted.key=value overrides")]
AsJson = Annotated[bool, typer.Option("--json", help="print JSON for machines")]


def print_facts(facts: dict[str, Any], as_json: bool) -> None:
    """Print facts, one a line, or as JSON."""
    if as_json:
        print_json(facts)
        return
    for key, value in facts.items():
        typer.echo(f"{key:24} {value}")


def print_json(facts: Any) -> None:
    """Print a value as JSON."""
    typer.echo(json.dumps(facts, indent=2, default=str))
