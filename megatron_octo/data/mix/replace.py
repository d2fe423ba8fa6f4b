"""What takes the place of a source that is missing: decided once, when a run begins, and written down."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from megatron_octo.config.mixture import DataConfig
from megatron_octo.data.index.pairs import bin_path, idx_path


def is_there(prefix: Path) -> bool:
    """Whether any file of a pair exists."""
    return bin_path(prefix).exists() or idx_path(prefix).exists()


def decide(data: DataConfig) -> DataConfig:
    """Look which sources are missing, and give their weight to those that `replace` names.

    A missing source without a replacement is left: opening it is an error. Where not one source is there, as on a
    machine that only plans, none counts as missing.
    """
    rules, there = data.replace or {}, {name for name, path in data.paths.items() if is_there(path)}
    missing = set(rules) - there if there else set()
    places = {}
    for name in missing:
        place = rules[name]
        while place in missing:
            place = rules[place]
        places[name] = place
    return apply(data, places)


def apply(data: DataConfig, places: Mapping[str, str]) -> DataConfig:
    """Take sources out of all mixtures and give their weight to others; those that are out already stay so.

    Args:
        data: what a run reads.
        places: source -> what takes its place. Only those count that `replace` names.
    """
    rules = data.replace or {}
    now = {name: place for name, place in sorted(places.items()) if name in rules}
    if not now:
        return data
    values = data.model_dump(mode="json")
    for part in (values, *(values["phases"] or [])):
        part["mixture"] = _moved(part["mixture"], now)
    values["replace"] = {name: place for name, place in rules.items() if name not in now} or None
    values["replaced"] = {**(data.replaced or {}), **now}
    return DataConfig.model_validate(values)


def _moved(mixture: dict[str, dict[str, Any]], places: Mapping[str, str]) -> dict[str, dict[str, Any]]:
    kept = {name: dict(source) for name, source in mixture.items() if name not in places}
    for name, place in places.items():
        if name in mixture:
            kept[place]["weight"] += mixture[name]["weight"]
    return kept
