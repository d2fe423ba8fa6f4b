"""What a model directory or checkpoint holds: names, shapes, dtypes, bytes and lineage, without loading a tensor."""

from __future__ import annotations

import math
import re
from typing import Any

from megatron_octo.checkpoint.store import FACTS, read_facts
from megatron_octo.checkpoint.tensors import TensorSource
from megatron_octo.convert.foreign import layout_at, section
from megatron_octo.convert.hf_io import open_weights
from megatron_octo.convert.megatron_io import find_checkpoint, weights_of
from megatron_octo.convert.opened import is_hugging_face
from megatron_octo.convert.shards import read_json
from megatron_octo.locations import Location, in_words
from megatron_octo.units import format_bytes

_BYTES = {"float64": 8, "float32": 4, "bfloat16": 2, "float16": 2, "int64": 8, "int32": 4, "int16": 2}
"""Of one element; everything else that is stored takes one byte."""
_NUMBER = re.compile(r"(?<=layers\.)\d+(?=\.)")


@in_words
def show(path: Location) -> dict[str, Any]:
    """Describe a Hugging Face directory, a checkpoint, or the latest checkpoint of a run.

    Args:
        path: any of the three, here or at a URL; of files only headers and lists are read.

    Returns:
        `format` ("hugging_face" or "torch_dist"), `path`, `tensors` (stored name -> shape, dtype, bytes),
        `parameters` and `bytes` in all, and `lineage` as far as the directory tells it.

    Raises:
        DataError: a damaged Hugging Face directory, or one of pickled weights.
        CheckpointError: no checkpoint there.
    """
    if is_hugging_face(path):
        return _summary("hugging_face", path, open_weights(path), _certified_lineage(path))
    from megatron_octo.checkpoint.dist import TorchDist

    checkpoint = find_checkpoint(path)
    return _summary("torch_dist", checkpoint, TorchDist(weights_of(checkpoint)), _run_lineage(checkpoint))


def format_tree(report: dict[str, Any]) -> str:
    """Write a description for people: one line a tensor, equal layers folded into one."""
    head = f"{report['path']}  {report['format']}, {report['parameters']:,} parameters, {format_bytes(report['bytes'])}"
    known = {key: value for key, value in report["lineage"].items() if not isinstance(value, (dict, list))}
    source = report["lineage"].get("source") or {}
    known["source"] = source.get("directory") or (source.get("checkpoint") or {}).get("checkpoint")
    told = [f"  {key}: {value}" for key, value in known.items() if value is not None]
    return "\n".join([head, *told, *_folded(report["tensors"])])


def _entry(source: TensorSource, name: str) -> dict[str, Any]:
    shape, dtype = source.shapes()[name], source.dtype(name)
    return {"shape": list(shape), "dtype": dtype, "bytes": math.prod(shape) * _BYTES.get(dtype, 1)}


def _summary(kind: str, path: Location, source: TensorSource, lineage: dict[str, Any]) -> dict[str, Any]:
    tensors = {name: _entry(source, name) for name in source.shapes()}
    return {
        "format": kind,
        "path": str(path),
        "parameters": sum(math.prod(tensor["shape"]) for tensor in tensors.values()),
        "bytes": sum(tensor["bytes"] for tensor in tensors.values()),
        "lineage": lineage,
        "tensors": tensors,
    }


def _certified_lineage(path: Location) -> dict[str, Any]:
    certificate = path / "certificate.json"
    return read_json(certificate).get("lineage", {}) if certificate.is_file() else {}


def _run_lineage(checkpoint: Location) -> dict[str, Any]:
    """What a checkpoint of ours tells; those of others name no run."""
    if not (checkpoint / FACTS).is_file():
        return {"layout": layout_at(checkpoint)}
    facts = read_facts(checkpoint)
    kept = {key: facts.get(key) for key in ("step", "run_tokens", "tokens", "moments", "lineage", "source")}
    return {
        "layout": facts.get("layout", "octo"),
        "run": section(facts, "config", checkpoint / FACTS).get("name"),
        **kept,
    }


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
