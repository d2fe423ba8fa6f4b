"""The checks a certificate consists of: each compares one thing and answers in plain values with `passed`.

A check that cannot be made because its material is faulty answers `passed: false` and the `problem`.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megatron_octo.config.load import differences
from megatron_octo.config.run import ModelConfig
from megatron_octo.convert.hf_io import (
    CONFIG_FILE,
    TOKEN_FILES,
    different_files,
    end_of_text,
    read_model,
    tokenizer_facts,
)
from megatron_octo.convert.megatron_io import CheckpointTensors, geometry
from megatron_octo.convert.rules import Tied, VocabPadded, expand
from megatron_octo.convert.safetensors_io import SafetensorsDirectory, read_json
from megatron_octo.convert.walk import cover, import_tensors, megatron_shapes, source_shapes, table_of
from megatron_octo.errors import OctoError

if TYPE_CHECKING:
    from torch import Tensor

    from megatron_octo.convert.forward import Outputs

Facts = dict[str, Any]

LOGIT_TOLERANCE = 1e-4
"""Largest difference of a logit allowed, relative to the largest logit (at least 1). Tiny models show 1e-6."""
KL_TOLERANCE = 1e-6
"""Largest KL divergence of a position allowed, in nats."""
PHASE_TOLERANCE = 0.05
"""Largest RoPE angle difference allowed at the last position, in radians; two fp32 roundings at 2^17 make 0.02."""


def attempt(check: Callable[[], Facts]) -> Facts:
    """Make a check; a fault in its material is its answer and not the end."""
    try:
        return check()
    except OctoError as error:
        return {"passed": False, "problem": str(error)}


def check_config(directory: Path, model: ModelConfig) -> Facts:
    """`config.json` states the checkpoint's architecture, field by field."""
    stated = _comparable(read_model(directory))
    found = differences(_comparable(model), stated)
    return {"passed": not found, "different": found}


def check_coverage(directory: Path, model: ModelConfig) -> Facts:
    """The directory holds every tensor of the model once, and no other."""
    table, size = table_of(model.family), geometry(model)
    expected = source_shapes(table, size)
    with SafetensorsDirectory(directory) as weights:
        found = cover(expected, weights.shapes())
    return {
        "passed": found.complete,
        "tensors": len(expected),
        "covered": found.tensors,
        "megatron_tensors": len(megatron_shapes(table, size)),
        "missing": found.missing,
        "extra": found.extra,
        "misshapen": found.misshapen,
    }


def check_round_trip(directory: Path, model: ModelConfig, checkpoint: CheckpointTensors) -> Facts:
    """The directory's tensors, imported again, are the checkpoint's bit for bit, and all are finite."""
    table, size = table_of(model.family), geometry(model)
    rules = {rule.megatron: rule for rule in expand(table, size)}
    different, not_finite, count = [], [], 0
    with SafetensorsDirectory(directory) as weights:
        for name, tensor in import_tensors(table, size, weights):
            rule, original = rules[name], checkpoint.read(name)
            count += 1
            if not same_bits(rule.comparable(tensor, size), rule.comparable(original, size)):
                different.append(f"{name} ({', '.join(rule.sources)})")
            if not bool(tensor.isfinite().all()):
                not_finite.append(name)
    passed = not different and not not_finite
    return {
        "passed": passed, "bitwise": not different, "tensors": count, "different": different, "not_finite": not_finite,
    }  # fmt: skip


def check_vocabulary(directory: Path, model: ModelConfig, checkpoint: CheckpointTensors | None = None) -> Facts:
    """Every token of the tokenizer has a row; what padding the checkpoint carries is told, and cut."""
    size, tokens = geometry(model), tokenizer_facts(directory).size
    facts: Facts = {
        "passed": tokens <= model.vocabulary,
        "published": model.vocabulary,
        "tokenizer": tokens,
        "padded": size.padded,
        "padding_rows": size.padded - model.vocabulary,
    }
    if checkpoint is not None:
        padded = (r.megatron for r in table_of(model.family) if isinstance(r, VocabPadded) and r.stored(size))
        facts["padding_is_zero"] = all(not checkpoint.read(name)[model.vocabulary :].any() for name in padded)
    return facts


def check_tokenizer(directory: Path, trained_with: Path | None) -> Facts:
    """The tokenizer gives texts the ids that training gave them, and ends them with the same token.

    Args:
        directory: the model directory.
        trained_with: tokenizer directory of the run; None where it is not there any more, and nothing is compared.
    """
    if trained_with is None:
        return {"passed": True, "compared": False}
    different = different_files(directory, trained_with, TOKEN_FILES)
    ends = {"exported": tokenizer_facts(directory).eos, "trained": tokenizer_facts(trained_with).eos}
    passed = not different and ends["exported"] == ends["trained"]
    return {"passed": passed, "compared": True, "different": different, "end_of_text": ends}


def check_tied_head(directory: Path, model: ModelConfig) -> Facts:
    """A tied model says so and stores no head; an untied one stores its own."""
    heads = [rule.source for rule in table_of(model.family) if isinstance(rule, Tied)]
    with SafetensorsDirectory(directory) as weights:
        stored = [name for name in heads if name in weights.shapes()]
    stated = bool(read_json(directory / CONFIG_FILE).get("tie_word_embeddings", False))
    passed = stated == model.tied_embeddings and (not stored if model.tied_embeddings else stored == heads)
    return {"passed": passed, "tied": model.tied_embeddings, "config": stated, "stored": stored}


def check_end_of_text(directory: Path) -> Facts:
    """Tokenizer, config.json and generation_config.json name the same end-of-text id."""
    facts = end_of_text(directory)
    return {"passed": facts["agree"], **facts}


def check_rope(ours: Tensor, theirs: Tensor, model: ModelConfig) -> Facts:
    """The two RoPE tables agree up to the last position a model may use.

    Args:
        ours: Megatron's inverse frequencies, `[dim / 2]`.
        theirs: transformers', `[dim / 2]`.
        model: for the number of positions.
    """
    same_length = ours.shape == theirs.shape
    phase = float((ours.double() - theirs.double()).abs().max()) * model.max_positions if same_length else math.inf
    return {
        "passed": phase <= PHASE_TOLERANCE,
        "phase_difference": phase if same_length else None,
        "tolerance": PHASE_TOLERANCE,
        "at_position": model.max_positions,
        "frequencies": ours.tolist(),
    }


def check_logits(ours: Outputs, theirs: Outputs, prompts: list[list[int]]) -> Facts:
    """The same prompts give the same logits on both sides.

    The prediction of a position may differ only where the two best tokens are closer than the tolerance.
    """
    pairs = list(zip(ours.logits, theirs.logits, strict=True))
    scale = max(1.0, *(float(a.abs().max()) for a, _ in pairs))
    tolerance = LOGIT_TOLERANCE * scale
    worst = _largest([float((a - b).abs().max()) for a, b in pairs])
    divergence = _largest([_kl(a, b) for a, b in pairs])
    same = [a.argmax(-1) == b.argmax(-1) for a, b in pairs]
    decided = [_gap(a) > 2 * tolerance for a, _ in pairs]
    contradicted = sum(int((d & ~s).sum()) for s, d in zip(same, decided, strict=True))
    positions = sum(len(s) for s in same)
    return {
        "passed": worst <= tolerance and divergence <= KL_TOLERANCE and not contradicted,
        "max_abs_difference": worst,
        "tolerance": tolerance,
        "largest_logit": scale,
        "kl": divergence,
        "kl_tolerance": KL_TOLERANCE,
        "greedy_match": sum(int(s.sum()) for s in same) / positions,
        "contradicted_predictions": contradicted,
        "positions": positions,
        "prompt_lengths": [len(prompt) for prompt in prompts],
        "reference": [_sample(a) for a in ours.logits],
    }


def check_reference(theirs: Outputs, logits: Facts) -> Facts:
    """Logits of a directory against those its certificate recorded from the trainer."""
    recorded = [value for sample in logits["reference"] for value in sample]
    now = [value for tensor in theirs.logits for value in _sample(tensor)]
    worst = _largest([abs(a - b) for a, b in zip(now, recorded, strict=True)])
    return {"passed": worst <= logits["tolerance"], "max_abs_difference": worst, "tolerance": logits["tolerance"]}


def same_bits(one: Tensor, other: Tensor) -> bool:
    """Whether two tensors have the same dtype, shape and bits (so that NaN equals itself, and 0 is not -0)."""
    import torch

    if one.dtype != other.dtype or one.shape != other.shape:
        return False
    return torch.equal(one.contiguous().view(torch.uint8), other.contiguous().view(torch.uint8))


def _comparable(model: ModelConfig) -> Facts:
    """Plain fields, the head dimension always stated; the spread of initial weights does not matter any more."""
    return {**model.model_dump(mode="json"), "head_dim": model.dim, "init_std": None}


def _largest(values: list[float]) -> float:
    """The largest value; NaN if any is, so that no comparison with a limit passes."""
    return math.nan if any(math.isnan(value) for value in values) else max(values)


def _kl(ours: Tensor, theirs: Tensor) -> float:
    """Largest KL(ours || theirs) of a position, in nats; rounding may bring it just below 0."""
    from torch.nn import functional

    p, q = functional.log_softmax(ours.double(), -1), functional.log_softmax(theirs.double(), -1)
    return float((p.exp() * (p - q)).sum(-1).clamp(min=0).max())


def _gap(logits: Tensor) -> Tensor:
    """Distance of the best logit to the second best, by position."""
    best = logits.topk(2, dim=-1).values
    return best[:, 0] - best[:, 1]


def _sample(logits: Tensor) -> list[float]:
    """Sixteen logits of a prompt's last position, evenly spread over the vocabulary."""
    last = logits[-1]
    return [float(value) for value in last[:: max(1, len(last) // 16)][:16]]
