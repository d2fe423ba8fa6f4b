"""Which hooks a run has, in which order."""

from __future__ import annotations

from megatron_octo.model.precision import Precision, engine_switch
from megatron_octo.runtime.stop import StopSignals
from megatron_octo.train.hooks.base import Hook, Hooks
from megatron_octo.train.hooks.profile import Profile
from megatron_octo.train.hooks.report import ShowProgress, WriteMetrics
from megatron_octo.train.hooks.save import SaveCheckpoints
from megatron_octo.train.hooks.sentinel import Sentinel
from megatron_octo.train.hooks.statistics import WriteStatistics
from megatron_octo.train.hooks.stop import StopOnSignal
from megatron_octo.train.hooks.validate import Validate
from megatron_octo.train.hooks.watch import WatchNumbers
from megatron_octo.train.hooks.weights import WatchWeights
from megatron_octo.train.loggers import Loggers
from megatron_octo.train.setup import Engine
from megatron_octo.train.state import TrainState


def default_hooks(engine: Engine, state: TrainState, last: int, signals: StopSignals) -> Hooks:
    """The hooks of a training run. Checkpoints come after what writes lines, so that no save precedes its own."""
    loggers, saves = Loggers(), SaveCheckpoints()
    validate = Validate(engine, loggers)
    judges = [WatchWeights(engine), WatchNumbers()]
    reports = [WriteMetrics(engine, loggers), validate, ShowProgress(engine, validate, last)]
    # The sentinel comes first: what it replays belongs to no step's statistics, and metrics and checkpoints tell what
    # it decided. Statistics come before judges: a step that is judged badly leaves its own.
    hooks = [*sentinels(engine, state), WriteStatistics(engine, loggers), *judges, *reports, saves]
    return Hooks([*hooks, Profile(engine, hooks), StopOnSignal(signals, saves, last)], state)


def sentinels(engine: Engine, state: TrainState) -> list[Hook]:
    """The FP8 sentinel of a run, if it has one."""
    if state.run.fp8 is None or state.run.fp8.sentinel is None:
        return []
    return [Sentinel(engine, Precision(state.models, engine_switch), state.run.fp8.sentinel)]
