"""What commands of every room share: options, and how facts are printed."""

from __future__ import annotations

import json
from typing import Annotated, Any

import typer

Overrides = Annotated[list[str] | None, typer.Argument(help="dotted.key=value overrides")]
AsJson = Annotated[bool, typer.Option("--json", help="print JSON for machines")]


def print_facts(facts: dict[str, Any], as_json: bool) -> None:
    """Print facts, one a line, or as JSON; of nested ones each has a line of its own."""
    if as_json:
        print_json(facts)
        return
    for key, value in facts.items():
        if isinstance(value, dict):
            print_facts({f"{key}.{name}": item for name, item in value.items()}, as_json)
        elif isinstance(value, list) and value and isinstance(value[0], dict):
            for item in value:
                typer.echo(f"{key:24} {'  '.join(f'{name} {shown!r}' for name, shown in item.items())}")
        else:
            typer.echo(f"{key:24} {value}")


def print_json(facts: Any) -> None:
    """Print a value as JSON."""
    typer.echo(json.dumps(facts, indent=2, default=str))
