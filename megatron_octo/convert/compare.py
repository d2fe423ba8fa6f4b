"""Which tensors of two models differ, and by how much; the two may be of different formats.

Values are compared by their bits, in blocks, so that equal models cost one reading and no arithmetic. Only a tensor
that differs is read again and measured.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

from megatron_octo.checkpoint.tensors import Shape, TensorSource, read, row_blocks
from megatron_octo.config.load import differences
from megatron_octo.convert.opened import Opened, open_model
from megatron_octo.convert.rules import Tied, expand
from megatron_octo.convert.views import same_bits
from megatron_octo.errors import OctoError
from megatron_octo.locations import Location
from megatron_octo.progress import Progress

if TYPE_CHECKING:
    from torch import Tensor

_BLOCK_BYTES = 2**20
"""Of the values of one side; small enough that what is measured, as float64, stays in the processor's cache."""
_LINES = 40


def diff(a: Location, b: Location) -> dict[str, Any]:
    """Compare two models: their architecture and every tensor.

    Args:
        a: a Hugging Face directory, a checkpoint, or a run (its latest checkpoint).
        b: another. Two of one format are compared under its own names (a checkpoint's rows of padding included), two
            of different formats under Hugging Face's. A tied head that only one of them writes out is held against
            the other's embedding.

    Returns:
        `same` (nothing at all differs), `config` (fields that differ; None where an architecture is not known to us),
        `only_a` and `only_b` (names), `tensors` and a `summary`. A tensor that is not `same` has either `shape`
        (both), or `elements`, `differing` (their number), `max_abs` and `relative_l2` (to the norm of `a`) over finite
        differences, `not_finite` (number of the others), and `dtype` (both) where that differs.

    Raises:
        DataError: a damaged directory, or tensors that do not cover the model they are converted for.
        CheckpointError: no checkpoint there, or a damaged one.
        ConfigError: models of different formats, one of which has an architecture that cannot be converted.
    """
    one, other = open_model(a), open_model(b)
    mixed = (one.origin is None) != (other.origin is None)
    mine, theirs = (side.as_hugging_face() if mixed else side.tensors for side in (one, other))
    counterparts = _counterparts(mine.shapes(), theirs.shapes(), _tied(one) | _tied(other))
    tensors = {}
    with Progress("compare", len(counterparts), unit="tensors") as bar:
        for name, (left, right) in counterparts.items():
            tensors[name] = _compare(mine, left, theirs, right)
            bar.advance(1)
    config = _config(one, other)
    only = [[name for name in source.shapes() if name not in counterparts] for source in (mine, theirs)]
    return {
        "a": str(one.directory),
        "b": str(other.directory),
        "same": not config and not any(only) and all(facts["same"] for facts in tensors.values()),
        "config": config,
        "only_a": only[0],
        "only_b": only[1],
        "summary": _summary(tensors.values(), only),
        "tensors": tensors,
    }


def format_diff(report: dict[str, Any]) -> str:
    """Write a comparison for people: what differs, the largest relative difference first."""
    total = report["summary"]
    lines = [f"a: {report['a']}", f"b: {report['b']}"]
    if report["same"]:
        lines.append(f"same: {total['tensors']} tensors, bit for bit")
    else:
        counts = ", ".join(f"{total[key]} {key}" for key in ("same", "different", "missing"))
        lines.append(f"different: of {total['tensors']} tensors {counts}")
    if report["config"] is None:
        lines.append("  config: not compared, an architecture unknown here")
    lines += [f"  config: {field}" for field in report["config"] or ()]
    told = [f"  only in {side}: {name}" for side in "ab" for name in report[f"only_{side}"]]
    differing = [(name, facts) for name, facts in report["tensors"].items() if not facts["same"]]
    differing.sort(key=lambda pair: _weight(pair[1]), reverse=True)
    told += [f"  {name}: {_told(facts)}" for name, facts in differing]
    hidden = len(told) - _LINES
    return "\n".join(lines + told[:_LINES] + [f"  and {hidden} more, see --json"] * (hidden > 0))


def _tied(side: Opened) -> dict[str, str]:
    """Name of a head that is not stored -> name of the embedding it is; nothing where the model is not ours."""
    try:
        table, size = side.mapping
    except OctoError:
        return {}
    rules = (rule for rule in expand(table, size) if isinstance(rule, Tied) and not rule.stored(size))
    return {rule.source: rule.to for rule in rules}


def _counterparts(
    mine: Mapping[str, Shape], theirs: Mapping[str, Shape], tied: Mapping[str, str]
) -> dict[str, tuple[str, str]]:
    """Which tensor of one side is to be compared with which of the other."""
    pairs = {name: (name, name) for name in mine if name in theirs}
    for head, embedding in tied.items():
        if head in mine and embedding in theirs:
            pairs.setdefault(head, (head, embedding))
        elif head in theirs and embedding in mine:
            pairs.setdefault(head, (embedding, head))
    return pairs


def _compare(one: TensorSource, name: str, other: TensorSource, named: str) -> dict[str, Any]:
    shapes = tuple(one.shapes()[name]), tuple(other.shapes()[named])
    if shapes[0] != shapes[1]:
        return {"same": False, "shape": [list(shape) for shape in shapes]}
    dtypes = [one.dtype(name), other.dtype(named)]
    if dtypes[0] == dtypes[1] and all(same_bits(*pair) for pair in _blocks(one, name, other, named)):
        return {"same": True}
    facts = _measure(_blocks(one, name, other, named), math.prod(shapes[0]))
    return {"same": False, **facts} | ({"dtype": dtypes} if dtypes[0] != dtypes[1] else {})


def _blocks(one: TensorSource, name: str, other: TensorSource, named: str) -> Iterator[tuple[Tensor, Tensor]]:
    import torch

    widest = max(getattr(torch, dtype).itemsize for dtype in (one.dtype(name), other.dtype(named)))
    shape = tuple(one.shapes()[name]) or (1,)
    for start, count in row_blocks(shape, widest, _BLOCK_BYTES):
        yield read(one, name, start, count), read(other, named, start, count)


def _measure(blocks: Iterator[tuple[Tensor, Tensor]], elements: int) -> dict[str, Any]:
    import torch

    differing, not_finite, largest, squares, norm = 0, 0, 0.0, 0.0, 0.0
    for left, right in blocks:
        apart = _apart(left, right).view(-1)
        values = left.double().view(-1)
        gap = values - right.double().view(-1)
        differing += int(apart.count_nonzero())
        if not math.isfinite(largest_here := float(gap.abs().max())):
            not_finite += int((apart & ~gap.isfinite()).count_nonzero())
            gap[~gap.isfinite()], values[~values.isfinite()] = 0.0, 0.0
            largest_here = float(gap.abs().max())
        largest = max(largest, largest_here)
        squares += float(torch.dot(gap, gap))
        norm += float(torch.dot(values, values))
    # JSON knows no infinity; a difference to a tensor of zeros has no relative size.
    relative = math.sqrt(squares / norm) if norm else None if squares else 0.0
    return {
        "elements": elements, "differing": differing, "max_abs": largest, "relative_l2": relative,
        "not_finite": not_finite,
    }  # fmt: skip


def _apart(left: Tensor, right: Tensor) -> Tensor:
    """Where two tensors differ: in bits, or in value where their dtypes are not the same."""
    import torch

    if left.dtype != right.dtype:
        left, right = left.double(), right.double()
        return (left != right) & ~(left.isnan() & right.isnan())
    bits = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[left.dtype.itemsize]
    return left.view(bits) != right.view(bits)


def _config(one: Opened, other: Opened) -> list[str] | None:
    try:
        return differences(one.model.model_dump(mode="json"), other.model.model_dump(mode="json"))
    except OctoError:
        return None


def _summary(tensors: Any, only: list[list[str]]) -> dict[str, Any]:
    same = sum(facts["same"] for facts in tensors)
    missing = sum(map(len, only))
    return {
        "tensors": len(tensors) + missing,
        "same": same,
        "different": len(tensors) - same,
        "missing": missing,
        "differing_elements": sum(facts.get("differing", 0) for facts in tensors),
        "max_abs": max((facts.get("max_abs", 0.0) for facts in tensors), default=0.0),
    }


def _told(facts: dict[str, Any]) -> str:
    if "shape" in facts:
        return "shape {} against {}".format(*facts["shape"])
    told = f"{facts['differing']:,} of {facts['elements']:,} elements, max {facts['max_abs']:.3g}"
    if facts["relative_l2"] is not None:
        told += f", relative {facts['relative_l2']:.3g}"
    if facts["not_finite"]:
        told += f", {facts['not_finite']:,} not finite"
    return told + ("; {} against {}".format(*facts["dtype"]) if "dtype" in facts else "")


def _weight(facts: dict[str, Any]) -> float:
    """How far apart two tensors are, for sorting: what has no measure comes first."""
    relative = facts.get("relative_l2")
    return math.inf if relative is None or facts["not_finite"] else relative
