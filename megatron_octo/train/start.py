"""Where a run starts: from nothing, from given weights, as a branch, or where it stopped. Needs no torch."""

from __future__ import annotations

import json
from pathlib import Path
from typing import IO, Any, NamedTuple

from megatron_octo.checkpoint.seal import seal_digest
from megatron_octo.checkpoint.store import (
    FACTS,
    checkpoint_at,
    has_checkpoint,
    latest_checkpoint,
    read_facts,
    remove_leftovers,
)
from megatron_octo.config.load import differences, dump_config, parse_config
from megatron_octo.config.model import ModelConfig
from megatron_octo.config.run import RunConfig
from megatron_octo.errors import CheckpointError, ConfigError, DataError, EnvironmentProblem
from megatron_octo.files import hold, write_json, write_text
from megatron_octo.schedule.fork import LINEAGE, Origin, lineage_record

METRICS = "metrics.jsonl"
CONFIG = "config.yaml"
_LOCK_PATIENCE = 3.0  # seconds: a killed predecessor needs a moment to die
_MAY_CHANGE = (
    "parallel", "recompute", "fp8", "transformer_impl", "optimizer.implementation", "checkpoint", "watch",
    "validation", "logging", "threads", "timeout_minutes", "stop_grace_seconds", "out",
)  # fmt: skip
_MUST_STAY = "parallel.distributed_optimizer"


class Start(NamedTuple):
    """How a run begins.

    Args:
        checkpoint: what to load; None for random initial weights.
        moments: whether the optimizer's state is loaded too.
        step: steps this run has already taken.
        root_tokens: tokens of the lineage before this run.
        lineage: the record of a branch.
        memory: what hooks remembered; empty for a new run, a branch among them.
    """

    checkpoint: Path | None
    moments: bool
    step: int
    root_tokens: int
    lineage: dict[str, Any] | None
    memory: dict[str, Any] = {}


def plan_start(run: RunConfig) -> Start:
    """Decide where a run starts, changing nothing.

    Raises:
        ConfigError: the run exists and differs in a field that may not change, or a branch does not continue
            its parent.
        CheckpointError: a pointer, parent or checkpoint is not there.
        DataError: a new run's tokenizer is not there.
    """
    if has_checkpoint(run.out):
        return _resume(run)
    if not run.data.tokenizer.is_dir():
        raise DataError(
            f"data.tokenizer = {run.data.tokenizer}: no such directory",
            "the trained model is exported with the tokenizer of its data",
            "name the one that `octo data build` wrote or used",
        )
    if run.start.fork is not None:
        return _fork(run)
    if run.start.checkpoint is not None:
        return Start(_given(run), moments=False, step=0, root_tokens=0, lineage=None)
    return Start(None, moments=False, step=0, root_tokens=0, lineage=None)


def last_step(run: RunConfig, until: int | None) -> int:
    """The step a leg of the run ends with: all of it, or the first that reaches `until` tokens."""
    return run.steps if until is None else min(run.steps, -(-until // run.tokens_per_step))


def open_run(run: RunConfig) -> Start:
    """Make a run directory ready to train in; only rank 0, holding the lock, may call this.

    Removes what a killed save left, writes `config.yaml` and a branch's `lineage.json`, and cuts lines of
    `metrics.jsonl` that lie beyond the checkpoint.

    Raises:
        ConfigError: see `plan_start`.
        CheckpointError: see `plan_start`.
    """
    start = plan_start(run)
    remove_leftovers(run.out)
    dump_config(run, run.out / CONFIG)
    if start.lineage is not None:
        write_json(run.out / LINEAGE, start.lineage)
    cut_metrics(run.out / METRICS, start.step)
    return start


def only_trainer(run_dir: Path) -> IO[str]:
    """Claim a run directory while the returned context is open.

    Raises:
        EnvironmentProblem: another process holds it, or the directory cannot be written.
    """
    try:
        return hold(run_dir, _LOCK_PATIENCE)
    except BlockingIOError as error:
        raise EnvironmentProblem(
            f"{run_dir}: another process trains here (process {error.strerror})",
            "two processes on one run directory would destroy each other's checkpoints",
            "wait for it, stop it, or choose another `out`",
        ) from None
    except OSError as error:
        raise EnvironmentProblem(f"{run_dir}: cannot be written ({error.strerror})", fix="check `out`") from None


def cut_metrics(path: Path, step: int) -> None:
    """Keep the metric lines of steps 1 to `step`; later ones, and a line cut off by a kill, are dropped."""
    if not path.exists():
        return
    lines = path.read_text(encoding="utf-8", errors="replace").splitlines(keepends=True)
    kept = [line for line in lines if line.endswith("\n") and 0 < _step_of(line) <= step]
    if len(kept) < len(lines):
        write_text(path, "".join(kept))


def _resume(run: RunConfig) -> Start:
    checkpoint = latest_checkpoint(run.out)
    facts = read_facts(checkpoint)
    _check_same_run(run, facts["config"], checkpoint)
    return Start(
        checkpoint,
        True,
        facts["step"],
        facts["tokens"] - facts["run_tokens"],
        facts.get("lineage"),
        facts.get("memory", {}),
    )


def _check_same_run(run: RunConfig, before: dict[str, Any], checkpoint: Path) -> None:
    now = run.model_dump(mode="json")
    changed = [line for line in differences(before, now) if not _allowed(line, before, now)]
    if changed:
        raise ConfigError(
            f"{checkpoint.parent.parent}: this run has trained with other settings: {'; '.join(changed)}",
            "a run goes on with its own data order, model and schedule; only parallel, checkpoint, threads, "
            "timeout_minutes and a longer constant schedule may change",
            "restore these fields, or choose another `out` for a new run",
        )


def _allowed(line: str, before: dict[str, Any], now: dict[str, Any]) -> bool:
    field = line.split(":", 1)[0]
    if field == "schedule.tokens":
        longer = now["schedule"]["tokens"] > before["schedule"]["tokens"]
        return longer and now["schedule"]["kind"] == "constant"
    return field.startswith(_MAY_CHANGE) and field != _MUST_STAY


def _fork(run: RunConfig) -> Start:
    fork = run.start.fork
    assert fork is not None
    checkpoint = checkpoint_at(fork.parent, fork.at)
    facts = read_facts(checkpoint)
    record = lineage_record(run, Origin(str(fork.parent), checkpoint.name, facts))
    record["seal"] = seal_digest(checkpoint)
    return Start(checkpoint, fork.moments, 0, facts["tokens"], record)


def _given(run: RunConfig) -> Path:
    """The checkpoint a run starts from, named itself or by its run directory; it must hold this run's model.

    Tensors alone do not tell: another RoPE or norm epsilon has the same shapes, and would train without an error.
    """
    named = run.start.checkpoint
    assert named is not None
    if (named / FACTS).is_file():
        checkpoint = named
    elif has_checkpoint(named):
        checkpoint = latest_checkpoint(named)
    else:
        raise CheckpointError(f"{named}: no checkpoint here", "start.checkpoint names a sealed one", "check the path")
    facts = read_facts(checkpoint)
    stored = facts.get("model") or facts.get("config", {}).get("model")
    theirs = parse_config(ModelConfig, stored, f"{checkpoint / FACTS}: model") if stored else run.model
    changed = differences(_of_weights(theirs), _of_weights(run.model), "model")
    if changed:
        raise ConfigError(
            f"{checkpoint} holds another model than this run's: {'; '.join(changed)}",
            "weights mean something only in the model they were trained in",
            "copy the model section that its run.json shows",
        )
    return checkpoint


def _of_weights(model: ModelConfig) -> dict[str, Any]:
    """The settings that give weights their meaning; how they were drawn, and the longest text, are none."""
    return model.model_dump(mode="json", exclude={"init_std", "max_positions"})


def _step_of(line: str) -> int:
    try:
        return int(json.loads(line)["step"])
    except (ValueError, KeyError, TypeError):
        return -1
