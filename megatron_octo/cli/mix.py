"""`octo data forecast` and `octo data who`: what will be read, and who has read a document."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from megatron_octo.cli.shared import AsJson, Overrides, print_json
from megatron_octo.errors import ConfigError
from megatron_octo.units import format_tokens, parse_tokens


def forecast(
    file: Path,
    overrides: Overrides = None,
    tokens: Annotated[str | None, typer.Option(help="of the run, e.g. 20B; by default the run file's")] = None,
    as_json: AsJson = False,
) -> None:
    """Show what a run file or a mixture takes from each source, before anything runs: tokens, passes, exhaustion.

    Sizes are those of the indexed data where it is there, else those the corpora are published with. How a run changes
    its mixture on the way (data.phases) is shown at the end of recipes/mixtures/stable.yaml.

    Example: octo data forecast recipes/mixtures/long.yaml --tokens 20B
    """
    found = foresee(file, tokens, overrides)
    if as_json:
        print_json(found)
        return
    windows = f"{found['windows']:,} windows of {found['sequence_length']:,}"
    typer.echo(f"{found['file']}: {found['tokens']:,} tokens in {windows}")
    columns = "{:28} {:>7} {:>9} {:>13} {:>9} {:12} {:>7}  {}"
    typer.echo(columns.format("source", "share", "tokens", "windows", "has", "known from", "passes", "read through at"))
    for row in found["sources"]:
        typer.echo(columns.format(*_forecast_columns(row)).rstrip())
    for note in found["notes"]:
        typer.echo(f"note: {note}")


def foresee(file: Path, tokens: str | None, overrides: list[str] | None = None) -> dict[str, Any]:
    """What a run or a mixture reads, its tokens as people write them; see `forecast_file`.

    Raises:
        ConfigError: the tokens are no number, or the file is wrong.
    """
    from megatron_octo.train.forecast import forecast_file

    try:
        wanted = None if tokens is None else parse_tokens(tokens)
    except ValueError as error:
        raise ConfigError(f"--tokens: {error}", fix="give the tokens of the run") from None
    return forecast_file(file, wanted, overrides)


def _forecast_columns(row: dict[str, Any]) -> list[str]:
    size = "-" if row["size"] is None else format_tokens(row["size"])
    passes = "-" if row["passes"] is None else f"{row['passes']:.3g}"
    end = row["exhausted"]
    through = "" if end is None else "before this run" if end < 0 else f"{format_tokens(end)} tokens"
    share, taken = f"{row['share']:.2%}", format_tokens(row["tokens"])
    return [row["source"], share, taken, f"{row['windows']:,}", size, row["known"], passes, through]


def who(
    document: Annotated[str | None, typer.Argument(help="its id: CORPUS/FILE:LINE")] = None,
    run: Annotated[Path, typer.Option(help="run directory; its ancestors and branches are asked too")] = ...,
    index: Annotated[int | None, typer.Option(min=0, help="its place in the pair, where no table has ids")] = None,
    source: Annotated[str | None, typer.Option(help="name of its source in the run's mixtures")] = None,
    as_json: AsJson = False,
) -> None:
    """Answer which steps of a run, of its ancestors and of its branches read a document.

    Example: octo data who web/part-0001.jsonl:17 --run runs/stable
    """
    from megatron_octo.train.ledger import who as ask

    if (document is None) == (index is None):
        raise ConfigError("name a document either by its id or by --index", fix="give one of the two")
    found = ask(run, document, index, source)
    if as_json:
        print_json(found)
        return
    for one in (found, *found["others"]):
        _tell_readings(one)


def _tell_readings(found: dict[str, Any]) -> None:
    name = found["document"] or f"document {found['index']}"
    typer.echo(f"{name}: {found['tokens']:,} tokens, document {found['index']} of {found['source']}")
    for one in found["runs"]:
        if not one["readings"]:
            typer.echo(f"{one['run']} ({one['state']}): {one['note'] or 'no step reads it'}")
            continue
        typer.echo(f"{one['run']} ({one['state']}):")
        for reading in one["readings"]:
            at = format_tokens(reading["tokens"])
            typer.echo(
                f"  step {reading['step']:,} (at {at} tokens), pass {reading['epoch'] + 1}, window "
                f"{reading['window']:,}: {reading['state']}"
            )
