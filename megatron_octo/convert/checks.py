"""The checks of a certificate that compare files: each looks at one thing and answers in plain values.

`passed` says whether all is well, `faults` names what is not, in words; the rest are figures. How far the two
forward passes agree is another matter (`agreement`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING

from megatron_octo.checkpoint.tensors import Shape, TensorSource, read, row_blocks
from megatron_octo.config.load import differences
from megatron_octo.config.model import ModelConfig
from megatron_octo.convert.agreement import Facts, facts_of
from megatron_octo.convert.diagnose import diagnose
from megatron_octo.convert.hf_io import (
    CONFIG_FILE,
    TOKEN_FILES,
    different_files,
    end_of_text,
    read_model,
    tokenizer_facts,
)
from megatron_octo.convert.megatron_io import geometry
from megatron_octo.convert.rules import Geometry, Rule, Tied, VocabPadded
from megatron_octo.convert.shards import read_json
from megatron_octo.convert.tables import cover, megatron_shapes, shorten, source_shapes, stored_rules, table_of
from megatron_octo.convert.views import AsMegatron, Cast, same_bits
from megatron_octo.errors import OctoError
from megatron_octo.locations import Location

if TYPE_CHECKING:
    from torch import Tensor

_LOST = {
    "biases": (".bias",),
    "query and key norms": ("q_norm.weight", "k_norm.weight", "q_layernorm.weight", "k_layernorm.weight"),
}


def attempt(check: Callable[[], Facts]) -> Facts:
    """Make a check; a fault in its material is its answer and not the end."""
    try:
        return check()
    except OctoError as error:
        return facts_of([str(error)])


def check_config(directory: Location, model: ModelConfig) -> Facts:
    """`config.json` states the checkpoint's architecture, field by field."""
    return facts_of(differences(_comparable(model), _comparable(read_model(directory))))


def check_coverage(weights: TensorSource, model: ModelConfig, checkpoint: TensorSource | None = None) -> Facts:
    """The files hold every tensor of the model once and no other, and so does the checkpoint.

    Args:
        weights: the Hugging Face side.
        model: the architecture.
        checkpoint: the Megatron side, where it is at hand.
    """
    table, size = table_of(model.family), geometry(model)
    expected, inner = source_shapes(table, size), megatron_shapes(table, size)
    found = cover(expected, weights.shapes())
    faults = _name_coverage(expected, weights.shapes(), size)
    if checkpoint is not None:
        faults += [f"checkpoint: {fault}" for fault in _name_coverage(inner, checkpoint.shapes(), size)]
    return facts_of(
        faults,
        tensors=len(expected),
        covered=found.tensors,
        megatron_tensors=len(inner),
        missing=found.missing,
        extra=found.extra,
        misshapen=found.misshapen,
    )


def check_round_trip(
    weights: TensorSource, model: ModelConfig, checkpoint: TensorSource, dtype: str | None = None
) -> Facts:
    """The files' tensors, imported again, are the checkpoint's bit for bit, and all are finite.

    Args:
        weights: the Hugging Face side.
        model: the architecture.
        checkpoint: the Megatron side, as it is stored.
        dtype: torch's name of the dtype the export was rounded to, None if it was not.

    Raises:
        DataError: the files do not cover the model, so that nothing can be compared.
    """
    table, size = table_of(model.family), geometry(model)
    back = AsMegatron(table, size, weights)
    expected = Cast(checkpoint, dtype) if dtype else checkpoint
    cover(megatron_shapes(table, size), expected.shapes()).require(expected.where)
    faults, different, rules = [], 0, stored_rules(table, size)
    for rule in rules:
        same, finite = _compare(rule, size, expected, back)
        where = f"{rule.megatron} ({', '.join(rule.sources)})"
        if not same:
            different += 1
            faults.append(
                f"{rule.megatron} ({', '.join(rule.sources)}): {_name_difference(rule, size, checkpoint, back)}"
            )
        if not finite:
            faults.append(f"{where}: not finite")
    return facts_of(faults, bitwise=not different, tensors=len(rules), different=different)


def check_vocabulary(directory: Location, model: ModelConfig, checkpoint: TensorSource | None = None) -> Facts:
    """Every token of the tokenizer has a row; what padding the checkpoint carries is told, and cut."""
    size, tokens = geometry(model), tokenizer_facts(directory).size
    fault = f"the tokenizer has {tokens} tokens, the embedding {model.vocabulary} rows"
    facts = facts_of(
        [fault] if tokens > model.vocabulary else [],
        published=model.vocabulary,
        tokenizer=tokens,
        padded=size.padded,
        padding_rows=size.padded - model.vocabulary,
    )
    if checkpoint is not None:
        padded = (r.megatron for r in table_of(model.family) if isinstance(r, VocabPadded) and r.stored(size))
        facts["padding_is_zero"] = all(not read(checkpoint, name, model.vocabulary).any() for name in padded)
    return facts


def check_tokenizer(directory: Location, trained_with: Location | None) -> Facts:
    """The tokenizer gives texts the ids that training gave them, and ends them with the same token.

    Args:
        directory: the model directory.
        trained_with: tokenizer directory of the run; None where it is not there any more, and nothing is compared.
    """
    if trained_with is None:
        return facts_of([], compared=False)
    faults = [f"{name} is not training's" for name in different_files(directory, trained_with, TOKEN_FILES)]
    ends = {"exported": tokenizer_facts(directory).eos, "trained": tokenizer_facts(trained_with).eos}
    if ends["exported"] != ends["trained"]:
        faults.append(f"texts end with token {ends['exported']}, in training with {ends['trained']}")
    return facts_of(faults, compared=True, end_of_text=ends)


def check_tied_head(directory: Location, weights: TensorSource, model: ModelConfig) -> Facts:
    """A tied model says so and stores no head; an untied one stores its own."""
    heads = [rule.source for rule in table_of(model.family) if isinstance(rule, Tied)]
    stored = [name for name in heads if name in weights.shapes()]
    stated = read_json(directory / CONFIG_FILE).get("tie_word_embeddings", False)
    faults = []
    if bool(stated) != model.tied_embeddings:
        faults.append(f"config.json says tie_word_embeddings {stated}, the model's is {model.tied_embeddings}")
    if model.tied_embeddings:
        faults += [f"{name} is stored, an untied copy of the tied head" for name in stored]
    else:
        faults += [f"{name} is missing, the model's own head" for name in heads if name not in stored]
    return facts_of(faults, tied=model.tied_embeddings, config=bool(stated), stored=stored)


def check_end_of_text(directory: Location) -> Facts:
    """Tokenizer, config.json and generation_config.json name the same end-of-text ids."""
    stated = end_of_text(directory)
    told = ", ".join(f"{place} {value}" for place, value in stated.items() if place != "agree")
    return facts_of([] if stated["agree"] else [f"the end of a text differs: {told}"], **stated)


def _compare(rule: Rule, size: Geometry, one: TensorSource, other: TensorSource) -> tuple[bool, bool]:
    """Whether a Megatron tensor is the same bits on two sides, and the second finite; padding is not looked at."""
    import torch

    name = rule.megatron
    if one.dtype(name) != other.dtype(name):
        return False, True
    dtype = getattr(torch, one.dtype(name))
    same = finite = True
    for start, rows in row_blocks((rule.shared_rows(size), *rule.rest(size)), dtype.itemsize):
        block = read(other, name, start, rows)
        same = same and same_bits(read(one, name, start, rows), block)
        finite = finite and _is_finite(block)
    return same, finite


def _name_difference(rule: Rule, size: Geometry, checkpoint: TensorSource, back: TensorSource) -> str:
    named = diagnose(rule, size, checkpoint, back) or "values differ"
    ours, theirs = checkpoint.dtype(rule.megatron), back.dtype(rule.megatron)
    return named if ours == theirs else f"{named} (stored as {ours}, exported as {theirs})"


def _is_finite(block: Tensor) -> bool:
    # A sum is not finite if any of its terms is not, and takes a tenth of the time of looking at each; it may
    # overflow too, so only then each is looked at.
    return bool(block.sum(dtype=block.dtype).isfinite()) or bool(block.isfinite().all())


def _name_coverage(expected: Mapping[str, Shape], found: Mapping[str, Shape], size: Geometry) -> list[str]:
    """What is wrong with a coverage, by the name of the fault where it has one."""
    coverage = cover(expected, found)
    missing, faults = coverage.missing, []
    for layer in range(size.layers):
        own = {name for name in expected if f".layers.{layer}." in name}
        if own <= set(missing):
            faults.append(f"layer {layer} dropped")
            missing = [name for name in missing if name not in own]
    for kind, ends in _LOST.items():
        lost = [name for name in missing if name.endswith(ends)]
        if lost:
            faults.append(f"{kind} lost: {shorten(lost)}")
            missing = [name for name in missing if name not in lost]
    rows = [name for name, shape in expected.items() if shape[0] == size.vocabulary != size.padded]
    padded = [name for name in rows if found.get(name, (0,))[0] == size.padded]
    if padded:
        faults.append(f"padded vocabulary rows left in: {shorten(padded)}")
    misshapen = [text for text in coverage.misshapen if text.split()[0] not in padded]
    rest = {"missing": missing, "extra": coverage.extra, "of another shape": misshapen}
    return faults + [f"{kind}: {shorten(names)}" for kind, names in rest.items() if names]


def _comparable(model: ModelConfig) -> Facts:
    """Plain fields; the spread of initial weights does not matter any more."""
    return {**model.model_dump(mode="json"), "init_std": None}
