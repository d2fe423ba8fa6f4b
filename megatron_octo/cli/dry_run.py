"""How the facts of a dry run are shown."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from megatron_octo.cli.shared import print_json
from megatron_octo.units import format_bytes, format_tokens

_PARTS = {
    "weights": "weights", "gradients": "gradients", "optimizer": "optimizer", "fp8_copies": "FP8 copies",
    "activations": "activations*", "logits": "logits*", "total": "total*",
}  # fmt: skip
_SHOWN = 4  # pipeline stages that fit beside each other; of more, the first, the heaviest and the last are shown


def show_dry_run(file: Path, overrides: list[str], as_json: bool) -> None:
    """Rehearse a run and print what was found, as tables or as JSON."""
    from megatron_octo.train.api import load_run
    from megatron_octo.train.dry_run import dry_run

    facts = dry_run(load_run(file, overrides))
    if as_json:
        print_json(facts)
        return
    from rich.console import Console

    console = Console(highlight=False, markup=False)
    if not console.is_terminal:
        console = Console(highlight=False, markup=False, width=120)
    for part in (_summary(facts), _memory(facts), _sources(facts)):
        console.print(part)
    notes = [f"* estimates: {facts['conventions']['activations']}", f"FLOPs: {facts['conventions']['flops']}"]
    console.print(*notes, *_unchecked(facts), sep="\n")


def _summary(facts: dict[str, Any]) -> Any:
    from rich.table import Table

    parameters, saved = facts["parameters"], facts["checkpoints"]
    padding = f" + {parameters['padding']:,} of padding" if parameters["padding"] else ""
    table, count = Table.grid(padding=(0, 2)), facts["processes"]
    for name, value in {
        "run": f"{facts['run']}: {facts['layout']}" + (f", {count} processes" if count > 1 else ""),
        "start": facts["start"],
        "parameters": f"{parameters['published']:,}{padding}; {parameters['heaviest_rank']:,} on the heaviest rank",
        "FLOPs per token": f"{facts['flops_per_token']:.4g}; {facts['flops_per_token'] * facts['tokens']:.3g} in all",
        "steps": f"{facts['steps']:,} of {facts['tokens_per_step']:,} tokens, {format_tokens(facts['tokens'])} in all; "
        f"{facts['micro_batches']} micro-batches a step and rank",
        "checkpoints": f"{saved['saved']} saved, {saved['kept']} kept: {format_bytes(saved['bytes_each'])} each, "
        f"{format_bytes(saved['bytes_kept'])} in the end",
    }.items():
        table.add_row(name, value)
    return table


def _memory(facts: dict[str, Any]) -> Any:
    from rich.table import Table

    stages, heaviest = facts["stages"], facts["heaviest_stage"]
    numbers = range(len(stages)) if len(stages) <= _SHOWN else sorted({0, heaviest, len(stages) - 1})
    title = "Memory of a rank" + ("" if len(stages) == 1 else f", of {len(stages)} pipeline stages")
    table = Table("", title=title, title_justify="left")
    for number in numbers:
        name = "each rank" if len(stages) == 1 else f"stage {number}" + (", heaviest" if number == heaviest else "")
        table.add_column(name, justify="right")
    for key in ("layers", "parameters"):
        table.add_row(key, *(f"{stages[number][key]:,}" for number in numbers))
    for key, name in _PARTS.items():
        if any(stage[key] for stage in stages):
            table.add_row(name, *(format_bytes(stages[number][key]) for number in numbers))
    return table


def _sources(facts: dict[str, Any]) -> Any:
    from rich.table import Table

    length = facts["config"]["data"]["sequence_length"]
    table = Table(title=f"What is read, in windows of {length:,} tokens", title_justify="left")
    table.add_column("source")
    for name in ("share", "windows", "tokens", "passes"):
        table.add_column(name, justify="right")
    for need in facts["sources"]:
        passes = "?" if need["passes"] is None else f"{need['passes']:.3g}"
        tokens = format_tokens(need["windows"] * length)
        table.add_row(need["source"], f"{need['share']:.4g}", f"{need['windows']:,}", tokens, passes)
    return table


def _unchecked(facts: dict[str, Any]) -> list[str]:
    return [*facts["remarks"], "not checked:", *(f"  {line}" for line in facts["not_checked"])]
