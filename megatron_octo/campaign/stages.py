"""A campaign file -> its stages: what each needs, runs, and writes. Only this module knows the order."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_octo.config.campaign import BranchConfig, CampaignConfig, Leg
from megatron_octo.config.check import check_run
from megatron_octo.config.evaluate import EvaluateConfig
from megatron_octo.config.layout import ParallelConfig
from megatron_octo.config.load import parse_config, write_yaml
from megatron_octo.config.rl import RLStageConfig
from megatron_octo.config.run import RunConfig
from megatron_octo.errors import ConfigError
from megatron_octo.evaluate.prompts import template
from megatron_octo.rl.argv import run_files
from megatron_octo.units import format_tokens


@dataclass(frozen=True)
class Stage:
    """One process of a campaign.

    Args:
        name: unique in the campaign; also names its log and state files.
        title: what it does, for people.
        needs: stages that must be done before.
        arguments: of the `octo` command line.
        cores: how many cores it keeps busy.
        results: what it writes last; without them it is not done, whatever its state says.
        file: the settings file it reads, if it reads one.
        settings: what that file says.
    """

    name: str
    title: str
    needs: tuple[str, ...]
    arguments: tuple[str, ...]
    cores: int = 1
    results: tuple[Path, ...] = ()
    file: Path | None = None
    settings: dict[str, Any] | None = None

    @property
    def is_there(self) -> bool:
        """Whether everything it leaves is there."""
        return all(path.exists() for path in self.results)


def write_settings(stages: list[Stage]) -> None:
    """Write the settings file of every stage that has one; only the process that holds the campaign may call this."""
    for stage in stages:
        if stage.file is not None and stage.settings is not None:
            write_yaml(stage.file, stage.settings)


def expand(config: CampaignConfig, out: Path, cores: int) -> list[Stage]:
    """List the stages of a campaign, needed ones first; writes nothing.

    Args:
        config: the campaign.
        out: campaign directory, absolute.
        cores: cores that stages may share, for stages that use all of them.

    Raises:
        ConfigError: a stage's settings break a rule; found here, before anything runs.
    """
    plan = _Plan(config, out, cores)
    return plan.stages()


class _Plan:
    def __init__(self, config: CampaignConfig, out: Path, cores: int) -> None:
        self.config, self.out, self.cores = config, out, cores

    def stages(self) -> list[Stage]:
        data = self._data()
        imported = self._import()
        stable = self._stable(("data", *(stage.name for stage in imported)))
        branches = [self._branch(name, branch, stable[-1].name) for name, branch in self.config.branches.items()]
        names = tuple(self.config.branches)
        convert = self._convert(names)
        tail = [convert, self._evaluate("base", {n: self.out / "hf" / n for n in names}, ("convert",))]
        if self.config.rl:
            tail.append(self._rl(names))
            tail.append(self._evaluate("rl", {n: self.out / "rl" / n / "model" for n in names}, ("rl",)))
        last = tuple(stage.name for stage in tail if stage.name.startswith("evaluate"))
        drawn = (self.out / "report" / "report.json",)
        report = Stage("report", "draw the report", last, ("campaign", "report", str(self.out)), results=drawn)
        return [data, *imported, *stable, *branches, *tail, report]

    def _data(self) -> Stage:
        file, out = self._file("data"), self.out / "data"
        settings = self.config.data.model_copy(update={"seed": self.config.seed}).model_dump(mode="json")
        arguments = ("data", "build", str(file), "--out", str(out))
        results = (out / "manifest.json",)
        return Stage("data", "generate, tokenise, index", (), arguments, 1, results, file, settings)

    def _import(self) -> list[Stage]:
        if self.config.start is None:
            return []
        arguments = ("convert", "from-hf", str(self.config.start.hf), str(self.out / "start"))
        results = (self.out / "start" / "seal.json",)
        return [Stage("start", "import the starting model", (), arguments, results=results)]

    def _stable(self, needs: tuple[str, ...]) -> list[Stage]:
        stages: list[Stage] = []
        for number, leg in enumerate(self.config.stable.legs, 1):
            name = "stable" if len(self.config.stable.legs) == 1 else f"stable-{number}"
            stages.append(self._stable_leg(name, leg, (stages[-1].name,) if stages else needs))
        return stages

    def _stable_leg(self, name: str, leg: Leg, needs: tuple[str, ...]) -> Stage:
        stable = self.config.stable
        schedule = {
            "kind": "constant",
            "learning_rate": stable.learning_rate,
            "warmup": stable.warmup,
            "tokens": stable.tokens,
        }
        start = {"checkpoint": str(self.out / "start")} if self.config.start else {}
        run = self._run(name, "stable", schedule, stable.mixture, leg.parallel, start, self.config.seed)
        until = ("--until", str(leg.until)) if leg.until else ()
        title = f"train to {format_tokens(leg.until or stable.tokens)} tokens, {leg.parallel.label}"
        return self._train(name, title, needs, run, until)

    def _branch(self, name: str, branch: BranchConfig, parent: str) -> Stage:
        rate = self.config.stable.learning_rate
        schedule = {"kind": "cosine", "learning_rate": rate, "final_ratio": branch.final_ratio, "tokens": branch.tokens}
        start = {"fork": {"parent": str(self.out / "stable"), "at": self._stable_end()}}
        seed = self.config.seed + 1 + list(self.config.branches).index(name)
        run = self._run(name, name, schedule, branch.mixture, branch.parallel, start, seed)
        title = f"decay over {format_tokens(branch.tokens)} tokens, {branch.parallel.label}"
        return self._train(name, title, (parent,), run)

    def _train(
        self, name: str, title: str, needs: tuple[str, ...], run: RunConfig, until: tuple[str, ...] = ()
    ) -> Stage:
        file, cores, results = self._file(name), run.parallel.processes, (run.out / "latest",)
        return Stage(
            name, title, needs, ("train", str(file), *until), cores, results, file, run.model_dump(mode="json")
        )

    def _stable_end(self) -> int:
        """Token position where the stable stage ends: its budget in whole steps."""
        training = self.config.training
        per_step = training.batch.global_batch * training.sequence_length
        return -(-self.config.stable.tokens // per_step) * per_step

    def _run(
        self, stage: str, run: str, schedule: dict[str, Any], mixture: dict[str, float],
        parallel: ParallelConfig, start: dict[str, Any], seed: int,
    ) -> RunConfig:  # fmt: skip
        training, data = self.config.training, self.out / "data"
        values = {
            "name": run,
            "out": str(self.out / run),
            "seed": seed,
            "model": self.config.model.model_dump(mode="json"),
            "parallel": parallel.model_dump(mode="json"),
            "dtype": training.dtype,
            "data": {
                "tokenizer": str(data / "tokenizer"),
                "mixture": {name: {"path": str(data / name), "weight": weight} for name, weight in mixture.items()},
                "sequence_length": training.sequence_length,
                "seed": seed,
            },
            "batch": training.batch.model_dump(mode="json"),
            "schedule": schedule,
            "optimizer": training.optimizer.model_dump(mode="json"),
            "start": start,
            "checkpoint": {"every": training.checkpoint_every, "keep": training.keep},
            "threads": 1,  # so that a stage keeps as many cores busy as it has processes, and branches fit side by side
        }
        config = parse_config(RunConfig, values, f"stage '{stage}'")
        try:
            check_run(config)
        except ConfigError as error:
            raise ConfigError(f"stage '{stage}': {error.what}", error.rule, error.fix) from None
        return config

    def _convert(self, names: tuple[str, ...]) -> Stage:
        arguments = ["convert", "to-hf"]
        for name in names:
            arguments += [str(self.out / name), str(self.out / "hf" / name)]
        results = tuple(self.out / "hf" / name / "certificate.json" for name in names)
        return Stage("convert", "to Hugging Face form, certified", names, tuple(arguments), results=results)

    def _rl(self, names: tuple[str, ...]) -> Stage:
        assert self.config.rl is not None
        common = self.config.rl.model_dump(mode="json", exclude_unset=True)
        common |= {"template": self.config.template, "seed": self.config.seed}
        values = {"rl": common, "runs": {name: self._rl_run(name) for name in names}}
        settings = parse_config(RLStageConfig, values, "stage 'rl'")
        for name, run in settings.runs.items():
            run_files(settings.resolved(name), run.model, run.out)
        title = f"{self.config.rl.algorithm.upper()} on {len(names)} branches in one Ray"
        file, results = self._file("rl"), tuple(self.out / "rl" / name / "model" / "config.json" for name in names)
        return Stage("rl", title, ("evaluate-base",), ("rl", "train", str(file)), self.cores, results, file, values)

    def _rl_run(self, name: str) -> dict[str, Any]:
        assert self.config.rl is not None
        one_length = self.config.rl.rollouts is not None  # else the length stages say how long responses may be
        return {
            "model": str(self.out / "hf" / name),
            "out": str(self.out / "rl" / name),
            "problems": str(self.out / "data" / "problems" / "train.jsonl"),
            "overrides": {"max_response": self.config.branches[name].max_new_tokens} if one_length else {},
        }

    def _evaluate(self, when: str, models: dict[str, Path], needs: tuple[str, ...]) -> Stage:
        lengths = {f"{name}-{when}": self.config.branches[name].max_new_tokens for name in models}
        values = {
            "models": {f"{name}-{when}": str(model) for name, model in models.items()},
            "problems": str(self.out / "data" / "problems" / "heldout.jsonl"),
            "out": str(self.out / "eval"),
            "template": self.config.template,
            "max_new_tokens": lengths,
            "samples": self.config.evaluation.samples,
            "batch_size": self.config.evaluation.batch_size,
            "threads": self.config.evaluation.threads,
            "seed": self.config.seed,
        }
        stage = f"evaluate-{when}"
        parse_config(EvaluateConfig, values, f"stage '{stage}'")
        template(self.config.template)
        file, results = self._file(stage), tuple(self.out / "eval" / f"{label}.json" for label in lengths)
        title, arguments = "held-out problems, greedy and sampled", ("eval", "run", str(file))
        return Stage(stage, title, needs, arguments, self.cores, results, file, values)

    def _file(self, stage: str) -> Path:
        return self.out / "stages" / f"{stage}.yaml"
