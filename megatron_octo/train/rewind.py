"""Going back to the last sealed checkpoint, and passing over the batches that led astray.

What is passed over is written to `rewinds.json` before the run goes back; files with a line for each step are cut by
those who write them, last. A run that is killed at any point of a rewind starts from the same checkpoint with the same
list, and so comes to the same end.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any, NamedTuple

from megatron_octo.checkpoint.save import load_checkpoint, on_rank_zero
from megatron_octo.checkpoint.store import (
    POINTER,
    latest_checkpoint,
    point_at,
    retire,
    sealed_checkpoints,
    sealed_facts,
)
from megatron_octo.errors import StageFailed
from megatron_octo.files import write_json
from megatron_octo.train.facts import Trouble
from megatron_octo.train.hooks.base import Hooks
from megatron_octo.train.start import REWINDS, known_rewinds
from megatron_octo.train.state import TrainState


class Bad(NamedTuple):
    """A bad step, counted from 1, and what was wrong with it."""

    step: int
    why: str


def passed_over(memory: dict[str, Any]) -> dict[int, Bad]:
    """The steps, counted from 1, whose batches are passed over, each with the bad step it leads to.

    Args:
        memory: `TrainState.memory`.
    """
    steps: dict[int, Bad] = {}
    for one in memory.get(REWINDS, []):
        for step in one["passed_over"]:
            if steps.get(step, Bad(0, "")).step != step:
                steps[step] = Bad(one["step"], one["why"])
    return steps


def rewind(state: TrainState, hooks: Hooks) -> None:
    """Go back to the last sealed checkpoint after a bad step; collective over all ranks.

    Afterwards step, weights, moments and memory are the checkpoint's, and metrics.jsonl ends with its step. Batches
    before the checkpoint are in its weights and cannot be passed over.

    Args:
        state: with the `trouble` of the bad step, `state.step + 1`.
        hooks: hear of it before and after.

    Raises:
        StageFailed: there is no checkpoint yet, or weights changed by themselves and no policy is to rewind, or time
            and again.
        CheckpointError: the checkpoint is damaged.
    """
    with state.apart("a rewind"):
        hooks.before_rewind(state)
        checkpoint, facts, rewinds = on_rank_zero(lambda: _go_back(state))
        load_checkpoint(checkpoint, state.models, state.optimizer, moments=True)
    state.step, state.memory = facts["step"], facts.get("memory", {}) | {REWINDS: rewinds}
    hooks.after_rewind(state)


def _go_back(state: TrainState) -> tuple[Path, dict[str, Any], list[dict[str, Any]]]:
    """Choose the checkpoint and write down what is passed over: what rank 0 does for all."""
    run, trouble, bad = state.run, state.trouble, state.step + 1
    assert trouble is not None
    checkpoint = _target(run.out, trouble, bad)
    if "rewind" not in (run.watch.nonfinite, run.watch.spike):
        raise StageFailed(
            f"step {bad}: {trouble.why}",
            f"a run stops here unless a policy of `watch` is rewind; {checkpoint.name} is from before",
            "take the named rank's machine out, then start the same command again; or set watch.nonfinite=rewind",
        )
    facts = sealed_facts(checkpoint)
    over = list(range(max(facts["step"] + 1, bad - trouble.passed_over + 1), bad + 1))
    entry = {"step": bad, "why": trouble.why, "to": facts["step"], "passed_over": over}
    rewinds = [*known_rewinds(run.out, state.memory), entry]
    _check_patience(rewinds, run.watch.patience)
    write_json(run.out / REWINDS, rewinds)
    said = f", passing over {_span(over)}" if over else ""
    print(f"octo: step {bad}: {trouble.why}; back to {checkpoint.name}{said}", file=sys.stderr, flush=True)
    return checkpoint, facts, rewinds


def _target(run_dir: Path, trouble: Trouble, bad: int) -> Path:
    """The newest sealed checkpoint that can be trusted; those taken after the trouble began are withdrawn."""
    sealed = sealed_checkpoints(run_dir)
    doubtful = [path for path in sealed if trouble.since is not None and sealed_facts(path)["step"] > trouble.since]
    trusted = [path for path in sealed if path not in doubtful]
    if doubtful and trusted:
        point_at(run_dir, trusted[-1].name)
    for path in reversed(doubtful):
        retire(path)
    if doubtful and not trusted:  # last: without it a kill before would leave the next doubtful one in charge
        (run_dir / POINTER).unlink(missing_ok=True)
    if not trusted:
        raise StageFailed(
            f"step {bad}: {trouble.why}; there is no checkpoint to go back to yet",
            "a rewind goes to the last sealed checkpoint of this run, not to its start",
            "start the same command again: it begins anew; a smaller checkpoint.every gives it a place to go back to; "
            "with watch.nonfinite=skip or watch.spike=skip it needs none",
        )
    return latest_checkpoint(run_dir)


def _check_patience(rewinds: list[dict[str, Any]], patience: int) -> None:
    """Rewinds that pass nothing over could go on for ever between the same two places."""
    last = rewinds[-1]
    again = [one for one in rewinds if not one["passed_over"] and one["to"] == last["to"]]
    if not last["passed_over"] and len(again) >= patience:
        raise StageFailed(
            f"step {last['step']}: {last['why']}; the last of {patience} rewinds to step {last['to']} (watch.patience)",
            "weights that change by themselves time and again mean a broken machine",
            "take the named rank's machine out, then start the same command again",
        )


def _span(steps: list[int]) -> str:
    return f"step {steps[0]}" if len(steps) == 1 else f"steps {steps[0]} to {steps[-1]}"
