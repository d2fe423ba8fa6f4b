"""What a branch is: its parent, the token position it leaves from, and what it carries.

A fork is written down (`lineage.json`) before the branch trains, and the learning rate at the seam is
continuous because a branch that would jump is refused.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any, NamedTuple

from megatron_octo.config.load import differences
from megatron_octo.config.run import RunConfig
from megatron_octo.config.schedule import ScheduleConfig
from megatron_octo.errors import CheckpointError, ConfigError
from megatron_octo.schedule.learning_rate import learning_rate
from megatron_octo.units import format_tokens

LINEAGE = "lineage.json"
RELATIVE_TOLERANCE = 1e-9


class Origin(NamedTuple):
    """Where a branch comes from: the parent's run directory, one checkpoint in it, and its facts (run.json)."""

    parent: str
    checkpoint: str
    facts: dict[str, Any]


def lineage_record(run: RunConfig, origin: Origin) -> dict[str, Any]:
    """Describe a branch, checking that it may leave its parent where it says.

    Args:
        run: the branch; `run.start.fork` is set.
        origin: the parent's checkpoint and its facts: step, run_tokens, tokens, config, lineage.

    Returns:
        The lineage record: run, parent, checkpoint, position (tokens since the root of the tree), the
        parent's own tokens, the learning rate at the seam, what was carried, and the chain of ancestors.

    Raises:
        ConfigError: another model than the parent's, another optimizer form than the carried moments, or
            a learning rate that jumps at the fork.
    """
    fork = run.start.fork
    if fork is None:
        raise ConfigError(f"{run.name}: no fork is configured", fix="set start.fork.parent")
    facts, parent = origin.facts, RunConfig.model_validate(origin.facts["config"])
    _check_same_model(run, parent)
    if fork.moments:
        _check_moments(run, parent, facts)
    return {
        "run": run.name,
        "parent": origin.parent,
        "parent_run": parent.name,
        "checkpoint": origin.checkpoint,
        "position": facts["tokens"],
        "parent_step": facts["step"],
        "parent_run_tokens": facts["run_tokens"],
        "learning_rate": seam_rate(run.schedule, parent.schedule, facts["run_tokens"], run.name, parent.name),
        "carried": {
            "weights": True,
            "moments": fork.moments,
            "rng": f"fresh, seed {run.seed}",
            "data": f"fresh, seed {run.data.seed}",
        },
        "ancestors": _ancestors(parent.name, facts),
    }


def seam_rate(branch: ScheduleConfig, parent: ScheduleConfig, run_tokens: int, name: str, parent_name: str) -> float:
    """The learning rate both sides share at the fork.

    Args:
        branch: schedule of the branch; its first rate counts, so a warm-up is a jump to zero.
        parent: schedule of the parent.
        run_tokens: the parent's own tokens at the fork.
        name: the branch, for messages.
        parent_name: the parent, for messages.

    Raises:
        ConfigError: the two rates differ by more than 1e-9 of the parent's.
    """
    before, after = learning_rate(parent, run_tokens), learning_rate(branch, 0)
    if math.isclose(before, after, rel_tol=RELATIVE_TOLERANCE, abs_tol=0.0):
        return before
    raise ConfigError(
        f"branch '{name}' starts at learning rate {after:.10g}, but its parent '{parent_name}' is at "
        f"{before:.10g} where it forks ({run_tokens} tokens)",
        "the learning rate is continuous at a fork",
        f"set schedule.learning_rate to {before!r} and schedule.warmup to 0",
    )


def _check_same_model(run: RunConfig, parent: RunConfig) -> None:
    changed = differences(parent.model.model_dump(mode="json"), run.model.model_dump(mode="json"), "model")
    if changed:
        raise ConfigError(
            f"branch '{run.name}' has another model than its parent '{parent.name}': {'; '.join(changed)}",
            "a branch carries its parent's weights",
            "use the parent's model section",
        )


def _check_moments(run: RunConfig, parent: RunConfig, facts: dict[str, Any]) -> None:
    if not facts.get("moments", True):
        raise ConfigError(
            f"branch '{run.name}' asks for Adam's moments, but the checkpoint of '{parent.name}' holds weights only",
            fix="set start.fork.moments: false",
        )
    mine = {"dtype": run.dtype, "parallel.distributed_optimizer": run.parallel.distributed_optimizer}
    theirs = {"dtype": parent.dtype, "parallel.distributed_optimizer": parent.parallel.distributed_optimizer}
    changed = differences(theirs, mine)
    if changed:
        raise ConfigError(
            f"branch '{run.name}' cannot carry the moments of '{parent.name}': {'; '.join(changed)}",
            "optimizer state is stored in the form of its precision and optimizer",
            "keep these fields, or set start.fork.moments: false",
        )


def _ancestors(parent_name: str, facts: dict[str, Any]) -> list[dict[str, Any]]:
    """The chain from the parent to the root, nearest first; position is where the child left it."""
    nearest = {"run": parent_name, "position": facts["tokens"]}
    above = facts.get("lineage")
    if not above:
        return [nearest]
    return [nearest, *above.get("ancestors", [])]


def read_lineage(run_dir: Path) -> dict[str, Any]:
    """The lineage of a run: its `lineage.json`, or for a run without a parent the root of a tree.

    Raises:
        CheckpointError: not a run directory, or the file is damaged.
    """
    path = run_dir / LINEAGE
    if not path.is_file():
        if not (run_dir / "config.yaml").is_file():
            raise CheckpointError(f"{run_dir}: not a run directory", "it holds no config.yaml", "check the path")
        return {"run": run_dir.name, "parent": None, "position": 0, "ancestors": []}
    try:
        return dict(json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError) as error:
        raise CheckpointError(f"{path}: cannot be read ({error})") from None


def describe_lineage(lineage: dict[str, Any]) -> str:
    """The chain from the root to a run, a line each, as text for people."""
    names = [ancestor["run"] for ancestor in reversed(lineage["ancestors"])] + [lineage["run"]]
    left = [ancestor["position"] for ancestor in reversed(lineage["ancestors"])]
    lines = [names[0]]
    for depth, (name, position) in enumerate(zip(names[1:], left, strict=True), start=1):
        lines.append(f"{'  ' * depth}- {name}: forked from {names[depth - 1]} at {format_tokens(position)} tokens")
    if lineage.get("carried"):
        carried = lineage["carried"]
        moments = "with" if carried["moments"] else "without"
        lines.append(
            f"carried: weights, {moments} Adam's moments; random numbers {carried['rng']}; data {carried['data']}; "
            f"learning rate {lineage['learning_rate']:.6g} on both sides; checkpoint {lineage['checkpoint']}"
        )
    return "\n".join(lines)
