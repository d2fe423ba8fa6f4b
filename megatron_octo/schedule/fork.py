"""What a branch is: its parent, the token position it leaves from, and what it carries.

A fork is written down (`lineage.json`) before the branch trains. The learning rate at the seam is continuous: a
branch that states none starts with its parent's, and one whose rate would jump is refused.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any, NamedTuple

from megatron_octo.config.blends import Blend, blends_of, read_so_far
from megatron_octo.config.load import differences
from megatron_octo.config.run import RunConfig
from megatron_octo.config.schedule import ScheduleConfig
from megatron_octo.errors import ConfigError
from megatron_octo.files import hash_json, write_json
from megatron_octo.schedule.learning_rate import learning_rate

LINEAGE = "lineage.json"
FORKS = "forks"
RELATIVE_TOLERANCE = 1e-9


class Origin(NamedTuple):
    """Where a branch comes from.

    Args:
        parent: run directory of the parent, absolute.
        checkpoint: name of the checkpoint in it.
        seal: digest of that checkpoint's seal.
        facts: what its `run.json` says: step, run_tokens, tokens, lineage, moments.
        run: the parent's configuration there.
    """

    parent: str
    checkpoint: str
    seal: str
    facts: dict[str, Any]
    run: RunConfig


def with_parents_rate(run: RunConfig, origin: Origin) -> RunConfig:
    """Fill in the peak of a branch that states none: its parent's learning rate where it leaves.

    Raises:
        ConfigError: the parent's rate there is zero.
    """
    if run.schedule.learning_rate is not None:
        return run
    rate = learning_rate(origin.run.schedule, origin.facts["run_tokens"])
    if rate == 0:
        raise ConfigError(
            f"branch '{run.name}' would start with the learning rate of its parent '{origin.run.name}', which is 0 "
            f"where it forks ({origin.facts['run_tokens']} tokens)",
            "a branch that states no schedule.learning_rate takes its parent's",
            "fork elsewhere, or state schedule.learning_rate and a schedule.warmup that starts at 0",
        )
    return run.model_copy(update={"schedule": run.schedule.model_copy(update={"learning_rate": rate})})


def lineage_record(run: RunConfig, origin: Origin) -> dict[str, Any]:
    """Describe a branch, checking that it may leave its parent where it says.

    Args:
        run: the branch; `run.start.fork` and its learning rate are set.
        origin: where it comes from.

    Returns:
        The lineage record: run, parent, checkpoint and its seal, position (tokens since the root of the tree), the
        parent's own tokens, the learning rate at the seam, what was carried, the window of the data order that the
        branch begins with, the blends of the windows before it, and the chain of ancestors.

    Raises:
        ConfigError: another model than the parent's, another optimizer form than the carried moments, windows that
            are cut or drawn otherwise than the parent's although they should go on, or a learning rate that jumps at
            the fork.
    """
    fork = run.start.fork
    if fork is None:
        raise ConfigError(f"{run.name}: no fork is configured", fix="set start.fork.parent")
    facts, parent = origin.facts, origin.run
    _check_same_model(run, parent)
    if fork.moments:
        _check_moments(run, parent, facts)
    window, history = _read_on(run, origin) if fork.data == "continue" else (0, [])
    return {
        "run": run.name,
        "parent": origin.parent,
        "parent_run": parent.name,
        "checkpoint": origin.checkpoint,
        "seal": origin.seal,
        "position": facts["tokens"],
        "parent_step": facts["step"],
        "parent_run_tokens": facts["run_tokens"],
        "learning_rate": seam_rate(run.schedule, parent.schedule, facts["run_tokens"], run.name, parent.name),
        "carried": {
            "weights": True,
            "moments": fork.moments,
            "rng": "none is drawn",
            "data": _in_words(run, window, history) if fork.data == "continue" else f"fresh, seed {run.data.seed}",
        },
        "first_window": window,
        "history": [blend._asdict() for blend in history],
        "ancestors": _ancestors(origin),
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
        f"leave schedule.learning_rate out, or set it to {before:.10g}; and set schedule.warmup to 0",
    )


def record_fork(run: RunConfig, lineage: dict[str, Any]) -> bool:
    """Leave a record of a branch in its parent's run directory, in place of an earlier one of the same branch.

    Its file is named by the checkpoint first, so that the checkpoint stays pinned even if the content is damaged.

    Returns:
        Whether the parent's directory could be written.
    """
    folder, out = Path(lineage["parent"]) / FORKS, str(run.out.resolve())
    branch = f"{run.name}-{hash_json(out)[:8]}.json"
    kept = folder / f"{lineage['checkpoint']}--{branch}"
    facts = {key: lineage[key] for key in ("run", "checkpoint", "position")} | {"out": out}
    try:
        write_json(kept, facts)
        for path in folder.glob(f"*--{branch}"):
            if path != kept:
                path.unlink()
    except OSError:
        return False
    return True


def pinned_checkpoints(run_dir: Path) -> set[str]:
    """Names of the checkpoints of a run that branches left from; they are never pruned."""
    return {path.name.partition("--")[0] for path in (run_dir / FORKS).glob("*--*.json")}


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


def _read_on(run: RunConfig, origin: Origin) -> tuple[int, list[Blend]]:
    """The window the parent would have read next, and the blends of all before it.

    The mixture may be another from here on: each source goes on after the windows that were read of it.
    """
    parent = origin.run
    theirs, mine = _windows_of(parent, run), _windows_of(run, parent)
    changed = differences(theirs, mine, "data")
    if changed:
        raise ConfigError(
            f"branch '{run.name}' cannot read on where its parent '{parent.name}' was: {'; '.join(changed)}",
            "seed, sequence length and datasets make the windows; only which of them come next may change",
            "keep them, or set start.fork.data: fresh",
        )
    lineage = origin.facts.get("lineage") or {}
    begun = lineage.get("first_window", 0)
    window = begun + origin.facts["step"] * parent.batch.global_batch
    return window, read_so_far(blends_of(parent.data, begun, lineage.get("history", ())), window)


def _windows_of(run: RunConfig, other: RunConfig) -> dict[str, Any]:
    """What the windows of the sources that two runs share are made of."""
    shared = run.data.paths.keys() & other.data.paths.keys()
    mixture = {name: {"path": str(run.data.paths[name])} for name in shared}
    return {"seed": run.data.seed, "sequence_length": run.data.sequence_length, "mixture": mixture}


def _in_words(run: RunConfig, window: int, history: list[Blend]) -> str:
    before, after = history[-1:], blends_of(run.data, window, [blend._asdict() for blend in history])
    now = next(blend for blend in reversed(after) if blend.first <= window)
    if not before or before[0].weights == now.weights:
        return f"goes on at window {window}"
    was, becomes = (", ".join(f"{name} {weight:g}" for name, weight in one.weights.items()) for one in (*before, now))
    return f"goes on at window {window} with another mixture: {becomes} (was {was})"


def _ancestors(origin: Origin) -> list[dict[str, Any]]:
    """The chain from the parent to the root, nearest first; position is where the child left it."""
    nearest = {"run": origin.run.name, "position": origin.facts["tokens"], "path": origin.parent}
    return [nearest, *(origin.facts.get("lineage") or {}).get("ancestors", [])]
