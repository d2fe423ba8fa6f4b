"""The whole campaign, killed again and again, against one that was left alone."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

TINY = Path(__file__).resolve().parents[1] / "assets" / "tiny.yaml"
RUNS = ("stable", "long", "short", "hybrid")


def start(out: Path, *overrides: str) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-m", "megatron_octo.cli", "campaign", "run", str(TINY), *overrides, "--out", str(out)]
    log = (out.parent / f"{out.name}.log").open("ab")
    return subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, start_new_session=True)


def finish(out: Path, *overrides: str, seconds: float = 600) -> None:
    process = start(out, *overrides)
    try:
        code = process.wait(seconds)
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
    assert code == 0, (out.parent / f"{out.name}.log").read_text()[-3000:]


def kill_when(out: Path, condition: Callable[[], bool], *overrides: str, seconds: float = 300) -> None:
    """Start the campaign and SIGKILL its engine, and nothing else, once the condition holds."""
    process = start(out, *overrides)
    deadline = time.time() + seconds
    while not condition():
        assert process.poll() is None, (out.parent / f"{out.name}.log").read_text()[-3000:]
        assert time.time() < deadline, "the campaign never came to the point where it was to be killed"
        time.sleep(0.05)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()


def metrics(run: Path) -> list[dict]:
    path = run / "metrics.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def exact(run: Path) -> list[tuple]:
    return [(row["step"], row["tokens"], row["loss"], row["grad_norm"], row["learning_rate"]) for row in metrics(run)]


def weights(run: Path) -> dict[str, bytes]:
    from megatron_octo.checkpoint.dist import TorchDist
    from megatron_octo.checkpoint.store import latest_checkpoint
    from megatron_octo.checkpoint.tensors import read

    source = TorchDist(latest_checkpoint(run))
    return {name: read(source, name).numpy().tobytes() for name in source.shapes()}


def attempts(out: Path) -> dict[str, int]:
    return {path.stem: json.loads(path.read_text())["attempts"] for path in (out / "state").glob("*.json")}


@pytest.mark.slow
@pytest.mark.timeout(1500)
def test_killed_campaign_ends_where_an_undisturbed_one_ends(tmp_path: Path) -> None:
    killed, calm = tmp_path / "killed", tmp_path / "calm"
    kill_when(killed, lambda: len(metrics(killed / "stable")) >= 3)
    kill_when(killed, lambda: len(metrics(killed / "short")) >= 3)
    kill_when(killed, lambda: (killed / "progress" / "rl.json").exists())
    finish(killed)
    assert attempts(killed) == {
        "data": 1, "stable-1": 2, "stable-2": 1, "long": 1, "short": 2, "hybrid": 1, "convert": 1,
        "evaluate-base": 1, "rl": 2, "evaluate-rl": 1, "report": 1,
    }  # fmt: skip
    finish(calm, "rl=null")
    for run in RUNS:
        assert exact(killed / run) == exact(calm / run), run
        assert weights(killed / run) == weights(calm / run), run
    check_results(killed)
    before = attempts(killed)
    finish(killed, seconds=60)
    assert attempts(killed) == before, "a finished campaign runs nothing again"
    check_start_from_hugging_face(tmp_path, killed / "hf" / "long")


def check_start_from_hugging_face(tmp_path: Path, model: Path) -> None:
    """A campaign may start from any Llama in Hugging Face form, here one that another campaign made."""
    out = tmp_path / "from_hf"
    overrides = ("rl=null", f"start={{hf: '{model}'}}", f"data.tokenizer={{path: '{model}', train: null}}")
    kill_when(out, lambda: len(metrics(out / "stable")) > 0, *overrides)  # the rest is as in the others
    fresh, continued = metrics(tmp_path / "calm" / "stable"), metrics(out / "stable")
    assert continued[0]["loss"] < fresh[0]["loss"] - 0.5


def check_results(out: Path) -> None:
    report = json.loads((out / "report" / "report.json").read_text())
    assert set(report["branches"]) == {"long", "short", "hybrid"}
    page = (out / "report" / "index.html").read_text()
    assert "http://" not in page.replace("http://www.w3.org", "") and "https://" not in page
    assert "<svg" in page or "data:image/png" in page
    for branch in ("long", "short", "hybrid"):
        certificate = json.loads((out / "hf" / branch / "certificate.json").read_text())
        assert certificate["valid"] is True
        assert (out / "rl" / branch / "model" / "model.safetensors").exists()
        for when in ("base", "rl"):
            result = json.loads((out / "eval" / f"{branch}-{when}.json").read_text())
            assert result["greedy"]["n_problems"] == result["sampled"]["n_problems"] == 40
    layouts = {row["layout"] for row in metrics(out / "stable")}
    assert layouts == {"TP2 PP2 SP", "DP2"}
