"""The storm of kills runs whole trainers, tells where it hit them, and would notice what it looks for."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

from megatron_octo.checkpoint import store

SCRIPT = Path(__file__).resolve().parents[2] / "tools" / "kill_storm.py"
LINE = {"tokens": 64, "loss": 1.5, "learning_rate": 0.1, "grad_norm": 2.0}


@pytest.mark.slow
@pytest.mark.timeout(150)
def test_a_few_kills_lose_nothing() -> None:
    ended = subprocess.run([sys.executable, str(SCRIPT), "--quick"], capture_output=True, text=True, timeout=140)
    assert ended.returncode == 0, ended.stdout + ended.stderr
    figures = json.loads(ended.stdout.splitlines()[-1])
    assert (figures["kills"], figures["lost"], figures["silent"], figures["hangs"]) == (6, 0, 0, 0)
    assert sum(figures["phases"].values()) == 6


@pytest.fixture(scope="module")
def storm() -> ModuleType:
    spec = importlib.util.spec_from_file_location("kill_storm", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def checkpoint(out: Path, step: int, content: bytes = b"weights") -> Path:
    directory = store.begin(out, step)
    (directory / "__0_0.distcp").write_bytes(content)
    store.write_facts(directory, {"step": step})
    return store.publish(directory, out, step)


def metrics(out: Path, steps: int) -> None:
    lines = [json.dumps({"step": step, **LINE}) + "\n" for step in range(1, steps + 1)]
    (out / "metrics.jsonl").write_text("".join(lines) + '{"step": 9, "lo')


@pytest.fixture
def victim(storm: ModuleType, tmp_path: Path):
    """A run directory that is as it should be, and the truth it is compared with."""
    files = {step: storm.files_of(checkpoint(tmp_path / "true", step)) for step in (3, 6)}
    truth = storm.Truth({step: {"step": step, **LINE} for step in range(1, 9)}, files, 1.0, 1.0, 10)
    for step in (3, 6):
        checkpoint(tmp_path / "run", step)
    metrics(tmp_path / "run", 7)
    return storm.Victim(storm.SCENARIOS[0], tmp_path / "run", truth)


def test_a_directory_as_it_should_be_is_left_in_peace(victim) -> None:
    assert victim.inspect() == ([], [])
    assert victim.step == 6


@pytest.mark.parametrize(
    ("harm", "kind", "said"),
    [
        (lambda out: (out / "latest").write_text("step_00000009"), "lost", "not a sealed checkpoint"),
        (lambda out: (out / "checkpoints/step_00000006/__0_0.distcp").write_bytes(b"Weights"), "lost", "altered"),
        (lambda out: store.point_at(out, "step_00000003"), "lost", "the newest checkpoint was of step 6"),
        (lambda out: metrics(out, 5), "lost", "beside a checkpoint of step 6"),
        (lambda out: checkpoint(out, 6, b"wEights"), "silent", "other values"),
        (
            lambda out: (out / "metrics.jsonl").write_text(
                (out / "metrics.jsonl").read_text().replace("1.5", "1.5000001", 1)
            ),
            "silent",
            "metrics of step 1 differ",
        ),
    ],
    ids=["pointer", "seal", "going back", "missing lines", "other weights", "other loss"],
)
def test_harm_is_noticed(victim, harm, kind, said) -> None:
    assert victim.inspect() == ([], [])
    harm(victim.out)
    lost, silent = victim.inspect()
    assert said in " ".join(lost if kind == "lost" else silent)
