"""`octo rl train`: prove the models, lay out the files, run OpenRLHF, keep what it did.

A run directory holds prompts.jsonl, reward.py, argv.json, settings.json, metrics.jsonl, tensorboard/, stages/ (work in
progress, with checkpoints) and, when it is finished, model/ and done.json. A finished run with the same settings is not
done again; an unfinished one goes on from its last complete checkpoint, or from the start before the first.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_octo.config.load import differences
from megatron_octo.config.rl import RLConfig, RLStageConfig
from megatron_octo.errors import ConfigError, StageFailed
from megatron_octo.progress import Progress
from megatron_octo.rl.argv import StageFiles, critic_model, run_files, run_vectors
from megatron_octo.rl.export import export_model
from megatron_octo.rl.parser import MODULE
from megatron_octo.rl.prompts import prompt_tokenizer, special_text, split_prompts, write_prompts, write_text
from megatron_octo.rl.records import EventReader, metric_lines, write_metrics
from megatron_octo.rl.resume import settle
from megatron_octo.rl.reward import reward_file
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
    runs = [_Run.of(config, label, certificates[label]) for label in config.runs]
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


def _run_all(config: RLStageConfig, runs: list[_Run]) -> None:
    total = sum(run.config.total_rollouts for run in runs)
    done = sum(run.rollouts_done() for run in runs)
    with Progress("reinforcement", total, "rollouts", done) as bar:

        def look() -> None:
            nonlocal done
            now = sum(run.record() for run in runs)
            if now != done:
                bar.advance(now - done, **{run.label: run.last_reward for run in runs if run.last_reward is not None})
                done = now

        errors = (_on_cpu if config.target == "cpu" else _on_cluster)(config, runs, look)
    for run in runs:
        if errors.get(run.label) is None:
            errors[run.label] = run.finish()
    failed = {label: error for label, error in errors.items() if error}
    if failed:
        reasons = "; ".join(f"{label}: {error}" for label, error in failed.items())
        raise StageFailed(f"reinforcement failed ({reasons})", fix="start it again: finished runs are kept")


def _on_cpu(config: RLStageConfig, runs: list[_Run], look: Callable[[], None]) -> dict[str, str | None]:
    """All runs in one Ray on this machine; returns each run's error."""
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
        path = temporary / "job.json"
        write_text(path, json.dumps(job))
        try:
            run_driver(path, log, config.timeout_minutes * 60, look)
        finally:
            errors = {run.label: run.outcome() for run in runs}
            if any(error != "" for error in errors.values() if error is not None):
                _keep_logs(temporary, runs[0].out / "ray-logs")
    return {label: error if error != "" else f"no outcome; see {log}" for label, error in errors.items()}


def _keep_logs(temporary: Path, out: Path) -> None:
    shutil.rmtree(out, ignore_errors=True)
    for session in temporary.glob("session_2*"):
        shutil.copytree(session / "logs", out, dirs_exist_ok=True, ignore_dangling_symlinks=True)


def _on_cluster(config: RLStageConfig, runs: list[_Run], look: Callable[[], None]) -> dict[str, str | None]:
    """One OpenRLHF job after the other on the machine's GPUs; Ray is the surrounding cluster's, if there is one."""
    deadline = time.monotonic() + config.timeout_minutes * 60
    errors: dict[str, str | None] = {}
    for run in runs:
        errors[run.label] = None
        for stage in run.job()["stages"]:
            log = run.out / "openrlhf.log"
            with log.open("ab") as output:
                process = subprocess.Popen(
                    [sys.executable, "-m", MODULE, *stage["arguments"]], stdout=output, stderr=subprocess.STDOUT
                )
                while process.poll() is None and time.monotonic() < deadline:
                    look()
                    time.sleep(1)
            if process.poll() is None:
                process.terminate()
                process.wait()
            if process.returncode:
                errors[run.label] = f"OpenRLHF ended with code {process.returncode}: {last_lines(log)}"
                break
            write_text(Path(stage["complete"]), "")
    return errors


@dataclass
class _Run:
    """One run of the stage and its directory."""

    label: str
    model: Path
    out: Path
    problems: Path
    config: RLConfig
    files: list[StageFiles]
    vectors: list[list[str]]
    settings: dict[str, Any]
    readers: list[EventReader]
    seconds: float
    last_reward: float | None = None
    _written: int = -1

    @classmethod
    def of(cls, config: RLStageConfig, label: str, certificate: dict[str, Any]) -> _Run:
        run, resolved = config.runs[label], config.resolved(label)
        files = run_files(resolved, run.model, run.out)
        settings = {
            "config": resolved.model_dump(mode="json"),
            "target": config.target,
            "certificate": certificate.get("self_sha256"),
            "problems": str(run.problems.absolute()),
        }
        return cls(
            label, run.model.absolute(), run.out.absolute(), run.problems, resolved, files,
            run_vectors(config, label), settings, [EventReader(at.tensorboard / at.name) for at in files], time.time(),
        )  # fmt: skip

    @property
    def done_file(self) -> Path:
        return self.out / "done.json"

    @property
    def rollouts(self) -> list[int]:
        return [stage.rollouts for stage in self.config.stages]

    def check_directory(self) -> None:
        """Refuse a directory in which another run was begun."""
        path = self.out / "settings.json"
        if not path.exists():
            return
        other = differences(json.loads(path.read_text(encoding="utf-8")), self.settings)
        if other:
            raise ConfigError(
                f"{self.out} holds a run with other settings ({'; '.join(other[:3])})",
                "a run goes on only with the settings it was begun with",
                "name another directory, or remove this one",
            )

    def prepare(self) -> None:
        """Write everything OpenRLHF reads, and make interrupted work fit to go on from."""
        resolved = self.config
        write_text(self.out / "settings.json", json.dumps(self.settings, indent=2) + "\n")
        facts = write_prompts(
            self.problems, self.out / "prompts.jsonl", template=resolved.template, seed=resolved.seed,
            count=resolved.total_rollouts * resolved.prompts, max_tokens=resolved.max_prompt, model=self.model,
        )  # fmt: skip
        if len(self.files) > 1:
            split_prompts(
                self.out / "prompts.jsonl", [count * resolved.prompts for count in self.rollouts],
                lambda number: self.files[number].prompts,
            )  # fmt: skip
        ends, pad = end_texts(self.model)
        write_text(self.files[0].reward, reward_file(ends, pad, resolved.require_stop))
        argv = {"module": MODULE, "stages": self.vectors, "prompts": vars(facts)}
        write_text(self.out / "argv.json", json.dumps(argv, indent=2) + "\n")
        self._outcome.unlink(missing_ok=True)
        roles = ("_actor", "_critic") if resolved.algorithm == "ppo" else ("_actor",)
        for at in self.files:
            if not complete_mark(at).exists():
                settle(at.checkpoints, roles)
                for left in (at.model, critic_model(at.model)):
                    shutil.rmtree(left, ignore_errors=True)

    @property
    def _outcome(self) -> Path:
        return self.out / "stages" / "outcome.json"

    def job(self) -> dict[str, Any]:
        """This run as the driver reads it: the length stages that are not complete."""
        stages = [
            {"arguments": vector, "complete": str(complete_mark(at))}
            for vector, at in zip(self.vectors, self.files, strict=True)
            if not complete_mark(at).exists()
        ]
        return {"label": self.label, "outcome": str(self._outcome), "stages": stages}

    def outcome(self) -> str | None:
        """The error the driver reported; None for success, "" where it reported nothing."""
        if not self._outcome.exists():
            return ""
        return json.loads(self._outcome.read_text(encoding="utf-8"))["error"]

    def rollouts_done(self) -> int:
        """Rollouts recorded so far."""
        return sum(len(reader.read()) for reader in self.readers)

    def record(self) -> int:
        """Bring metrics.jsonl up to date; returns the rollouts done."""
        steps = [reader.read() for reader in self.readers]
        count = sum(len(stage) for stage in steps)
        if count != self._written:
            lines = metric_lines(steps, self.rollouts)
            write_metrics(self.out / "metrics.jsonl", lines)
            self._written, self.last_reward = count, lines[-1]["reward"] if lines else None
        return count

    def finish(self) -> str | None:
        """Check that the run is whole, export its model, drop the checkpoints; returns what is wrong, if anything."""
        count, last = self.record(), self.files[-1].model
        if count != self.config.total_rollouts:
            return f"{count} of {self.config.total_rollouts} rollouts recorded"
        if not (last / "config.json").exists():
            return f"OpenRLHF wrote no model to {last}"
        try:
            export_model(last, self.model, self.out / "model")
        except StageFailed as error:
            return str(error)
        lines = [json.loads(line) for line in (self.out / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
        facts = {
            "model": str(self.out / "model"),
            "rollouts": count,
            "first_reward": lines[0]["reward"],
            "last_reward": lines[-1]["reward"],
            "seconds": round(time.time() - self.seconds, 1),
            **self.settings,
        }
        write_text(self.done_file, json.dumps(facts, indent=2) + "\n")
        shutil.rmtree(self.out / "stages", ignore_errors=True)
        return None


def complete_mark(files: StageFiles) -> Path:
    """File whose presence says that a length stage came to its end."""
    return files.model.parent / "complete"


def end_texts(model: Path) -> tuple[list[str], str | None]:
    """Texts of the tokens that end a response, and of the padding token, as generation uses them.

    Raises:
        DataError: the tokenizer cannot be read.
    """
    prompt_tokenizer(model)
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(model / "tokenizer.json"))
    settings = json.loads((model / "tokenizer_config.json").read_text(encoding="utf-8"))
    generation = model / "generation_config.json"
    ids = json.loads(generation.read_text(encoding="utf-8")).get("eos_token_id") if generation.exists() else None
    texts = [
        tokenizer.id_to_token(number) for number in (ids if isinstance(ids, list) else [ids]) if number is not None
    ]
    own = special_text(settings.get("eos_token"))
    texts = [text for text in texts if text] or [own] * bool(own)
    return texts, special_text(settings.get("pad_token")) or own
