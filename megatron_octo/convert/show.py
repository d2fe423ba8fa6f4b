"""What a model directory or checkpoint holds: names, shapes, dtypes, bytes and lineage, without loading a tensor."""

from __future__ import annotations

import math
import re
from pathlib import Path
from typing import Any

from megatron_octo.convert.megatron_io import CheckpointTensors, find_checkpoint
from megatron_octo.convert.safetensors_io import INDEX_FILE, SINGLE_FILE, SafetensorsDirectory, read_json
from megatron_octo.units import format_bytes

_BYTES = {"float64": 8, "float32": 4, "bfloat16": 2, "float16": 2}
_TORCH_NAMES = {"F64": "float64", "F32": "float32", "BF16": "bfloat16", "F16": "float16"}
_NUMBER = re.compile(r"(?<=layers\.)\d+(?=\.)")


def show(path: Path) -> dict[str, Any]:
    """Describe a Hugging Face directory, a checkpoint, or the latest checkpoint of a run.

    Args:
        path: any of the three.

    Returns:
        `format` ("hugging_face" or "torch_dist"), `path`, `tensors` (name -> shape, dtype, bytes),
        `parameters` and `bytes` in all, and `lineage` as far as the directory tells it.

    Raises:
        DataError: a damaged Hugging Face directory.
        CheckpointError: no checkpoint there.
    """
    if (path / INDEX_FILE).is_file() or (path / SINGLE_FILE).is_file():
        return _summary("hugging_face", path, _hugging_face(path), _certified_lineage(path))
    checkpoint = find_checkpoint(path)
    return _summary("torch_dist", checkpoint, _checkpoint(checkpoint), _run_lineage(checkpoint))


def format_tree(report: dict[str, Any]) -> str:
    """Write a description for people: one line a tensor, equal layers folded into one."""
    head = f"{report['path']}  {report['format']}, {report['parameters']:,} parameters, {format_bytes(report['bytes'])}"
    known = {key: value for key, value in report["lineage"].items() if not isinstance(value, (dict, list))}
    told = [f"  {key}: {value}" for key, value in known.items() if value is not None]
    return "\n".join([head, *told, *_folded(report["tensors"])])


def _hugging_face(path: Path) -> dict[str, dict[str, Any]]:
    with SafetensorsDirectory(path) as weights:
        dtypes = {name: _TORCH_NAMES.get(dtype, dtype) for name, dtype in weights.dtypes.items()}
        return {name: _entry(shape, dtypes[name]) for name, shape in weights.shapes().items()}


def _checkpoint(path: Path) -> dict[str, dict[str, Any]]:
    weights = CheckpointTensors(path)
    return {name: _entry(shape, weights.stored_dtype(name)) for name, shape in weights.shapes().items()}


def _entry(shape: tuple[int, ...], dtype: str) -> dict[str, Any]:
    return {"shape": list(shape), "dtype": dtype, "bytes": math.prod(shape) * _BYTES.get(dtype, 1)}


def _summary(kind: str, path: Path, tensors: dict[str, Any], lineage: dict[str, Any]) -> dict[str, Any]:
    return {
        "format": kind,
        "path": str(path),
        "parameters": sum(math.prod(tensor["shape"]) for tensor in tensors.values()),
        "bytes": sum(tensor["bytes"] for tensor in tensors.values()),
        "lineage": lineage,
        "tensors": tensors,
    }


def _certified_lineage(path: Path) -> dict[str, Any]:
    certificate = path / "certificate.json"
    return read_json(certificate).get("lineage", {}) if certificate.is_file() else {}


def _run_lineage(checkpoint: Path) -> dict[str, Any]:
    from megatron_octo.checkpoint.store import read_facts

    facts = read_facts(checkpoint)
    kept = {key: facts.get(key) for key in ("step", "run_tokens", "tokens", "lineage", "source")}
    return {"run": (facts.get("config") or {}).get("name"), **kept}


def _folded(tensors: dict[str, dict[str, Any]]) -> list[str]:
    groups: dict[tuple[str, tuple[int, ...], str], list[str]] = {}
    for name, tensor in tensors.items():
        key = (_NUMBER.sub("*", name), tuple(tensor["shape"]), tensor["dtype"])
        groups.setdefault(key, []).append(name)
    width = max((len(name) for name, _, _ in groups), default=0)
    lines = []
    for (name, shape, dtype), members in groups.items():
        size = sum(tensors[member]["bytes"] for member in members)
        count = f"x {len(members)}" if len(members) > 1 else ""
        lines.append(f"  {name:{width}}  {shape!s:18} {dtype:9} {count:6} {format_bytes(size)}")
    return lines
