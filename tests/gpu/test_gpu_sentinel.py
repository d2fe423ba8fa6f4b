"""The sentinel on real FP8: it changes nothing, and it finds a layer whose scale is wrong."""

from __future__ import annotations

import json

import pytest
from gpu_run import Gpu

RECIPES = ("delayed", "tensorwise", "blockwise")
WATCH = "every: 2, warmup: 2, patience: 2, loss_tolerance: 0.05, grad_tolerance: 0.5"


@pytest.fixture(scope="module")
def gpu(tmp_path_factory):
    return Gpu(tmp_path_factory.mktemp("sentinel"))


def record(gpu: Gpu, name: str) -> list[dict]:
    return [json.loads(line) for line in (gpu.folder / name / "sentinel.jsonl").read_text().splitlines()]


def spoil(number: int):
    """Let one layer's products use a scale that is far too large, so that their inputs saturate; BF16 has none."""

    def prepare(state) -> None:
        linear = state.models[0].decoder.layers[number].mlp.linear_fc2

        def before(module, _inputs) -> None:
            if "scaling_fwd" in module.fp8_meta:
                module.fp8_meta["scaling_fwd"].scale[0] = 1e6

        linear.register_forward_pre_hook(before)

    return prepare


@pytest.mark.parametrize("recipe", RECIPES)
def test_a_watched_run_is_bitwise_the_unwatched_one(gpu, recipe):
    plain, _ = gpu.train(f"{recipe}-plain", f"fp8.recipe={recipe}")
    watched, _ = gpu.train(f"{recipe}-watched", f"fp8={{recipe: {recipe}, sentinel: {{{WATCH}, action: warn}}}}")
    assert watched == plain
    lines = record(gpu, f"{recipe}-watched")
    assert len(lines) == 6
    # FP8 and BF16 do differ: both were computed, and no layer strays.
    assert all(0 < line["excess"] < 1 for line in lines)


def test_a_spoilt_layer_is_found_by_name_moved_and_stays_moved(gpu):
    asked = f"fp8={{recipe: delayed, sentinel: {{{WATCH}}}}}"
    gpu.train("spoilt", asked, until=6, prepare=spoil(2))
    lines = record(gpu, "spoilt")
    assert [line["moved"] for line in lines[:2]] == [[], [2]]
    assert lines[2]["excess"] < 1
    _, state = gpu.train("spoilt", asked, until=8, prepare=spoil(2))
    assert state.memory["sentinel"]["bf16"] == [2]
    assert record(gpu, "spoilt")[-1]["excess"] < 1
    whole, _ = gpu.train("spoilt-whole", asked, until=8, prepare=spoil(2))
    halted, _ = gpu.train("spoilt", asked, until=8, prepare=spoil(2))
    assert halted == whole


def test_layers_with_weights_in_fp8_can_be_moved(gpu):
    strict = "every: 2, patience: 1, loss_tolerance: 1.0e-9, grad_tolerance: 1.0e-9, action: run"
    losses, state = gpu.train("moved", f"fp8={{parameters: true, sentinel: {{{strict}}}}}", until=6)
    assert state.memory["sentinel"]["bf16"] == [0, 1, 2, 3]
    assert losses[-1][0] < losses[0][0]
