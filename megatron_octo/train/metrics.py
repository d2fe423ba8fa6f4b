"""What a run tells about each step: lines of JSON, one object each, that a kill or a full disk cannot tear."""

from __future__ import annotations

import errno
import json
import math
import os
import time
from pathlib import Path
from typing import Any

import torch

from megatron_octo.train.cost import Cost
from megatron_octo.train.facts import StepFacts, Verdict
from megatron_octo.train.start import cut_metrics
from megatron_octo.train.state import TrainState


class LineFile:
    """A file of JSON objects, one a line, opened for appending."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._open()

    def _open(self) -> None:
        self._file = os.open(self._path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)

    def write(self, line: dict[str, Any]) -> None:
        """Append a line in one write, so that a kill never leaves two halves of different lines.

        Numbers that are not finite, which JSON does not know, become null.

        Raises:
            OSError: it does not fit on the disk; what was written of it is no line, and is cut when the run goes on.
        """
        content = (json.dumps(finite(line), allow_nan=False) + "\n").encode()
        if os.write(self._file, content) < len(content):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(self._path))

    def cut(self, step: int) -> None:
        """Drop the lines of later steps and go on behind the others."""
        cut_metrics(self._path, step)
        self.close()
        self._open()

    def close(self) -> None:
        """Close the file."""
        os.close(self._file)


def metric_line(state: TrainState, facts: StepFacts, cost: Cost) -> dict[str, Any]:
    """One step as an object: positions in tokens, loss per token, rates, seconds in all and by phase, Unix time.

    Only where they apply: `skipped` and `why` (the gradients were not used), `bf16_layers` (those that the FP8 sentinel
    moved) and, on a GPU, `memory_peak_bytes` of this process since its start.
    """
    speed = state.run.tokens_per_step / facts.seconds if facts.seconds else None
    line = {
        "step": state.step,
        "tokens": state.tokens,
        "run_tokens": state.run_tokens,
        "loss": facts.loss,
        "learning_rate": facts.learning_rate,
        "grad_norm": facts.grad_norm,
        "tokens_per_second": speed and round(speed, 1),
        **(cost.rates(speed) if speed else {}),
        "seconds": round(facts.seconds, 5),
        "phases": {name: round(seconds, 5) for name, seconds in facts.phases.items()},
        "layout": state.run.parallel.label,
        "time": round(time.time(), 3),
    }
    if facts.verdict is not Verdict.UPDATE:
        line |= {"skipped": True, "why": facts.why}
    if moved := state.memory.get("sentinel", {}).get("bf16"):
        line["bf16_layers"] = moved
    if torch.cuda.is_available():
        line["memory_peak_bytes"] = torch.cuda.max_memory_allocated()
    return line


def finite(value: Any) -> Any:
    """A value made of JSON's types with None for every number that is not finite."""
    if isinstance(value, dict):
        return {name: finite(item) for name, item in value.items()}
    if isinstance(value, list):
        return [finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
