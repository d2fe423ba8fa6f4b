"""The training loop: set up, step until the end, and let hooks do the rest."""

from __future__ import annotations

import os
from contextlib import ExitStack

import torch

from megatron_octo.config.run import RunConfig
from megatron_octo.runtime import groups, quick_import
from megatron_octo.runtime.stop import StopSignals
from megatron_octo.runtime.watchdog import GROUP_PATIENCE, watch_ranks

quick_import.import_megatron()  # before the modules below import it

# ruff: noqa: E402
from megatron_octo.train.facts import Verdict
from megatron_octo.train.hooks.default import default_hooks
from megatron_octo.train.rewind import rewind
from megatron_octo.train.setup import set_up
from megatron_octo.train.start import last_step, only_trainer
from megatron_octo.train.state import TrainState
from megatron_octo.train.step import train_step


def train(run: RunConfig, until: int | None = None, signals: StopSignals | None = None) -> TrainState:
    """Train a run, or go on with it; every rank calls this.

    Args:
        run: the checked configuration.
        until: stop, with a checkpoint, at the first step that reaches this many tokens of the run.
        signals: the process's own, where it has taken them over; else they are taken over meanwhile.

    Returns:
        The state after the last step.

    Raises:
        OctoError: a mistake or condition the user can act on; the last checkpoint stays.
    """
    with ExitStack() as stack:
        signals = signals or stack.enter_context(StopSignals())
        if _is_first():
            stack.enter_context(only_trainer(run.out))
        if run.threads:
            torch.set_num_threads(run.threads)
        runtime = groups.initialize(run.parallel, run.seed, run.timeout_minutes * GROUP_PATIENCE)
        watchdog = stack.enter_context(watch_ranks(runtime, run.timeout_minutes))
        engine, state = set_up(run, runtime)
        last = last_step(run, until)
        watchdog.follow(lambda: f"step {state.step + 1} of {last}", lambda: state.aside)
        with default_hooks(engine, state, last, signals) as hooks:
            while state.step < last:
                facts = train_step(engine, state, hooks)
                if facts.verdict is Verdict.REWIND:
                    rewind(state, hooks)
                    continue
                hooks.after_step(state, facts)
                if facts.stop:
                    break
            hooks.finish(state)
        groups.shutdown()
    return state


def _is_first() -> bool:
    return int(os.environ.get("RANK", "0")) == 0
