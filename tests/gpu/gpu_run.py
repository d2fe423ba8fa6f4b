"""A training run for a GPU: sizes that FP8 accepts, seconds a run, several in one process."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import yaml

LAYERS = 4
STEP_TOKENS = 4 * 256
STEPS = 12


def write_run(folder: Path) -> Path:
    from megatron_octo.data.index.writer import write_indexed

    chance = random.Random(7)
    documents = [[(start + 2 * place) % 90 + 1 for place in range(chance.randint(100, 400))] for start in range(300)]
    (folder / "tokenizer").mkdir(parents=True)
    write_indexed(folder / "text", [document + [0] for document in documents], 91)
    values = {
        "name": "gpu",
        "out": str(folder / "out"),
        "seed": 5,
        "model": {"layers": LAYERS, "hidden": 256, "heads": 4, "kv_groups": 2, "ffn": 512, "vocabulary": 91},
        "data": {
            "tokenizer": str(folder / "tokenizer"),
            "mixture": {"text": {"path": str(folder / "text"), "weight": 1}},
            "sequence_length": 256,
        },
        "batch": {"global_batch": 4, "micro_batch": 2},
        "schedule": {"learning_rate": 5e-3, "warmup": 2 * STEP_TOKENS, "tokens": STEPS * STEP_TOKENS},
        "checkpoint": {"every": 100 * STEP_TOKENS},
        "timeout_minutes": 2,
    }
    path = folder / "run.yaml"
    path.write_text(yaml.safe_dump(values))
    return path


class Gpu:
    """Trains in this process, each run in a directory of its own."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.path = folder, write_run(folder)

    def train(
        self, name: str, *overrides: str, until: int = STEPS, prepare: Callable[[Any], None] | None = None
    ) -> tuple[list[tuple[float, float]], Any]:
        """Train to a step; the (loss, gradient norm) of every step so far, and the state.

        Args:
            name: of the run directory.
            overrides: as on the command line.
            until: the last step.
            prepare: is given the state before the first step.
        """
        from transformer_engine.pytorch.quantization import FP8GlobalStateManager

        from megatron_octo.runtime import groups
        from megatron_octo.train import loop
        from megatron_octo.train.api import load_run

        def hooks(engine: Any, state: Any, *others: Any) -> Any:
            if prepare is not None:
                prepare(state)
            return plain(engine, state, *others)

        FP8GlobalStateManager.reset()
        run, plain = load_run(self.path, [f"out={self.folder / name}", *overrides]), loop.default_hooks
        with (
            mock.patch.object(groups, "shutdown", partial(groups.shutdown, keep_world=True)),
            mock.patch.object(loop, "default_hooks", hooks),
        ):
            try:
                state = loop.train(run, until * STEP_TOKENS)
            except BaseException:
                groups.shutdown()
                raise
        lines = [json.loads(line) for line in (run.out / "metrics.jsonl").read_text().splitlines()]
        return [(line["loss"], line["grad_norm"]) for line in lines], state


def furthest(losses: list[tuple[float, float]], reference: list[tuple[float, float]]) -> float:
    """Largest relative difference of two runs' losses."""
    assert len(losses) == len(reference)
    return max(abs(one[0] - other[0]) / other[0] for one, other in zip(losses, reference, strict=True))
