"""`octo train --check-layout`: real layouts are normal, and faults that megatron-core runs silently are not."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from megatron_octo.config.load import merge
from megatron_octo.config.run import RunConfig
from megatron_octo.train.check_layout import LayoutReport, check_layout

HERE = Path(__file__).parent

pytestmark = [pytest.mark.slow, pytest.mark.timeout(200)]

RUN = {
    "name": "big",
    "out": "nowhere/run",
    "dtype": "fp32",
    "model": {"layers": 28, "hidden": 3072, "heads": 24, "kv_groups": 8, "ffn": 8192, "vocabulary": 128_256},
    "data": {"tokenizer": "nowhere", "mixture": {"a": {"path": "nowhere/a", "weight": 1}}, "sequence_length": 8192},
    "batch": {"global_batch": 128, "micro_batch": 4},
    "schedule": {"learning_rate": 2e-5, "tokens": "1B"},
    "checkpoint": {"every": "1B"},
}


def check(monkeypatch: pytest.MonkeyPatch, fault: str, parallel: dict) -> LayoutReport:
    monkeypatch.setenv("PLANTED", fault)
    monkeypatch.setenv("PYTHONPATH", str(HERE))
    return check_layout(RunConfig.model_validate(merge(RUN, {"parallel": parallel})), "planted_trace")


@pytest.mark.parametrize(
    ("fault", "parallel", "away"),
    [
        ("batched_messages", {"pipeline": 2, "virtual_pipeline": 2}, 1e-3),
        ("unreduced_norm", {"tensor": 2, "sequence": True}, 1e-5),
        ("shared_bucket", {"pipeline": 2, "data": 2}, 1e-3),
    ],
)
def test_a_planted_fault_is_not_normal(monkeypatch, fault, parallel, away):
    report = check(monkeypatch, fault, parallel)
    norm = next(finding for finding in report.findings if finding.quantity == "gradient norm")
    assert not norm.normal
    assert norm.observed > away
    assert report.verdict().startswith(f"NOT normal: {report.layout} differs from one process: ")
    assert "gradient norm in fp32" in report.verdict()


def test_the_command_answers(tmp_path):
    layout = {"tensor": 2, "data": 16, "sequence": True, "overlap_grad_reduce": True, "overlap_param_gather": True}
    (tmp_path / "run.yaml").write_text(yaml.safe_dump({**RUN, "dtype": "bf16", "parallel": layout}))
    done = subprocess.run(
        [sys.executable, "-m", "megatron_octo.cli", "train", "run.yaml", "--check-layout", "--json"],
        cwd=tmp_path, capture_output=True, text=True, timeout=150,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    facts = json.loads(done.stdout)
    assert (facts["layout"], facts["processes"], facts["normal"]) == ("TP2 DP2 SP", 4, True)
    assert facts["left_out"] == ["data parallelism 16 is checked as 2"]
    seen = {(one["precision"], one["quantity"]): one for one in facts["findings"]}
    assert set(seen) == {(dtype, name) for dtype in ("fp32", "bf16") for name in ("loss", "gradient norm")}
    for (dtype, _), one in seen.items():
        assert one["observed"] <= one["allowed"] < (1e-5 if dtype == "fp32" else 0.3)
        assert math.isclose(one["allowed"], max(5 * one["rounding"], 2**-22))
    assert seen["bf16", "gradient norm"]["rounding"] > 100 * seen["fp32", "gradient norm"]["rounding"]
    assert [path.name for path in tmp_path.iterdir()] == ["run.yaml"]
