"""The envelope, the verdict, and how a run is made tiny; training itself is checked in tests/distributed."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import yaml
from typer.testing import CliRunner

from megatron_octo.cli import check_layout as command
from megatron_octo.cli.root import app
from megatron_octo.config.check import check_run
from megatron_octo.config.load import merge
from megatron_octo.config.run import RunConfig
from megatron_octo.errors import EnvironmentProblem
from megatron_octo.train import api
from megatron_octo.train import check_layout as room
from megatron_octo.train.check_layout import Finding, LayoutReport, _judge
from megatron_octo.train.tiny import shrink

RUN = {
    "name": "big",
    "out": "run",
    "model": {"layers": 32, "hidden": 4096, "heads": 32, "kv_groups": 8, "ffn": 14_336, "vocabulary": 128_256},
    "data": {"tokenizer": "t", "mixture": {"a": {"path": "a", "weight": 1}}, "sequence_length": 8192},
    "batch": {"global_batch": 512, "micro_batch": 1},
    "schedule": {"learning_rate": 2e-5, "tokens": "20B"},
    "checkpoint": {"every": "1B"},
}


def run(**over: object) -> RunConfig:
    return RunConfig.model_validate(merge(RUN, over))


@pytest.mark.parametrize(
    "over",
    [
        {},
        {"parallel": {"tensor": 8, "sequence": True, "pipeline": 4, "virtual_pipeline": 2, "data": 2}},
        {"parallel": {"tensor": 2, "context": 4, "data": 64}, "recompute": {"kind": "full", "layers": 4}},
        {"parallel": {"pipeline": 8, "virtual_pipeline": 4}, "recompute": {"kind": "selective"}},
        {"parallel": {"tensor": 8}, "model": {"kv_groups": 2}},  # ranks share KV groups
        {"parallel": {"tensor": 4}, "model": {"kv_groups": 32}},  # each head has its own
        {"model": {"hidden": 1000, "heads": 12, "kv_groups": 12, "head_dim": 64, "family": "qwen3"}},
        {"parallel": {"data": 16, "distributed_optimizer": False}, "batch": {"micro_batch": 32}},
    ],
)
def test_a_tiny_run_keeps_the_layout(over):
    big = run(**over)
    check_run(big)
    tiny, _ = shrink(big)
    check_run(tiny)
    kept = {"tensor", "pipeline", "virtual_pipeline", "context", "sequence", "distributed_optimizer"}
    assert tiny.parallel.model_dump(include=kept) == big.parallel.model_dump(include=kept)
    assert tiny.parallel.data == min(big.parallel.data, 2)
    assert (tiny.model.family, tiny.model.tied_embeddings) == (big.model.family, big.model.tied_embeddings)
    assert (tiny.model.kv_groups < tiny.parallel.tensor) == (big.model.kv_groups < big.parallel.tensor)
    assert (tiny.model.kv_groups == tiny.model.heads) == (big.model.kv_groups == big.model.heads)
    assert tiny.recompute.kind == big.recompute.kind
    assert tiny.model.hidden <= 200
    assert tiny.model.layers <= 2 * big.parallel.pipeline * (big.parallel.virtual_pipeline or 1)


def test_what_is_left_out_is_said():
    big = run(
        parallel={"tensor": 2, "sequence": True, "tp_comm_overlap": True, "data": 8},
        fp8={"recipe": "delayed"},
    )
    tiny, left_out = shrink(big)
    assert (tiny.fp8, tiny.parallel.tp_comm_overlap) == (None, False)
    assert [note.split()[0] for note in left_out] == ["data", "FP8", "tp_comm_overlap"]


def steps(*losses: float) -> list[dict[str, float]]:
    return [{"loss": loss} for loss in losses]


def test_the_envelope_never_narrows():
    base, samples = steps(1.0, 1.0), [steps(1.0 + 1e-3, 1.0)]
    inside = _judge("fp32", "loss", base, samples, steps(1.0, 1.0 + 4e-3))
    assert inside.normal
    assert (inside.step, inside.allowed) == (2, pytest.approx(5e-3))
    outside = _judge("fp32", "loss", base, samples, steps(1.0, 1.0 + 6e-3))
    assert not outside.normal
    assert (outside.step, outside.observed) == (2, pytest.approx(6e-3))


def test_an_early_fault_is_not_excused_by_later_rounding():
    base, samples = steps(1.0, 1.0), [steps(1.0, 1.5)]
    found = _judge("fp32", "loss", base, samples, steps(1.0 + 1e-4, 1.0))
    assert not found.normal
    assert (found.step, found.allowed) == (1, 2**-22)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_what_is_no_number_is_not_normal(value):
    assert not _judge("fp32", "loss", steps(1.0), [steps(1.1)], steps(value)).normal


def report(*findings: Finding) -> LayoutReport:
    return LayoutReport("TP2", 2, "llama, 2 layers", 4, ["data parallelism 8 is checked as 2"], list(findings))


GOOD = Finding("fp32", "loss", 3, 1e-7, 5e-7, 2e-7)
BAD = Finding("fp32", "gradient norm", 2, 1e-7, 5e-7, 8.8e-4)


@pytest.fixture
def file(tmp_path: Path) -> str:
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(RUN))
    return str(tmp_path / "run.yaml")


def test_the_command_prints_a_table_and_a_verdict(file, monkeypatch):
    monkeypatch.setattr(command, "check_layout", lambda _run: report(GOOD))
    done = CliRunner().invoke(app, ["train", file, "--check-layout"])
    assert done.exit_code == 0
    assert "2.0e-07" in done.stdout
    assert "note: data parallelism 8 is checked as 2" in done.stdout
    assert done.stdout.splitlines()[-1].startswith("normal: TP2 differs")


def test_a_layout_that_is_not_normal_ends_with_code_7(file, monkeypatch):
    monkeypatch.setattr(command, "check_layout", lambda _run: report(GOOD, BAD))
    done = CliRunner().invoke(app, ["train", file, "--check-layout"])
    assert done.exception.exit_code == 7
    assert "gradient norm in fp32 is 8.8e-04 away at step 2, rounding explains 5.0e-07" in str(done.exception)
    assert "NOT normal" in done.stdout


def test_more_processes_than_memory_are_refused(monkeypatch):
    monkeypatch.setattr(room, "_RANK_BYTES", 2**60)
    with pytest.raises(EnvironmentProblem, match="TP2 needs 2 processes"):
        room.check_layout(run(parallel={"tensor": 2}))


@pytest.mark.parametrize(("nproc", "data"), [(4, 1), (8, 2), (64, 16)])
def test_nproc_sets_data_parallelism(file, nproc, data):
    overrides = api.spread_over(Path(file), ["parallel.tensor=2", "parallel.pipeline=2"], nproc)
    assert api.load_run(Path(file), overrides).parallel.data == data


def test_nproc_that_does_not_divide_is_refused(file):
    done = CliRunner().invoke(app, ["train", file, "--nproc", "6", "parallel.tensor=2", "parallel.context=2"])
    assert done.exception.exit_code == 2
    assert "--nproc 6 is not divisible by parallel.tensor 2 x pipeline 1 x context 2 = 4" in str(done.exception)


def test_json_needs_a_check(file):
    assert CliRunner().invoke(app, ["train", file, "--json"]).exception.exit_code == 2
