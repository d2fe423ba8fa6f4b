"""The estimate of activations and logits, against sums by hand; and the figures that run files quote."""

from __future__ import annotations

import re

import pytest
from precision_tools import run

from megatron_octo.config.recipes import RECIPES
from megatron_octo.model.memory import activation_bytes, logit_bytes, stored
from megatron_octo.train.api import load_run
from megatron_octo.train.dry_run import dry_run

TOKENS = 256
HIDDEN, HEADS, GROUPS, FFN = 256, 256, 128, 512  # widths; 8 heads and 4 groups of 32
LAYER = TOKENS * 2 * (4 * HIDDEN + 2 * HEADS + 2 * GROUPS + 3 * FFN)  # bf16
ENTRY = TOKENS * 2 * HIDDEN

CASES = {
    "one process": ({}, 0, 8 * LAYER),
    "two sequences": ({"batch": {"global_batch": 8, "micro_batch": 2}}, 0, 2 * 8 * LAYER),
    "fp32": ({"dtype": "fp32", "fp8": None}, 0, 2 * 8 * LAYER),
    "context": ({"parallel": {"context": 2}}, 0, 4 * LAYER),
    "tensor and sequence": ({"parallel": {"tensor": 2, "sequence": True}}, 0, 4 * LAYER),
    "tensor": ({"parallel": {"tensor": 2}}, 0, 8 * (LAYER // 2 + 2 * ENTRY)),
    "more ranks than groups": ({"parallel": {"tensor": 8, "sequence": True}}, 0, LAYER + TOKENS * 2 * 2 * GROUPS),
    "first stage": ({"parallel": {"pipeline": 4}}, 0, 4 * 2 * LAYER),
    "last stage": ({"parallel": {"pipeline": 4}}, 3, 2 * LAYER),
    "few micro-batches": ({"parallel": {"pipeline": 4, "data": 4}}, 0, 2 * 2 * LAYER),
    "interleaved": ({"parallel": {"pipeline": 2, "virtual_pipeline": 2}}, 0, (2 + 2 + 1) * 2 * LAYER),
    "full uniform": ({"recompute": {"kind": "full", "layers": 2}}, 0, 4 * ENTRY + 2 * LAYER),
    "full block": ({"recompute": {"kind": "full", "method": "block", "layers": 3}}, 0, 3 * ENTRY + 5 * LAYER + LAYER),
}


@pytest.mark.parametrize("name", CASES)
def test_activations_are_the_sum_by_hand(name):
    changes, stage, expected = CASES[name]
    assert activation_bytes(run(**changes), stage) == expected


def test_logits_are_two_in_the_models_type_and_one_in_fp32():
    assert logit_bytes(run(parallel={"tensor": 2})) == TOKENS * 1000 // 2 * (2 + 2 + 4)


@pytest.mark.parametrize(
    ("changes", "optimizer"),
    [({}, 12), ({"dtype": "fp32", "fp8": None}, 8), ({"parallel": {"data": 2, "context": 2}}, 3),
     ({"parallel": {"data": 2, "distributed_optimizer": False}}, 12)],
)  # fmt: skip
def test_moments_and_main_weights_are_shared_by_who_holds_the_same_weights(changes, optimizer):
    held = stored(run(**changes), 1000)
    assert (held.gradients, held.optimizer) == (4000, 1000 * optimizer)


@pytest.mark.parametrize("size", ["llama32_1b", "llama32_3b", "llama31_8b"])
def test_run_files_quote_what_the_dry_run_says(size):
    (part,) = (RECIPES / "runs" / "parts").glob(f"{size}_*.yaml")
    (file,) = (RECIPES / "runs").glob(f"{size}_stable_*.yaml")
    (stage,) = dry_run(load_run(file))["stages"]
    figures = part.read_text().split("`--dry-run`")[1].split("of 80;")[0]
    quoted = [float(number) for number in re.findall(r"\d+\.\d", figures)]
    parts = ("weights", "gradients", "optimizer", "fp8_copies", "activations", "logits", "total")
    assert quoted == pytest.approx([stage[name] / 2**30 for name in parts], abs=0.06)
