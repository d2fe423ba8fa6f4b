"""`octo rl train`: prove the models, lay out the files, run OpenRLHF, keep what it did.

A finished run with the same settings is not done again. An unfinished one goes on from its last complete checkpoint
(policy, critic, both optimizers, prompt position), or from the start before the first; see `resume`.
"""

from __future__ import annotations

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
from megatron_octo.progress import Progress
from megatron_octo.rl.directory import RunDirectory
from megatron_octo.rl.parser import MODULE
from megatron_octo.rl.prompts import write_text
from megatron_octo.rl.twin.launch import last_lines, ray_directory, run_driver

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
        ConfigError: a setting OpenRLHF or a rule refuses, or a directory that holds another run.
        DataError: problems or a tokenizer that cannot be read.
        StageFailed: a run failed; the others have been finished, and a new start does only what is missing.
    """
    certify = certify or _certificate_gate()
    certificates = {label: certify(run.model) for label, run in config.runs.items()}
    runs = [RunDirectory.of(config, label, certificates[label]) for label in config.runs]
    for run in runs:
        run.check_directory()
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
        write_text(temporary / "job.json", json.dumps(job))
        try:
            run_driver(temporary / "job.json", log, config.timeout_minutes * 60, look)
        finally:
            errors = {run.label: error for run in runs if (error := run.outcome()) is not None}
            if errors:
                _keep_logs(temporary, runs[0].out / "ray-logs")
    return errors


def _keep_logs(temporary: Path, out: Path) -> None:
    shutil.rmtree(out, ignore_errors=True)
    for session in temporary.glob("session_2*"):
        shutil.copytree(session / "logs", out, dirs_exist_ok=True, ignore_dangling_symlinks=True)


def _on_cluster(config: RLStageConfig, runs: list[RunDirectory], look: Callable[[], None]) -> dict[str, str]:
    """One OpenRLHF job after the other, on the Ray cluster around this process or, without one, this machine's GPUs."""
    deadline = time.monotonic() + config.timeout_minutes * 60
    errors: dict[str, str] = {}
    for run in runs:
        log = run.out / "openrlhf.log"
        for stage in run.job()["stages"]:
            code = _one_job([sys.executable, "-m", MODULE, *stage["arguments"]], log, deadline, look)
            if code:
                errors[run.label] = f"OpenRLHF ended with code {code}: {last_lines(log)}"
                break
            write_text(Path(stage["complete"]), "")
    return errors


def _one_job(command: list[str], log: Path, deadline: float, look: Callable[[], None]) -> int:
    with log.open("ab") as output:
        process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=output, stderr=subprocess.STDOUT)
    try:
        while process.poll() is None and time.monotonic() < deadline:
            look()
            time.sleep(1)
    finally:
        if process.poll() is None:
            process.terminate()
    return process.wait()
