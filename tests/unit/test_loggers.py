"""Loggers beside the metrics: what they write, what they keep to themselves, and that none stops a run."""

from __future__ import annotations

import errno
import importlib.util
import json
import math
import os
import subprocess
import sys

import pytest
from tensorboard.backend.event_processing.event_file_loader import EventFileLoader
from tensorboard.summary.writer import event_file_writer

from megatron_octo.config.run import RunConfig
from megatron_octo.errors import EnvironmentProblem
from megatron_octo.train.loggers import Loggers, check_loggers

VALUES = {
    "name": "tiny",
    "model": {"layers": 2, "hidden": 32, "heads": 4, "kv_groups": 2, "ffn": 64, "vocabulary": 90},
    "data": {"tokenizer": "t", "mixture": {"web": {"path": "web", "weight": 1}}, "sequence_length": 32},
    "batch": {"global_batch": 4, "micro_batch": 2},
    "schedule": {"learning_rate": 1e-3, "tokens": "2K"},
    "checkpoint": {"every": "1K"},
}
KEY = "0123456789abcdef0123456789abcdef01234567"
have_wandb = importlib.util.find_spec("wandb") is not None
needs_wandb = pytest.mark.skipif(not have_wandb, reason="wandb is not installed: pip install wandb")


def run_of(folder, **logging) -> RunConfig:
    return RunConfig.model_validate({**VALUES, "out": str(folder / "run"), "logging": logging})


def points(run: RunConfig) -> list[tuple[int, str, float]]:
    """Every scalar of the run's event files, in the order they were written."""
    found = []
    for path in sorted((run.out / "tensorboard").iterdir(), key=lambda path: path.stat().st_mtime_ns):
        for event in EventFileLoader(str(path)).Load():
            for value in event.summary.value:
                found.append((event.step, value.tag, value.tensor.float_val[0]))
    return found


def test_tensorboard_gets_points_and_nothing_for_what_is_no_number(tmp_path):
    run, loggers = run_of(tmp_path), Loggers()
    loggers.open(run, 0)
    loggers.write(1, {"train/loss": 2.5, "train/grad_norm": None, "train/mfu": math.nan})
    loggers.close()
    assert points(run) == [(1, "train/loss", 2.5)]


def test_a_full_disk_switches_tensorboard_off_and_says_so_once(tmp_path, monkeypatch, capsys):
    run, loggers = run_of(tmp_path), Loggers()
    loggers.open(run, 0)

    def full(*_arguments) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(event_file_writer.EventFileWriter, "add_event", full)
    for step in (1, 2, 3):
        loggers.write(step, {"train/loss": 2.5})
    loggers.close()
    said = [line for line in capsys.readouterr().err.splitlines() if line.startswith("octo: warning")]
    assert len(said) == 1
    for words in ("tensorboard failed", "No space left on device", "training goes on"):
        assert words in said[0]


def test_a_logger_that_cannot_even_start_does_not_stop_the_run(tmp_path, capsys):
    run, loggers = run_of(tmp_path), Loggers()
    run.out.mkdir()
    (run.out / "tensorboard").write_text("a file where events should go")
    loggers.open(run, 0)
    loggers.write(1, {"train/loss": 2.5})
    loggers.close()
    assert "tensorboard failed" in capsys.readouterr().err


def test_a_missing_package_is_refused_by_name(tmp_path, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    check_loggers(run_of(tmp_path))
    with pytest.raises(EnvironmentProblem, match="pip install wandb"):
        check_loggers(run_of(tmp_path, wandb={"project": "p"}))


@needs_wandb
def test_wandb_keeps_one_run_over_restarts_and_no_secret(tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_API_KEY", KEY)
    run = run_of(tmp_path, tensorboard=False, wandb={"project": "p", "mode": "offline"})
    run.out.mkdir()
    for first in (1, 3):
        loggers = Loggers()
        loggers.open(run, first - 1)
        loggers.write(first, {"train/loss": 2.5})
        loggers.write(first, {"validation/mean": 2.0})
        loggers.write(first + 1, {"train/loss": 2.4})
        loggers.close()
    name = (run.out / "wandb-id.txt").read_text().strip()
    attempts = list((run.out / "wandb").glob("offline-run-*"))
    assert attempts
    assert all(path.name.endswith(f"-{name}") for path in attempts)
    for path in run.out.rglob("*"):
        assert not path.is_file() or KEY.encode() not in path.read_bytes(), path


def online(tmp_path, **variables: str) -> subprocess.CompletedProcess:
    """An online run in a process of its own, whose W&B service is a port where nobody answers."""
    run = run_of(tmp_path, tensorboard=False, wandb={"project": "p"})
    run.out.mkdir()
    (tmp_path / "run.json").write_text(run.model_dump_json())
    code = (
        "import pathlib, sys; from megatron_octo.config.run import RunConfig; from megatron_octo.train import loggers\n"
        "loggers._WANDB_PATIENCE = 3\n"
        f"run = RunConfig.model_validate_json(pathlib.Path({str(tmp_path / 'run.json')!r}).read_text())\n"
        "log = loggers.Loggers(); log.open(run, 0); log.write(1, {'train/loss': 2.5}); log.close()"
    )
    environment = {name: value for name, value in os.environ.items() if not name.startswith("WANDB")}
    environment |= {"HOME": str(tmp_path), "NETRC": str(tmp_path / "netrc"), "WANDB_BASE_URL": "http://127.0.0.1:9"}
    return subprocess.run(
        [sys.executable, "-c", code],
        env=environment | variables,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=120,
    )


@needs_wandb
def test_wandb_without_a_key_is_refused(tmp_path):
    ended = online(tmp_path)
    assert "EnvironmentProblem" in ended.stderr
    assert ended.returncode


@needs_wandb
def test_wandb_that_does_not_answer_is_logged_offline(tmp_path):
    ended = online(tmp_path, WANDB_API_KEY=KEY)
    assert ended.returncode == 0, ended.stderr
    assert "logging offline" in ended.stderr
    assert list((tmp_path / "run" / "wandb").glob("offline-run-*"))
    assert KEY not in ended.stderr


def test_the_configuration_has_no_place_for_a_key(tmp_path):
    with pytest.raises(ValueError, match="Extra inputs"):
        run_of(tmp_path, wandb={"project": "p", "api_key": KEY})
    assert KEY not in json.dumps(run_of(tmp_path, wandb={"project": "p"}).model_dump(mode="json"))
