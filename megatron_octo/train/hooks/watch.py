"""Steps whose numbers are bad: what counts as bad, and what becomes of them."""

from __future__ import annotations

import math
import statistics
import sys
from typing import Any

from megatron_octo.checkpoint.store import standing
from megatron_octo.config.survive import WatchConfig
from megatron_octo.errors import StageFailed
from megatron_octo.train.facts import Gradients, Trouble, Verdict
from megatron_octo.train.hooks.base import Hook
from megatron_octo.train.rewind import passed_over
from megatron_octo.train.state import TrainState
from megatron_octo.train.statistics import EARLIEST, climb_bound, climb_text, remember, spike_bound

MEMORY = "numbers"
"""Where `state.memory` holds losses and norms of good steps, and the bad steps in a row."""

_VERDICTS = {"skip": Verdict.SKIP, "rewind": Verdict.REWIND}


class WatchNumbers(Hook):
    """Judges the loss and the gradient norm of each step as `watch` says.

    From the first step on a value that is not finite is bad; a spike needs `statistics.EARLIEST` good steps before it.
    Only good steps enter the statistics. A step that is passed over after a rewind counts as the bad one it was, so
    that patience sees the same row of bad steps with skips and with rewinds.

    Whatever the policy, a loss that climbs far above its lowest is told: a run can diverge without one bad number.
    """

    def open(self, state: TrainState) -> None:
        """Begin the statistics of a new run."""
        state.memory.setdefault(MEMORY, {"losses": [], "norms": [], "bad_in_a_row": 0})

    after_rewind = open

    def passes_over(self, state: TrainState) -> str:
        """Whether a rewind has put the coming step on its list."""
        step = state.step + 1
        bad = passed_over(state.memory).get(step)
        if bad is None:
            return ""
        if bad.step == step:
            state.memory[MEMORY]["bad_in_a_row"] += 1
        return f"passed over: {bad.why}" if bad.step == step else f"passed over: before the bad step {bad.step}"

    def before_update(self, state: TrainState, gradients: Gradients) -> Verdict:
        """Look at the numbers of a step; where a hook before this one has found a cause, they say nothing of the data.

        Raises:
            StageFailed: the policy is to stop, or this is the last of `patience` bad steps in a row; whatever
                checkpoint there is was taken before it.
        """
        if state.trouble is not None:
            return Verdict.UPDATE
        watch, memory = state.run.watch, state.memory[MEMORY]
        policy, why = _judge(watch, memory, gradients)
        if not why:
            memory["bad_in_a_row"] = 0
            remember(memory["losses"], gradients.loss, watch.window)
            remember(memory["norms"], gradients.norm, watch.window)
            _note_climb(memory, state.step + 1)
            return Verdict.UPDATE
        memory["bad_in_a_row"] += 1
        if policy == "stop":
            raise _stopped(state, why)
        if memory["bad_in_a_row"] >= watch.patience:
            raise _out_of_patience(state, why)
        state.trouble = Trouble(why, watch.rewind_skip if policy == "rewind" else 0)
        if policy == "skip":
            print(f"octo: step {state.step + 1} skipped: {why}", file=sys.stderr, flush=True)
        return _VERDICTS[policy]


def _note_climb(memory: dict[str, Any], step: int) -> None:
    """Keep the lowest median loss, the first loss of all among them, and since when the loss is far above it."""
    if len(memory["losses"]) < EARLIEST:
        return
    recent = statistics.median(memory["losses"][-EARLIEST:])  # which a single spike does not move
    lowest = memory["lowest"] = min(recent, memory.get("lowest", memory["losses"][0]))
    if recent <= climb_bound(lowest):
        memory.pop("climbed", None)
        return
    if "climbed" not in memory:
        print(f"octo: warning: step {step}: {climb_text(recent, lowest, step)}", file=sys.stderr, flush=True)
    memory["climbed"] = {"since": memory.get("climbed", {}).get("since", step), "loss": recent}


def _judge(watch: WatchConfig, memory: dict[str, Any], gradients: Gradients) -> tuple[str, str]:
    """The policy that applies, and what is wrong in words; empty for a good step."""
    if not (math.isfinite(gradients.loss) and math.isfinite(gradients.norm)):
        return watch.nonfinite, f"loss is {gradients.loss}, gradient norm is {gradients.norm}"
    if watch.spike == "ignore":
        return "ignore", ""
    found = (("loss", gradients.loss, memory["losses"]), ("gradient norm", gradients.norm, memory["norms"]))
    for name, value, before in found:
        bound = spike_bound(before, watch.sigma)
        if value > bound:
            return watch.spike, f"{name} {value:.6g} is a spike, above {bound:.6g} (watch.sigma {watch.sigma:g})"
    return "ignore", ""


def _stopped(state: TrainState, why: str) -> StageFailed:
    return StageFailed(
        f"step {state.step + 1} ({state.tokens} tokens): {why}",
        f"a run stops at the first value that is not a finite number, or as watch.* says; {standing(state.run.out)}",
        "look at the data of this step (octo data inspect), let it be passed over (watch.nonfinite=skip or rewind), or "
        "start anew in another `out` with a lower schedule.learning_rate or optimizer.clip",
    )


def _out_of_patience(state: TrainState, why: str) -> StageFailed:
    patience = state.run.watch.patience
    return StageFailed(
        f"step {state.step + 1} ({state.tokens} tokens): {why}; the last of {patience} bad steps in a row "
        "(watch.patience)",
        f"numbers that stay bad are not chance; {standing(state.run.out)}",
        "look at the data from here on; if the level has changed for good, raise watch.sigma; if training diverges, "
        "start a new run from an earlier one (start.checkpoint) with a lower schedule.learning_rate or optimizer.clip",
    )
