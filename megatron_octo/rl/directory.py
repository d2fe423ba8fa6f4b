"""The directory of one reinforcement run: what is in it before, while and after OpenRLHF runs.

prompts.jsonl, reward.py, argv.json, settings.json, metrics.jsonl, tensorboard/, stages/ (work in progress, with
checkpoints) and, when it is finished, model/ and done.json.
"""

from __future__ import annotations

import json
import shutil
import time
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from megatron_octo.config.load import differences
from megatron_octo.config.rl import RLConfig, RLStageConfig
from megatron_octo.errors import ConfigError, DataError, EnvironmentProblem, StageFailed
from megatron_octo.files import hash_file, hold, write_json, write_text
from megatron_octo.rl.argv import StageFiles, critic_model, run_files, run_vectors
from megatron_octo.rl.export import export_model
from megatron_octo.rl.parser import MODULE
from megatron_octo.rl.prompts import split_prompts, write_prompts
from megatron_octo.rl.records import EventReader, metric_lines, write_metrics
from megatron_octo.rl.resume import settle
from megatron_octo.rl.reward import reward_file
from megatron_octo.rl.tokens import read_tokenizer


@dataclass
class RunDirectory:
    """One run of the stage, with everything it keeps on disk."""

    label: str
    model: Path
    out: Path
    problems: Path
    config: RLConfig
    files: list[StageFiles]
    vectors: list[list[str]]
    settings: dict[str, Any]
    readers: list[EventReader]
    started: float
    last_reward: float | None = None
    _written: int = -1

    @classmethod
    def of(cls, config: RLStageConfig, label: str, certificate: dict[str, Any]) -> RunDirectory:
        """The directory of a run; nothing is written yet.

        Raises:
            ConfigError: a setting that we or OpenRLHF refuse.
            DataError: the problems cannot be read.
        """
        run, resolved = config.runs[label], config.resolved(label)
        files = run_files(resolved, run.model, run.out)
        settings = {
            "config": resolved.model_dump(mode="json"),
            "target": config.target,
            "certificate": certificate.get("self_sha256"),
            "problems": _hash(run.problems),
        }
        return cls(
            label, run.model.absolute(), run.out.absolute(), run.problems, resolved, files,
            run_vectors(config, label), settings, [EventReader(at.tensorboard / at.name) for at in files], time.time(),
        )  # fmt: skip

    @property
    def done_file(self) -> Path:
        """Written last; its presence says the run is finished."""
        return self.out / "done.json"

    @property
    def rollouts(self) -> list[int]:
        """Rollouts of each length stage."""
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

    def claim(self) -> IO[str]:
        """Keep other processes out as long as the returned file is open.

        Raises:
            EnvironmentProblem: another process is at work here, or the directory cannot be written.
        """
        try:
            return hold(self.out)
        except BlockingIOError as error:
            raise EnvironmentProblem(
                f"{self.out}: another process is running this stage (process {error.strerror})",
                "two would destroy each other's checkpoints",
                "wait for it, or name another directory",
            ) from None
        except OSError as error:
            raise EnvironmentProblem(f"{self.out}: cannot be written ({error.strerror})", fix="check `out`") from None

    def prepare(self) -> None:
        """Write everything OpenRLHF reads, and make interrupted work fit to go on from."""
        resolved, special = self.config, read_tokenizer(self.model)
        facts = write_prompts(
            self.problems, self.out / "prompts.jsonl", template=resolved.template, seed=resolved.seed,
            count=resolved.total_rollouts * resolved.prompts, max_tokens=resolved.max_prompt, tokenizer=special,
            bos=resolved.bos,
        )  # fmt: skip
        if len(self.files) > 1:
            split_prompts(
                self.out / "prompts.jsonl", [count * resolved.prompts for count in self.rollouts],
                lambda number: self.files[number].prompts,
            )  # fmt: skip
        write_text(self.files[0].reward, reward_file(special.ends, special.pad, resolved.require_stop))
        argv = {"module": MODULE, "stages": self.vectors, "prompts": vars(facts)}
        write_json(self.out / "argv.json", argv)
        write_json(self.out / "settings.json", self.settings)
        self._outcome.unlink(missing_ok=True)
        for at, reader in zip(self.files, self.readers, strict=True):
            if not complete_mark(at).exists():
                self._settle(at, reader)
        self.record()

    def _settle(self, at: StageFiles, reader: EventReader) -> None:
        """Make one interrupted length stage fit to go on from; what it did after its last checkpoint is forgotten."""
        roles = ("_actor", "_critic") if self.config.algorithm == "ppo" else ("_actor",)
        step = settle(at.checkpoints, roles)
        reader.forget_after(step)
        for left in (at.model, critic_model(at.model), *([reader.directory] if step == 0 else [])):
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
        """The error the driver reported, None for success; that it reported nothing is an error too."""
        if not self._outcome.exists():
            return f"ended without an outcome; see {self.out.parent}"
        return json.loads(self._outcome.read_text(encoding="utf-8"))["error"]

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
        for at, reader, rollouts in zip(self.files, self.readers, self.rollouts, strict=True):
            found = len(reader.read())
            if found != rollouts or not (at.model / "config.json").exists():
                complete_mark(at).unlink(missing_ok=True)  # the next start does the stage again
                return (
                    f"{at.name} ended with {found} of {rollouts} rollouts recorded, or without a model; see {self.out}"
                )
        try:
            export_model(self.files[-1].model, self.model, self.out / "model")
        except StageFailed as error:
            return str(error)
        self.record()
        write_json(self.done_file, self._facts())
        shutil.rmtree(self.out / "stages", ignore_errors=True)
        return None

    def _facts(self) -> dict[str, Any]:
        lines = [json.loads(line) for line in (self.out / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
        return {
            "model": str(self.out / "model"),
            "rollouts": len(lines),
            "first_reward": lines[0]["reward"],
            "last_reward": lines[-1]["reward"],
            "seconds": round(time.time() - self.started, 1),
            **self.settings,
        }


def complete_mark(files: StageFiles) -> Path:
    """File whose presence says that a length stage came to its end."""
    return files.model.parent / "complete"


def _hash(path: Path) -> str:
    try:
        return hash_file(path)
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error})", fix="name the problems file of the run") from None
