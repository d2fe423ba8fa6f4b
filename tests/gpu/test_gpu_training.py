"""FP8 trainings on the card: losses, what really is in FP8, optimizers, and resuming bitwise."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch
from gpu_run import LAYERS, STEPS, Gpu, furthest

RECIPES = ("delayed", "tensorwise", "blockwise")
CLOSE = 0.02  # relative, any step's loss of FP8 against BF16
HALF = STEPS // 2


@pytest.fixture(scope="module")
def gpu(tmp_path_factory):
    return Gpu(tmp_path_factory.mktemp("gpu"))


@pytest.fixture(scope="module")
def bf16(gpu):
    losses, _ = gpu.train("bf16")
    assert losses[-1][0] < 0.9 * losses[0][0], "nothing is learnt: nothing can be compared"
    return losses


def fp8_in_layers(seen: list[bool]):
    """Note for each layer's forward pass whether TransformerEngine computes it in FP8."""

    def prepare(state) -> None:
        from transformer_engine.pytorch.quantization import FP8GlobalStateManager

        for layer in state.models[0].decoder.layers:
            # Inside the layer: contexts of ours are opened by its own forward.
            layer.self_attention.register_forward_pre_hook(
                lambda *_: seen.append(FP8GlobalStateManager.is_fp8_enabled())
            )

    return prepare


@pytest.mark.parametrize("recipe", RECIPES)
def test_each_recipe_trains_close_to_bf16_and_really_in_fp8(gpu, bf16, recipe):
    seen: list[bool] = []
    losses, _ = gpu.train(recipe, f"fp8.recipe={recipe}", prepare=fp8_in_layers(seen))
    assert all(seen) and len(seen) == LAYERS * STEPS * 2
    assert losses != bf16, "FP8 was asked for and BF16 computed"
    assert furthest(losses, bf16) < CLOSE


def test_local_layers_train_close_to_the_fused_ones(gpu, bf16):
    losses, _ = gpu.train("local", "transformer_impl=local")
    assert furthest(losses, bf16) < CLOSE


def test_first_and_last_layers_compute_in_bf16(gpu):
    seen: list[bool] = []
    asked = ("fp8.bf16_first_layers=1", "fp8.bf16_last_layers=1")
    gpu.train("ends", *asked, until=1, prepare=fp8_in_layers(seen))
    assert seen[:LAYERS] == [False, *[True] * (LAYERS - 2), False]


@pytest.mark.parametrize("recipe", RECIPES)
def test_parameters_in_fp8(gpu, bf16, recipe):
    from transformer_engine.pytorch import QuantizedTensor

    masters: dict[str, list[torch.Tensor]] = {}

    def note(name: str):
        def prepare(state) -> None:
            inner = state.optimizer.chained_optimizers[0]
            groups = inner.shard_fp32_from_float16_groups
            masters[name] = [master.clone() for group in groups for master in group]

        return prepare

    gpu.train(f"bf16-{recipe}", until=1, prepare=note("bf16"))
    losses, state = gpu.train(
        f"parameters-{recipe}", f"fp8.recipe={recipe}", "fp8.parameters=true", prepare=note("fp8")
    )
    linear = state.models[0].decoder.layers[0].mlp.linear_fc2
    assert isinstance(linear.weight, QuantizedTensor)
    # The optimizer starts from the drawn weights, not from their rounded copies.
    total = [sum(float(one.double().sum()) for one in masters[name]) for name in ("bf16", "fp8")]
    assert total[0] == pytest.approx(total[1], abs=1e-6)
    assert furthest(losses, bf16) < CLOSE


def test_weights_of_a_checkpoint_start_unrounded_with_parameters_in_fp8(gpu):
    def masters(state) -> None:
        inner = state.optimizer.chained_optimizers[0]
        sums.append(sum(float(m.double().sum()) for g in inner.shard_fp32_from_float16_groups for m in g))

    sums: list[float] = []
    gpu.train("origin", until=2)
    given = f"start.checkpoint={gpu.folder / 'origin'}"
    gpu.train("from-plain", given, until=1, prepare=masters)
    gpu.train("from-fp8", given, "fp8.parameters=true", until=1, prepare=masters)
    assert sums[0] == pytest.approx(sums[1], abs=1e-6)


def test_attention_in_fp8(gpu, bf16):
    losses, _ = gpu.train("attention", "fp8.recipe=delayed", "fp8.attention=true")
    assert furthest(losses, bf16) < CLOSE


OPTIMIZERS = ("transformer_engine", "torch", "apex")


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_the_optimizer_asked_for_is_the_one_that_steps_and_resumes_bitwise(gpu, bf16, name):
    from megatron_octo.runtime import accelerator

    if name == "apex" and (fault := accelerator.apex_problem(accelerator.look())):
        pytest.skip(fault[0])
    asked = f"optimizer.implementation={name}"
    whole, state = gpu.train(f"{name}-whole", asked)
    kind = type(state.optimizer.chained_optimizers[0].optimizer)
    assert kind.__module__.startswith("torch.optim" if name == "torch" else name)
    assert furthest(whole, bf16) < CLOSE
    gpu.train(f"{name}-halted", asked, until=HALF)
    halted, _ = gpu.train(f"{name}-halted", asked)
    assert halted == whole


def test_auto_takes_the_fused_one(gpu):
    _, state = gpu.train("auto", until=1)
    assert type(state.optimizer.chained_optimizers[0].optimizer).__name__ == "FusedAdam"


STATES = [[f"fp8.recipe={recipe}"] for recipe in RECIPES]
STATES += [[f"fp8.recipe={recipe}", "fp8.parameters=true"] for recipe in RECIPES]


@pytest.mark.parametrize("asked", STATES, ids=" ".join)
def test_a_run_saved_and_resumed_is_bitwise_the_uninterrupted_one(gpu, asked):
    name = f"resume-{len(asked)}-{asked[0].split('=')[1]}"
    whole, _ = gpu.train(f"{name}-whole", *asked)
    gpu.train(f"{name}-halted", *asked, until=HALF)
    halted, _ = gpu.train(f"{name}-halted", *asked)
    assert halted == whole


def test_the_command_trains_in_fp8(gpu):
    out = gpu.folder / "command"
    done = subprocess.run(
        [sys.executable, "-m", "megatron_octo.cli", "train", str(gpu.path), f"out={out}", "fp8={}"],
        capture_output=True,
        text=True,
        timeout=280,
        env=dict(os.environ),
    )
    assert done.returncode == 0, done.stderr
    assert len((out / "metrics.jsonl").read_text().splitlines()) == STEPS


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="tensor parallelism needs two GPUs")
@pytest.mark.parametrize("fp8", ["null", "{}"])
def test_overlapped_tensor_parallel_messages_change_no_loss_by_much(gpu, fp8):
    losses = []
    for overlap in ("false", "true"):
        out = gpu.folder / f"overlap-{overlap}-{fp8 == '{}'}"
        asked = [f"out={out}", f"fp8={fp8}", f"parallel={{tensor: 2, sequence: true, tp_comm_overlap: {overlap}}}"]
        done = subprocess.run(
            [sys.executable, "-m", "megatron_octo.cli", "train", str(gpu.path), *asked],
            capture_output=True,
            text=True,
            timeout=280,
        )
        assert done.returncode == 0, done.stderr
        import json

        lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
        losses.append([(line["loss"], line["grad_norm"]) for line in lines])
    assert furthest(*losses) < CLOSE
