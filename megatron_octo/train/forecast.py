"""`octo data forecast`: what a run file or a mixture will read, before anything runs. Needs no torch."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

from megatron_octo.config.blends import blends_of
from megatron_octo.config.load import apply_overrides, parse_config, read_yaml
from megatron_octo.config.mixture import DataConfig
from megatron_octo.config.recipes import find_recipe
from megatron_octo.config.run import RunConfig
from megatron_octo.data.mix.forecast import adapters_of, forecast
from megatron_octo.data.mix.made_with import check_one_tokenizer
from megatron_octo.data.mix.replace import decide, is_there
from megatron_octo.errors import CheckpointError, ConfigError
from megatron_octo.train.api import load_run
from megatron_octo.train.start import plan_start

_LENGTH = 8192  # the recipe's; a mixture alone states none


def forecast_file(path: Path, tokens: int | None = None, overrides: list[str] | None = None) -> dict[str, Any]:
    """Say what a run, or a mixture, reads of each source.

    Args:
        path: a run file, or a file with `data.mixture` alone; one under `recipes/` is found in the package.
        tokens: of the run; by default the run file's.
        overrides: `dotted.key=value` strings.

    Returns:
        tokens, windows, sequence_length, `sources` (one `Expected` each), `replaced` and `notes`.

    Raises:
        ConfigError: the file is wrong, or a mixture without a number of tokens.
        DataError: a pair that is there is damaged, or was built with another tokenizer.
    """
    file = find_recipe(path, "mixtures")
    values = apply_overrides(read_yaml(file), overrides or [])
    notes: list[str] = []
    first, blends = 0, None
    if values.keys() <= {"data"}:
        data = _mixture(values, path, notes)
        tokenizer = data.tokenizer if "tokenizer" in values["data"] else None
        if tokens is None:
            raise ConfigError(f"{path} is a mixture and no run", "it has no number of tokens", "add --tokens, e.g. 20B")
        windows = -(-tokens // data.sequence_length)
    else:
        run = load_run(file, overrides)
        data, first, blends = _of_run(run, notes)
        tokenizer = data.tokenizer
        windows = run.steps * run.batch.global_batch if tokens is None else -(-tokens // data.sequence_length)
    check_one_tokenizer(tokenizer, {f"data.mixture.{name}": source for name, source in data.paths.items()})
    here = [name for name, source in data.paths.items() if is_there(source)]
    if here and blends is None:
        data = decide(data)
    elif data.replace and not here:
        notes.append("none of the data is here, so no source counts as missing, and nothing is replaced")
    expected = forecast(data, blends or blends_of(data, first), first, first + windows)
    return {
        "file": str(path),
        "tokens": windows * data.sequence_length,
        "windows": windows,
        "sequence_length": data.sequence_length,
        "sources": [asdict(row) for row in expected],
        "replaced": data.replaced or {},
        "notes": [*notes, *_remarks(data, here)],
    }


def _mixture(values: dict[str, Any], path: Path, notes: list[str]) -> DataConfig:
    stated = values.get("data")
    if not isinstance(stated, dict):
        raise ConfigError(f"{path}: holds no data.mixture", "it is neither a run nor a mixture", "name one of them")
    if "sequence_length" not in stated:
        notes.append(f"windows of {_LENGTH:,} tokens, as in the recipe: a mixture alone states no sequence length")
    full = {"tokenizer": "tokenizer", "sequence_length": _LENGTH, **stated}
    return parse_config(DataConfig, full, f"{path}: data")


def _of_run(run: RunConfig, notes: list[str]) -> tuple[DataConfig, int, Any]:
    """What a run reads, the window it begins with, and its blends; a branch that reads on needs its parent for that."""
    if run.start.fork is None or run.start.fork.data == "fresh":
        return run.data, 0, None
    try:
        start = plan_start(run)
    except CheckpointError as error:
        notes.append(f"it reads on where its parent was, which cannot be seen: {error.what}; forecast as if from new")
        return run.data, 0, None
    return start.run.data, start.first_window, start.blends


def _remarks(data: DataConfig, here: list[str]) -> list[str]:
    lines = []
    for name, place in (data.replaced or {}).items():
        lines.append(f"{name} is missing: {place} takes its weight")
    sources = {name: source for _, mixture in data.mixtures for name, source in mixture.items()}
    for name in sorted(sources.keys() - set(here)):
        if here:
            lines.append(f"{name} is missing ({sources[name].path}) and nothing replaces it: a run would be refused")
        for adapter in adapters_of(name, sources[name]):
            if adapter.refused:
                lines.append(f"{name}: {adapter.name} cannot be read as published: {'; '.join(adapter.refused)}")
    return lines
