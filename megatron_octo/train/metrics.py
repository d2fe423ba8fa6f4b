"""What a run tells about each step: a line of metrics.jsonl and TensorBoard scalars."""

from __future__ import annotations

import json
import math
import os
import time
from typing import Any

from megatron_octo.config.run import RunConfig
from megatron_octo.train.facts import StepFacts, Verdict
from megatron_octo.train.start import METRICS
from megatron_octo.train.state import TrainState

TENSORBOARD = "tensorboard"
_SCALARS = ("loss", "learning_rate", "grad_norm", "tokens_per_second")


class Metrics:
    """Writes the metrics of one run; exactly one process holds one.

    Args:
        run: the run.
        step: steps already taken; later TensorBoard points of a killed attempt are hidden.
    """

    def __init__(self, run: RunConfig, step: int) -> None:
        self._file = os.open(run.out / METRICS, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
        self._board = _Board(str(run.out / TENSORBOARD), step)

    def write(self, state: TrainState, facts: StepFacts) -> None:
        """Write one step: a single append, so that a kill never leaves two halves of different lines."""
        line = metric_line(state, facts)
        os.write(self._file, (json.dumps(line) + "\n").encode())
        self._board.write(state.step, {name: line[name] for name in _SCALARS if line[name] is not None})

    def close(self) -> None:
        """Flush and close."""
        os.close(self._file)
        self._board.close()


def metric_line(state: TrainState, facts: StepFacts) -> dict[str, Any]:
    """One step as an object: positions in tokens, loss per token, rates, seconds, layout, Unix time.

    A step whose gradients were not used says `skipped` and why, and one after the FP8 sentinel moved layers says which
    are in BF16. JSON has no NaN: what is not finite is null.
    """
    moved = state.memory.get("sentinel", {}).get("bf16")
    used = {} if facts.verdict is Verdict.UPDATE else {"skipped": True, "why": facts.why}
    return {
        "step": state.step,
        "tokens": state.tokens,
        "run_tokens": state.run_tokens,
        "loss": _finite(facts.loss),
        "learning_rate": facts.learning_rate,
        "grad_norm": _finite(facts.grad_norm),
        "tokens_per_second": round(state.run.tokens_per_step / facts.seconds, 1) if facts.seconds else None,
        "seconds": round(facts.seconds, 5),
        "layout": state.run.parallel.label,
        "time": round(time.time(), 3),
        **used,
        **({"bf16_layers": moved} if moved else {}),
    }


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


class _Board:
    """TensorBoard events through its own writer: torch's wrapper costs seconds of imports at start."""

    def __init__(self, directory: str, step: int) -> None:
        from tensorboard.compat.proto import event_pb2, summary_pb2
        from tensorboard.summary.writer.event_file_writer import EventFileWriter

        self._event, self._summary = event_pb2.Event, summary_pb2.Summary
        self._writer = EventFileWriter(directory)
        log = event_pb2.SessionLog(status=event_pb2.SessionLog.START)
        self._writer.add_event(event_pb2.Event(wall_time=time.time(), step=step + 1, session_log=log))

    def write(self, step: int, scalars: dict[str, float]) -> None:
        values = [self._summary.Value(tag=f"train/{name}", simple_value=value) for name, value in scalars.items()]
        self._writer.add_event(self._event(wall_time=time.time(), step=step, summary=self._summary(value=values)))

    def close(self) -> None:
        self._writer.close()
