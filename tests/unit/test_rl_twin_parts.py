"""Parts of the CPU twin, each alone: the patch table, the stand-in engine, the nursery's condition."""

from __future__ import annotations

import asyncio
import importlib
import sys
import threading
from pathlib import Path
from types import SimpleNamespace

import pytest

from megatron_octo.errors import EnvironmentProblem
from megatron_octo.rl.twin import nursery, patches
from megatron_octo.rl.twin.driver import PRELOADED, cause_of


def test_every_row_has_a_reason() -> None:
    assert len({patch.module for patch in patches.TABLE}) == len(patches.TABLE)
    assert all(len(patch.reason) > 30 for patch in patches.TABLE)


def test_a_row_is_applied_before_anyone_takes_a_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "rl_patched.py").write_text("def price():\n    return 100\n")
    (tmp_path / "rl_buyer.py").write_text("from rl_patched import price\n")
    row = patches.Patch("rl_patched", lambda module: setattr(module, "price", lambda: 1), "a reason")
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr(sys, "meta_path", [patches._Finder({"rl_patched": row}), *sys.meta_path])
    assert importlib.import_module("rl_buyer").price() == 1


def test_inert_where_a_gpu_is(monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    before, path, real = list(sys.meta_path), list(sys.path), torch.empty
    assert patches.install() is False
    assert (sys.meta_path, sys.path, torch.empty) == (before, path, real)


def test_the_device_reads_cpu_and_prints_a_number() -> None:
    device = patches._CpuDevice("cpu")
    assert device == "cpu" and f"cuda:{device}" == "cuda:0"


def test_no_fork_beside_a_thread(tmp_path: Path) -> None:
    stop = threading.Event()
    thread = threading.Thread(target=stop.wait)
    thread.start()
    try:
        with pytest.raises(EnvironmentProblem, match="threads run"):
            nursery.open_nursery(tmp_path / "socket", 0)
    finally:
        stop.set()
        thread.join()
    assert not (tmp_path / "socket").exists()


def test_ray_is_loaded_after_the_fork() -> None:
    assert not [name for name in PRELOADED if name.startswith(("ray", "vllm", "openrlhf.cli", "openrlhf.trainer"))]


def test_a_failures_cause_is_one_line() -> None:
    error = RuntimeError("in an actor\n  traceback\n")
    error.cause = ValueError("Traceback ...\n\nweights: wrong shape\n")
    assert cause_of(error) == "ValueError: weights: wrong shape"
    assert cause_of(KeyError()) == "KeyError: "


@pytest.fixture
def engine(monkeypatch: pytest.MonkeyPatch):
    """The stand-in engine over a decoder that answers each prompt with its length."""
    monkeypatch.syspath_prepend(str(patches.STAND_INS))
    module = importlib.import_module("vllm.engine")

    class Decoder:
        batches: list[int] = []

        def generate(self, prompts, most_tokens, temperature):
            self.batches.append(len(prompts))
            if most_tokens == 13:
                raise RuntimeError("out of luck")
            return [SimpleNamespace(tokens=[len(prompt)], stopped=len(prompt) < 9) for prompt in prompts]

    made = module.AsyncLLMEngine.__new__(module.AsyncLLMEngine)
    made._decoder, made._waiting, made._unfinished, made._task = Decoder(), [], 0, None
    Decoder.batches.clear()
    yield made, module
    for name in [name for name in sys.modules if name.split(".")[0] == "vllm"]:
        del sys.modules[name]


async def ask(engine, length: int, params):
    answers = [one async for one in engine.generate({"prompt_token_ids": [1] * length}, params, "id")]
    return answers[-1].outputs[0]


def test_requests_of_a_rollout_are_decoded_together(engine) -> None:
    made, module = engine

    async def rollout():
        params = module.SamplingParams(max_tokens=5)
        return await asyncio.gather(*[ask(made, length, params) for length in range(1, 21)])

    outputs = asyncio.run(rollout())
    assert [output.token_ids for output in outputs] == [[length] for length in range(1, 21)]
    assert [output.finish_reason for output in outputs] == ["stop"] * 8 + ["length"] * 12
    assert made._decoder.batches == [20] and made._unfinished == 0


def test_a_failure_reaches_who_asked_and_the_engine_goes_on(engine) -> None:
    made, module = engine

    async def two():
        bad, good = module.SamplingParams(max_tokens=13), module.SamplingParams(max_tokens=5)
        return await asyncio.gather(ask(made, 3, bad), ask(made, 4, good), return_exceptions=True)

    failed, answered = asyncio.run(two())
    assert isinstance(failed, RuntimeError) and answered.token_ids == [4]


def test_what_the_engine_cannot_do_is_refused(engine) -> None:
    with pytest.raises(NotImplementedError):
        engine[1].SamplingParams(top_p=0.9)
