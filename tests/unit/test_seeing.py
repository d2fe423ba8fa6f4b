"""MFU's denominator, metric lines, the flame, progress in words, and the introduction of a run."""

from __future__ import annotations

import json
import math
import os

import pytest

from megatron_octo.config.run import RunConfig
from megatron_octo.progress import Progress, describe_facts
from megatron_octo.runtime.peak import peak_flops
from megatron_octo.train.cost import Cost
from megatron_octo.train.describe import describe_run
from megatron_octo.train.flame import WIDTH, flame, mean, stages
from megatron_octo.train.metrics import LineFile

MODEL = {"layers": 2, "hidden": 32, "heads": 4, "kv_groups": 2, "ffn": 64, "vocabulary": 90, "max_positions": 64}
VALUES = {
    "name": "tiny",
    "out": "runs/tiny",
    "model": MODEL,
    "data": {"tokenizer": "t", "mixture": {"web": {"path": "web", "weight": 1}}, "sequence_length": 32},
    "batch": {"global_batch": 4, "micro_batch": 2},
    "schedule": {"learning_rate": 1e-3, "tokens": "2K"},
    "checkpoint": {"every": "1K"},
}


def run_of(**changes) -> RunConfig:
    return RunConfig.model_validate({**VALUES, **changes})


@pytest.mark.parametrize(
    ("device", "bf16", "fp8"),
    [
        ("NVIDIA H100 80GB HBM3", 989.4, 1978.9),
        ("NVIDIA H100 PCIe", 756, 1513),
        ("NVIDIA H100 NVL", 835.5, 1671),
        ("NVIDIA H200", 989.4, 1978.9),
        ("NVIDIA A100-SXM4-80GB", 312, None),
        ("NVIDIA A100-PCIE-40GB", 312, None),
        ("NVIDIA B200", 2250, 4500),
        ("NVIDIA GB200", 2500, 5000),
    ],
)
def test_peaks(device, bf16, fp8):
    found = peak_flops(device)
    assert found is not None
    assert (found.bf16, found.fp8) == (bf16 * 1e12, None if fp8 is None else fp8 * 1e12)


@pytest.mark.parametrize("device", ["CPU", "NVIDIA H100 80GB HBM3 MIG 1g.10gb", "NVIDIA RTX A1000", "NVIDIA GeForce"])
def test_no_peak_is_guessed(device):
    assert peak_flops(device) is None


def test_mfu_is_of_one_device_and_says_of_what():
    cost = Cost(flops_per_token=6e9, device="NVIDIA H100 80GB HBM3", devices=8, peak=989.4e12)
    rates = cost.rates(tokens_per_second=400_000.0)
    assert rates["device_flops_per_second"] == 3e14
    assert rates["mfu"] == pytest.approx(3e14 / 989.4e12, abs=1e-5)
    for words in ("989 TFLOP/s BF16 dense", "attention counted causal", "no recompute"):
        assert words in cost.text


def test_without_a_peak_there_is_no_mfu():
    cost = Cost.of(run_of())
    assert cost.device == "CPU"
    assert list(cost.rates(1000.0)) == ["device_flops_per_second"]
    assert "no MFU" in cost.text


def test_lines_hold_no_word_that_json_does_not_know(tmp_path):
    file = LineFile(tmp_path / "lines.jsonl")
    file.write({"step": 1, "loss": math.nan, "deep": {"norm": math.inf, "good": 0.5}})
    file.write({"step": 2})
    file.cut(1)
    file.write({"step": 2, "again": True})
    file.close()
    found = [json.loads(line, parse_constant=pytest.fail) for line in (tmp_path / "lines.jsonl").open()]
    assert found == [{"step": 1, "loss": None, "deep": {"norm": None, "good": 0.5}}, {"step": 2, "again": True}]


def test_a_line_that_does_not_fit_is_an_error(tmp_path, monkeypatch):
    file = LineFile(tmp_path / "lines.jsonl")
    plain = os.write
    monkeypatch.setattr(os, "write", lambda descriptor, content: plain(descriptor, content[:5]))
    with pytest.raises(OSError, match="No space left"):
        file.write({"step": 1})


TIMES = {
    ("data",): 0.1,
    ("forward", "attention"): 0.2,
    ("forward", "mlp"): 0.3,
    ("backward", "mlp"): 0.2,
    ("hooks", "SaveCheckpoints"): 0.1,
    ("other",): 0.1,
}


def test_a_flame_adds_up_and_bars_lie_under_their_parents():
    lines = flame("title", TIMES).splitlines()
    assert lines[0] == "title"
    rows = {line[:24].strip(): line for line in lines[1:]}
    assert list(rows) == [
        "step",
        "data",
        "forward",
        "attention",
        "mlp",
        "backward",
        "hooks",
        "SaveCheckpoints",
        "other",
    ]
    assert "1000.00 ms 100.0%" in rows["step"]
    assert "500.00 ms  50.0%" in rows["forward"]
    assert max(map(len, lines)) <= WIDTH
    start = {name: line.index("█") for name, line in rows.items() if "█" in line}
    assert start["forward"] == start["attention"] < start["backward"] < start["hooks"] == start["SaveCheckpoints"]
    assert rows["step"].count("█") == pytest.approx(2 * rows["forward"].count("█"), abs=1)


def test_a_flame_of_ranks_tells_the_least_and_the_most():
    other = {**TIMES, ("data",): 0.3}
    text = flame("title", mean([TIMES, other]), [TIMES, other])
    row = next(line for line in text.splitlines() if line.strip().startswith("data"))
    assert "200.00 ms" in row
    assert "100.00..300.00" in row
    assert max(map(len, text.splitlines())) <= WIDTH


def test_stages_tell_who_waits():
    busy, idle = {("forward", "mlp"): 0.9, ("other",): 0.1}, {("forward", "mlp"): 0.2, ("waiting for stages",): 0.8}
    lines = stages([(0, busy), (1, idle)]).splitlines()
    assert "forward  90.0%" in lines[1]
    assert "waiting  80.0%" in lines[2]
    assert lines[2].count("░") > 4 * lines[2].count("█") - 8
    assert max(map(len, lines)) <= WIDTH


def test_a_batch_jobs_log_gets_plain_lines_and_a_moving_estimate(capsys, monkeypatch):
    now = [1000.0]
    monkeypatch.setattr("megatron_octo.progress.time.monotonic", lambda: now[0])
    with Progress("tiny", 10_000, "tokens", done=1000, lines=True) as bar:
        now[0] += 500  # the first step starts everything up: no estimate rests on it
        bar.advance(1000, loss=2.5, learning_rate=3e-4, tokens_per_second=100.0, mfu=0.412)
        assert bar.left() is None
        for _ in range(4):
            now[0] += 10
            bar.advance(1000)
        assert bar.left() == pytest.approx(40.0)
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 3  # the first, one half a minute later, the last
    assert "tiny: 20.0% · 2K of 10K tokens · loss 2.5000 · lr 0.0003 · 100 tok/s · MFU 41.2%" in lines[0]
    assert "50.0% · 5K of 10K tokens · eta 50s" in lines[1]
    assert "60.0%" in lines[2]


def test_a_run_that_goes_back_forgets_its_pace(monkeypatch):
    now = [0.0]
    monkeypatch.setattr("megatron_octo.progress.time.monotonic", lambda: now[0])
    bar = Progress("tiny", 100)
    for amount in (10, 10, -20, 10, 10):
        now[0] += 10
        bar.advance(amount)
    assert bar.left() == pytest.approx(80.0)


def test_unknown_facts_are_shown_as_they_are():
    assert describe_facts({"reward": 0.123456, "state": "ready"}) == ["reward 0.1235", "state ready"]


@pytest.mark.parametrize(
    ("changes", "step", "last", "said"),
    [
        ({}, 0, 16, ["random weights, seed 0", "single process, bf16", "128 tokens/step x 16 steps = 2.05K tokens"]),
        ({}, 8, 16, ["goes on after step 8 (1.02K tokens)"]),
        ({}, 0, 4, ["until step 4 now"]),
        ({"start": {"checkpoint": "base"}}, 0, 16, ["weights of base"]),
        ({"start": {"fork": {"parent": "runs/stable", "at": "1K"}}}, 0, 16, ["branch of runs/stable at 1K tokens"]),
        ({"parallel": {"tensor": 2, "data": 2}}, 0, 16, ["TP2 DP2, 4 processes"]),
        ({"fp8": {}}, 0, 16, ["bf16 with FP8 tensorwise"]),
    ],
)
def test_a_run_introduces_itself(changes, step, last, said):
    text = describe_run(run_of(**changes), step, last)
    assert text.startswith("tiny\n")
    for words in [*said, "FLOP/token: 6 per matrix weight, attention counted causal, no recompute"]:
        assert words in text
