"""The training benchmark measures what it says: real steps in processes of their own, ratios round by round."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

TOOLS = Path(__file__).resolve().parents[2] / "tools"


@pytest.fixture(scope="module")
def bench() -> ModuleType:
    spec = importlib.util.spec_from_file_location("bench_train", TOOLS / "bench_train.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    yield module
    del sys.modules[spec.name]


def test_the_model_of_the_steps_has_ten_million_parameters(bench: ModuleType) -> None:
    from megatron_octo.config.model import ModelConfig
    from megatron_octo.model.facts import parameter_count

    assert parameter_count(ModelConfig(**bench.STEP_SHAPES["10m"]["model"])) == 10_490_112
    assert 50e6 < parameter_count(ModelConfig(**bench.SAVE_SHAPES["68m"]["model"])) < 100e6


def test_ratios_belong_to_one_round(bench: ModuleType) -> None:
    def costs(*wall: float) -> list:
        return [bench.Cost(value, 60.0) for value in wall]

    steps = {  # a slow second round hits all alike
        "octo": costs(1.02, 10.3, 2.02),
        "megatron": costs(1.0, 10.0, 2.0),
        "transformers": costs(0.918, 8.0, 1.919),
    }
    saves = {"synchronous": [4.0, 40.0, 5.0], "asynchronous": [0.2, 2.4, 0.4]}
    assert bench.figures(steps, saves, [6.0, 30.0, 5.0]) == {
        "step_overhead": 0.02, "tokens_per_s_vs_transformers": 0.9, "async_save_block_ratio": 0.06, "first_step_s": 6.0,
    }  # fmt: skip
    assert bench.figures(None, None, None) == dict.fromkeys(bench.FIGURES)
    table = bench.table(steps, saves, [6.0], tokens=1024)
    assert (
        "octo / megatron: wall 1.020 (1.010-1.030)" in table and "asynchronous save blocks training for 0.40" in table
    )


def test_a_failing_peer_ends_the_benchmark_with_its_own_words(
    bench: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    script = tmp_path / "peer.py"
    script.write_text("raise SystemExit('no such attention')")
    monkeypatch.setattr(bench, "__file__", str(script))
    with pytest.raises(SystemExit, match="octo failed:\nno such attention"):
        bench.run_steps(tmp_path, 1, {})
    with pytest.raises(SystemExit, match="synchronous save failed:\nno such attention"):
        bench.run_saves(tmp_path, 1, {})
    (tmp_path / "run.yaml").write_text("model: [")
    with pytest.raises(SystemExit, match="octo train failed:\n.*run.yaml"):
        bench.time_first_step(tmp_path)


def test_a_saving_process_ends_without_the_interpreters_own_ending(bench: ModuleType, monkeypatch) -> None:
    """Groups of gloo still have their threads, and those can abort it with all work done."""
    ends: list[int] = []
    monkeypatch.setattr(bench, "save", lambda *_: None)
    monkeypatch.setattr(sys, "argv", ["bench_train.py", "--save", "x", "true"])
    monkeypatch.setattr(bench.os, "_exit", lambda code: sys.exit(ends.append(code)))
    with pytest.raises(SystemExit):
        bench.main()
    assert ends == [0]


def test_a_peer_that_trains_something_else_is_refused(bench: ModuleType, tmp_path: Path) -> None:
    (tmp_path / "run.yaml").write_text("model: {vocabulary: 256}")
    bench._check_loss("octo", 5.6, tmp_path)
    with pytest.raises(SystemExit, match="transformers: the first loss is 1.200, of random weights it is 5.545"):
        bench._check_loss("transformers", 1.2, tmp_path)


@pytest.mark.slow
@pytest.mark.timeout(280)
def test_quick_run_ends_with_the_figures_and_leaves_nothing(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, TOOLS / "bench_train.py", "--quick", "--scratch", tmp_path],
        capture_output=True, text=True, timeout=270, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    figures = json.loads(done.stdout.splitlines()[-1])
    assert list(figures) == [
        "step_overhead", "tokens_per_s_vs_transformers", "async_save_block_ratio", "first_step_s",
    ]  # fmt: skip
    # What hooks cost beside a save of a few kilobytes is noise: that ratio is a number, no more.
    assert figures["step_overhead"] > -0.5 and isinstance(figures["async_save_block_ratio"], float)
    assert figures["tokens_per_s_vs_transformers"] > 0 and figures["first_step_s"] > 0
    assert list(tmp_path.iterdir()) == []


def test_the_gpu_benchmark_refuses_a_machine_without_one() -> None:
    done = subprocess.run(
        [sys.executable, TOOLS / "bench_gpu.py"], capture_output=True, text=True, timeout=120, check=False,
        env={"PATH": "/usr/bin:/bin", "CUDA_VISIBLE_DEVICES": ""},
    )  # fmt: skip
    assert done.returncode == 2 and done.stdout == ""
    assert "no CUDA device here: these figures need one" in done.stderr.splitlines()[-1]


def test_gpu_rows_are_runs_that_our_configuration_takes(
    bench: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.syspath_prepend(str(TOOLS))
    import bench_gpu

    monkeypatch.setattr(bench_gpu, "SEQUENCE", 64)  # as much less data to write
    from megatron_octo.config.load import load_config
    from megatron_octo.config.run import RunConfig

    for name, (size, changes) in bench_gpu.ROWS.items():
        file = bench_gpu.write_row(tmp_path, name, micro_batch=1, global_batch=2, recompute="full")
        run = load_config(RunConfig, file, [])
        assert run.model.hidden == {"1b": 2048, "3b": 3072}[size] and run.dtype == "bf16"
        assert (run.fp8 is not None) == ("fp8" in name) and run.transformer_impl == changes["transformer_impl"]
    row = {"seconds": 0.5, "spread": 0.1, "peak": 2**31, "flops": 3e14, "tokens": 8192, "loss": 9.0}
    found = bench_gpu.figures(row, 750e12, 989e12)
    assert found["tflops"] == 600 and found["of_roof"] == 0.8 and found["mfu"] == 0.6067 and found["peak_gib"] == 2
    assert "failed" in bench_gpu.table({"1b-bf16-te": bench_gpu.figures(None, None, 989e12)})
