"""Which fault a wrongly converted tensor has, in words: what a certificate says beyond "differs".

Rows that only moved are found by a fingerprint of each row, taken block by block; what happened to values is read
off a sample of the rows that differ. Only a transposition needs the two tensors whole.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator
from itertools import permutations
from typing import TYPE_CHECKING, NamedTuple

from megatron_octo.checkpoint.tensors import TensorSource, read, row_blocks
from megatron_octo.convert.rules import FusedQKV, GatedPair, Geometry, Rule, VocabPadded
from megatron_octo.convert.views import Cast, same_bits

if TYPE_CHECKING:
    import torch
    from torch import Tensor

_SAMPLE = 64
"""Rows whose values are looked at."""

_QKV = ("query", "key", "value")


class _Compared(NamedTuple):
    """Both sides of one tensor after a pass over all rows that Hugging Face has too."""

    name: str
    expected: TensorSource
    found: TensorSource
    rounded: TensorSource  # `expected` in the dtype of `found`
    old: Tensor  # int64 [rows]: fingerprints of `rounded`
    new: Tensor  # int64 [rows]: fingerprints of `found`


def diagnose(rule: Rule, size: Geometry, expected: TensorSource, found: TensorSource) -> str | None:
    """Name the fault of a tensor that is not what it should be.

    Args:
        rule: the tensor's rule.
        size: the model's geometry.
        expected: the checkpoint; where its dtype is wider than that of `found`, its values rounded once are right.
        found: the converted directory under Megatron's names, each tensor of the same shape as in `expected`.

    Returns:
        The fault, e.g. "KV groups permuted", with the Hugging Face name before it where only part of a fused tensor
        has it; None for equal tensors and unknown faults.
    """
    import torch

    both = _compare(rule, size, expected, found)
    if torch.equal(both.old, both.new):
        return None
    moved = _moved(rule, size, both)
    if moved:
        return moved
    parts = _parts(rule, size)
    wrong = [index for index, part in enumerate(parts) if not torch.equal(both.old[part], both.new[part])]
    faults = {rule.sources[index]: _fault_of_part(rule, size, both, parts[index]) for index in wrong}
    told = {name: words for name, words in faults.items() if words}
    if len(told) == len(parts) and len(set(told.values())) == 1:
        return next(iter(told.values()))
    return "; ".join(f"{name}: {words}" for name, words in told.items()) or None


def _compare(rule: Rule, size: Geometry, expected: TensorSource, found: TensorSource) -> _Compared:
    name = rule.megatron
    rounded = Cast(expected, found.dtype(name))
    shape = (rule.shared_rows(size), *rule.rest(size))
    return _Compared(name, expected, found, rounded, *(_fingerprints(side, name, shape) for side in (rounded, found)))


def _fingerprints(source: TensorSource, name: str, shape: tuple[int, ...]) -> Tensor:
    """A 64-bit hash of each row: int64 [rows]."""
    import torch

    blocks = row_blocks(shape, getattr(torch, source.dtype(name)).itemsize)
    return torch.cat([_hash(read(source, name, *block)) for block in blocks])


def _hash(rows: Tensor) -> Tensor:
    import torch

    raw = rows.reshape(len(rows), -1).view(torch.uint8).numpy()
    hashes = bytearray().join(hashlib.blake2b(row, digest_size=8).digest() for row in raw)
    return torch.frombuffer(hashes, dtype=torch.int64)


def _parts(rule: Rule, size: Geometry) -> list[Tensor]:
    """Row numbers in the Megatron tensor of each Hugging Face tensor's rows, in their order there."""
    import torch

    parts: list[list[Tensor]] = [[] for _ in rule.sources]
    at = 0
    for rows in rule.rows(size):
        if rows.source is not None:
            parts[rows.source].append(torch.arange(at, at + rows.count))
        at += rows.count
    return [torch.cat(part) for part in parts]


def _moved(rule: Rule, size: Geometry, both: _Compared) -> str | None:
    """The name of a wrong order of otherwise right rows."""
    import torch

    for words, order in _wrong_orders(rule, size):
        if any(torch.equal(both.new, both.old[index]) for index in (order, order.argsort())):
            return words
    return _regrouped(rule, size, both) if isinstance(rule, FusedQKV) else None


def _wrong_orders(rule: Rule, size: Geometry) -> Iterator[tuple[str, Tensor]]:
    """Known mistakes in words, and which row of the right tensor each row then is (or the other way round)."""
    import torch

    rows = torch.arange(rule.shared_rows(size))
    if isinstance(rule, GatedPair):
        halves = rows.view(2, size.ffn)
        yield "gate and up swapped", halves.flip(0).flatten()
        yield "gate and up interleaved", halves.T.flatten()
    if isinstance(rule, FusedQKV):
        widths = [size.heads // size.groups * size.dim, size.dim, size.dim]
        for order in list(permutations(range(3)))[1:]:
            cut = rows.view(size.groups, -1).split([widths[part] for part in order], dim=1)
            moved = [name for index, name in enumerate(_QKV) if order[index] != index]
            words = " and ".join(moved) + " swapped" if len(moved) == 2 else "query, key and value in another order"
            yield words, torch.cat([cut[order.index(part)] for part in range(3)], dim=1).flatten()
        yield "query, key and value not grouped by KV group", torch.cat(_parts(rule, size))
        if size.dim % 2 == 0:
            heads = rows.view(size.groups, -1, size.dim).clone()
            heads[:, :-1] = heads[:, :-1].unflatten(2, (2, -1)).transpose(2, 3).flatten(2)
            yield "query and key in the other RoPE order (halves and pairs confused)", heads.flatten()


def _regrouped(rule: FusedQKV, size: Geometry, both: _Compared) -> str | None:
    """Whole KV groups, or whole query heads, in each other's place."""
    parts = [(both.old[part], both.new[part]) for part in _parts(rule, size)]
    if all(_permuted(old, new, size.groups) for old, new in parts):
        moved = [name for name, (old, new) in zip(_QKV, parts, strict=True) if not old.equal(new)]
        return "KV groups permuted" if len(moved) == 3 else f"KV groups permuted (of {' and '.join(moved)})"
    if all(old.equal(new) for old, new in parts[1:]) and _permuted(*parts[0], size.heads):
        return "query heads permuted"
    return None


def _permuted(old: Tensor, new: Tensor, blocks: int) -> bool:
    """Whether one row of equal blocks is a permutation of the other."""
    return sorted(old.view(blocks, -1).tolist()) == sorted(new.view(blocks, -1).tolist())


def _fault_of_part(rule: Rule, size: Geometry, both: _Compared, part: Tensor) -> str | None:
    """What happened to the rows of one Hugging Face tensor, `part` being their numbers in the Megatron tensor."""
    import torch

    wrong = part[both.old[part] != both.new[part]]
    sample = wrong[torch.linspace(0, len(wrong) - 1, min(_SAMPLE, len(wrong))).long()]
    right, values = _rows(both.rounded, both.name, sample), _rows(both.found, both.name, sample)
    zeros = both.new[part] == _hash(torch.zeros_like(values[:1]))
    if bool(zeros[both.old[part] != both.new[part]].all()):
        return "all zeros" if bool(zeros.all()) else f"{len(wrong)} of {len(part)} rows are zeros"
    if len(wrong) == 1 and (words := _one_value(right, values, int((part == wrong).nonzero()))):
        return words
    if not bool(values.isfinite().all()):
        return "holds values that are not finite"
    if layer := _other_layer(both, sample, values):
        return layer
    if words := _rounding(_rows(both.expected, both.name, sample), right, values):
        return words
    if sorted(both.old[part].tolist()) == sorted(both.new[part].tolist()):
        return "rows in another order"
    # Nobody transposes an embedding, and it is the one tensor too large to hold twice.
    if rule.rest(size) and not isinstance(rule, VocabPadded) and _transposed(both, part):
        return "transposed"
    return None


def _rows(source: TensorSource, name: str, index: Tensor) -> Tensor:
    """Rows by number, `[len(index), ...]`; of a vector, elements."""
    import torch

    if len(source.shapes()[name]) == 1:
        return read(source, name)[index]
    return torch.cat([read(source, name, row, 1) for row in index.tolist()])


def _one_value(right: Tensor, values: Tensor, row: int) -> str | None:
    """Damage to a single value of a tensor's only wrong row."""
    old, new = _bits(right).flatten(), _bits(values).flatten()
    wrong = (old != new).nonzero().flatten()
    if len(wrong) != 1:
        return None
    place = f"row {row}" if right.dim() == 1 else f"row {row}, column {int(wrong)}"
    changed = (int(old[wrong]) ^ int(new[wrong])) & (256 ** right.element_size() - 1)
    if changed.bit_count() == 1:
        return f"one bit differs ({place})"
    in_one_byte = sum(byte > 0 for byte in changed.to_bytes(right.element_size(), "little")) == 1
    return f"one {'byte' if in_one_byte else 'value'} differs ({place})"


def _other_layer(both: _Compared, sample: Tensor, values: Tensor) -> str | None:
    """The layer whose tensor the sampled rows are from."""
    layers = re.compile(re.sub(r"(?<=\\.layers\\.)\d+(?=\\.)", r"(\\d+)", re.escape(both.name)))
    for other in both.rounded.shapes():
        layer = layers.fullmatch(other)
        if layer and other != both.name and same_bits(_rows(both.rounded, other, sample), values):
            return f"rows of another layer ({layer[1]})"
    return None


def _rounding(original: Tensor, right: Tensor, values: Tensor) -> str | None:
    """Lost precision: `right` is `original` rounded once to the dtype of `values`."""
    import torch

    dtype = _name(values.dtype)
    narrowed = original.element_size() > values.element_size()
    for between in (torch.bfloat16, torch.float16):
        if same_bits(original.to(between).to(values.dtype), values):
            lost = f"rounded to {dtype} twice, through" if narrowed else "precision lost: rounded to"
            return f"{lost} {_name(between)}"
    if int((_bits(right) - _bits(values)).abs().max()) > 1:
        return None
    if narrowed and bool((values.double().abs() <= original.double().abs()).all()):
        return f"precision lost: cut to {dtype} instead of rounded"
    lost = "precision lost" if values.element_size() > 2 else f"rounded to {dtype} twice"
    return f"{lost}: values off by one in the last place"


def _transposed(both: _Compared, part: Tensor) -> bool:
    """Whether a matrix was written as its transpose, in the shape it should have."""
    right = read(both.rounded, both.name)[part]
    found = read(both.found, both.name)[part]
    return same_bits(right.T.reshape(found.shape), found) or same_bits(found.T.reshape(right.shape), right)


def _bits(tensor: Tensor) -> Tensor:
    """Values as the integers their bits are: neighbours of one sign differ by 1. int64, same shape."""
    import torch

    return tensor.view({2: torch.int16, 4: torch.int32, 8: torch.int64}[tensor.element_size()]).long()


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
