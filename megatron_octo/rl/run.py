"""`octo rl train`: prove the models, lay out the files, run OpenRLHF, keep what it did.

A finished run with the same settings is not done again. An unfinished one goes on from its last complete checkpoint
(policy, critic, both optimizers, prompt position), or from the start before the first; see `resume`.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from megatron_octo.config.rl import RLStageConfig
from megatron_octo.errors import StageFailed
from megatron_octo.files import write_json, write_text
from megatron_octo.progress import Progress
from megatron_octo.rl.directory import RunDirectory
from megatron_octo.rl.parser import MODULE
from megatron_octo.rl.twin.launch import last_lines, ray_directory, run_driver

_LED = """
import runpy, sys
from megatron_octo.rl.twin.nursery import die_with
die_with(int(sys.argv[1]))
sys.argv = sys.argv[2:]
runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
"""
"""Runs a module as `python -m` does, but ends with the process named first: an OpenRLHF that outlived a killed stage
would write into the checkpoints the next start goes on from."""

_SECONDS_BETWEEN_LOOKS = 1.0
_SECONDS_TO_LEAVE = 60.0

Certify = Callable[[Path], dict[str, Any]]
Facts = dict[str, Any]


def train_rl(config: RLStageConfig, certify: Certify | None = None) -> dict[str, Facts]:
    """Run a reinforcement stage to its end.

    Args:
        config: the runs and where they run.
        certify: the gate a model must pass; the converter's `require_valid` by default.

    Returns:
        For each run its done.json: model, rollouts, reward first and last, seconds.

    Raises:
        CertificateError: a model without a valid certificate; no process has been started then.
        EnvironmentProblem: another process is at work in one of the directories.
        ConfigError: a setting OpenRLHF or a rule refuses, or a directory that holds another run.
        DataError: problems or a tokenizer that cannot be read.
        StageFailed: a run failed; the others have been finished, and a new start does only what is missing.
    """
    certify = certify or _certificate_gate()
    certificates = {label: certify(run.model) for label, run in config.runs.items()}
    runs = [RunDirectory.of(config, label, certificates[label]) for label in config.runs]
    for run in runs:
        run.check_directory()
    with contextlib.ExitStack() as held:
        for run in runs:
            if not run.done_file.exists():
                held.enter_context(run.claim())
        todo = [run for run in runs if not run.done_file.exists()]
        for run in todo:
            run.prepare()
        if todo:
            _run_all(config, todo)
    return {run.label: json.loads(run.done_file.read_text(encoding="utf-8")) for run in runs}


def _certificate_gate() -> Certify:
    from megatron_octo.convert.certificate import require_valid

    return require_valid


def _run_all(config: RLStageConfig, runs: list[RunDirectory]) -> None:
    total = sum(run.config.total_rollouts for run in runs)
    done = sum(run.record() for run in runs)
    with Progress("reinforcement", total, "rollouts", done) as bar:

        def look() -> None:
            nonlocal done
            now = sum(run.record() for run in runs)
            if now != done:
                bar.advance(now - done, **{run.label: run.last_reward for run in runs if run.last_reward is not None})
                done = now

        waiting = [run for run in runs if run.job()["stages"]]
        start = _on_cpu if config.target == "cpu" else _on_cluster
        errors = start(config, waiting, look) if waiting else {}
    errors |= {run.label: error for run in runs if run.label not in errors and (error := run.finish())}
    if errors:
        reasons = "; ".join(f"{label}: {error}" for label, error in errors.items())
        raise StageFailed(f"reinforcement failed ({reasons})", fix="start it again: finished runs are kept")


def _on_cpu(config: RLStageConfig, runs: list[RunDirectory], look: Callable[[], None]) -> dict[str, str]:
    """All runs in one Ray on this machine; returns the errors of those that failed."""
    log = runs[0].out / "driver.log"
    with ray_directory() as temporary:
        job = {
            "socket": str(temporary / "nursery"),
            "temporary": str(temporary),
            "seed": config.rl.seed,
            "parallel": config.max_parallel,
            "parent": os.getpid(),
            "runs": [run.job() for run in runs],
        }
        write_json(temporary / "job.json", job)
        try:
            run_driver(temporary / "job.json", log, config.timeout_seconds, look)
        finally:
            errors = {run.label: error for run in runs if (error := run.outcome()) is not None}
            if errors:
                _keep_logs(temporary, runs[0].out / "ray-logs")
    return errors


def _keep_logs(temporary: Path, out: Path) -> None:
    shutil.rmtree(out, ignore_errors=True)
    with contextlib.suppress(OSError):  # the logs explain a failure: where the disk is full they must not hide it
        for session in temporary.glob("session_2*"):
            shutil.copytree(session / "logs", out, dirs_exist_ok=True, ignore_dangling_symlinks=True)


def _on_cluster(config: RLStageConfig, runs: list[RunDirectory], look: Callable[[], None]) -> dict[str, str]:
    """One OpenRLHF job after the other, on the Ray cluster around this process or, without one, this machine's GPUs."""
    deadline = time.monotonic() + config.timeout_seconds
    errors: dict[str, str] = {}
    for run in runs:
        log = run.out / "openrlhf.log"
        for stage in run.job()["stages"]:
            code = _one_job(MODULE, stage["arguments"], log, deadline, look)
            if code is None:
                raise StageFailed(
                    f"reinforcement did not end within {config.timeout_seconds / 60:g} minutes; log: {log}",
                    fix="raise timeout_minutes, or shorten the runs; started again, they go on",
                )
            if code:
                errors[run.label] = f"OpenRLHF ended with code {code}: {last_lines(log)}"
                break
            write_text(Path(stage["complete"]), "")
    return errors


def _one_job(module: str, arguments: list[str], log: Path, deadline: float, look: Callable[[], None]) -> int | None:
    """Run a module; returns its exit code, or None when the deadline came first. It is not alive on return."""
    command = [sys.executable, "-c", _LED, str(os.getpid()), module, *arguments]
    with log.open("ab") as output:
        process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=output, stderr=subprocess.STDOUT)
    try:
        while process.poll() is None:
            if time.monotonic() > deadline:
                return None
            look()
            time.sleep(_SECONDS_BETWEEN_LOOKS)
        return process.returncode
    finally:
        _end(process)


def _end(process: subprocess.Popen) -> None:
    process.terminate()
    try:
        process.wait(_SECONDS_TO_LEAVE)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
