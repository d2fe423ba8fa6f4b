"""The conversion benchmark measures what it says: whole processes, their own memory, ratios round by round."""

from __future__ import annotations

import importlib.util
import json
import shutil
import subprocess
import sys
from collections import namedtuple
from pathlib import Path
from types import ModuleType

import pytest

SCRIPT = Path(__file__).resolve().parents[2] / "tools" / "bench_convert.py"
MIB = 2**20


@pytest.fixture(scope="module")
def bench() -> ModuleType:
    spec = importlib.util.spec_from_file_location("bench_convert", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    yield module
    del sys.modules[spec.name]


@pytest.mark.parametrize(("shape", "count"), [("1b", 1_235_814_400), ("3b", 3_212_749_824), ("8b", 8_030_261_248)])
def test_shapes_are_the_published_models(bench: ModuleType, shape: str, count: int) -> None:
    assert bench.weight_bytes(bench.model_of(shape)) == 2 * count


def test_a_step_is_charged_with_its_own_memory_and_with_all_processes_it_starts(
    bench: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    mine = bytearray(400 * MIB)  # of the process that measures: belongs to nobody else
    inner = "import time; kept = bytearray(150 * 2**20)\nwhile time.process_time() < 0.4: pass"
    outer = f"import subprocess, sys; kept = bytearray(100 * 2**20); subprocess.run([sys.executable, '-c', {inner!r}])"
    monkeypatch.setattr(bench, "command", lambda *_: [sys.executable, "-c", outer])
    cost = bench.measure("any", Path(), Path())
    assert len(mine) and 250 * MIB < cost.peak < 350 * MIB
    assert 0.4 < cost.cpu < 3 and cost.wall > 0.4


def test_a_failing_step_ends_the_benchmark_with_its_own_words(
    bench: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bench, "command", lambda *_: [sys.executable, "-c", "raise SystemExit('no such tensor')"])
    with pytest.raises(SystemExit, match="any failed:\nno such tensor"):
        bench.measure("any", Path(), Path())


def test_ratios_belong_to_one_round(bench: ModuleType) -> None:
    def costs(*cpu: float, peak: int = 0) -> list:
        return [bench.Cost(value, 0.0, 60.0, peak) for value in cpu]

    measured = {
        "safetensors": costs(1.0, 10.0, 2.0),  # a slow second round hits all alike
        "from_hf": costs(2.0, 20.0, 4.0, peak=30),
        "to_hf": costs(1.5, 12.0, 4.0, peak=60),
        "certificate": costs(100.0),
    }
    assert bench.figures(measured, size=100) == {
        "from_hf_cpu_vs_safetensors": 2.0, "to_hf_cpu_vs_safetensors": 1.5,
        "from_hf_rss_vs_file": 0.3, "to_hf_rss_vs_file": 0.6, "certificate_s": 60.0,
    }  # fmt: skip


def test_too_little_disk_is_refused_before_anything_is_made(
    bench: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda _: namedtuple("Usage", "free")(7 * 10**9))
    monkeypatch.setattr(sys, "argv", ["bench_convert.py", "--scratch", str(tmp_path)])
    monkeypatch.setattr(bench, "make_model", lambda *_: pytest.fail("began all the same"))
    with pytest.raises(SystemExit) as refused:
        bench.main()
    assert refused.value.code == 2 and list(tmp_path.iterdir()) == []
    assert "6.5 GiB free, 7.1 GiB are needed; name another directory" in capsys.readouterr().err


@pytest.mark.slow
def test_quick_run_ends_with_the_figures_and_leaves_nothing(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, SCRIPT, "--quick", "--scratch", tmp_path],
        capture_output=True,
        text=True,
        timeout=280,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    figures = json.loads(done.stdout.splitlines()[-1])
    assert list(figures) == [
        "from_hf_cpu_vs_safetensors", "to_hf_cpu_vs_safetensors", "from_hf_rss_vs_file", "to_hf_rss_vs_file",
        "certificate_s",
    ]  # fmt: skip
    assert all(value > 0 for value in figures.values()) and list(tmp_path.iterdir()) == []
