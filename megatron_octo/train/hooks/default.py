"""Which hooks a run has, in which order."""

from __future__ import annotations

from megatron_octo.model.precision import Precision, engine_switch
from megatron_octo.runtime.stop import StopSignals
from megatron_octo.train.hooks.base import Hooks
from megatron_octo.train.hooks.report import ShowProgress, WriteMetrics
from megatron_octo.train.hooks.save import SaveCheckpoints
from megatron_octo.train.hooks.sentinel import Sentinel
from megatron_octo.train.hooks.stop import StopOnSignal
from megatron_octo.train.hooks.watch import WatchNumbers
from megatron_octo.train.hooks.weights import WatchWeights
from megatron_octo.train.setup import Engine
from megatron_octo.train.state import TrainState


def default_hooks(engine: Engine, state: TrainState, last: int, signals: StopSignals) -> Hooks:
    """The hooks of a training run. Checkpoints come after metrics, so that a save never precedes its own line."""
    hooks = [WatchWeights(engine), WatchNumbers()]
    if state.run.fp8 is not None and state.run.fp8.sentinel is not None:
        # Before the metrics and the checkpoint of a step, which tell what it decided.
        hooks.insert(0, Sentinel(engine, Precision(state.models, engine_switch), state.run.fp8.sentinel))
    reports = [WriteMetrics(engine), ShowProgress(engine, last)]
    saves = SaveCheckpoints()
    return Hooks([*hooks, *reports, saves, StopOnSignal(signals, saves)], state)
