"""A training run small enough for a step in tens of milliseconds, with its data."""

from __future__ import annotations

import json
import random
from pathlib import Path

import yaml

STEP_TOKENS = 128
STEPS = 16
RATE = 3e-3
FOUR_WAY = ["parallel.tensor=2", "parallel.pipeline=2", "parallel.sequence=true"]

LAYOUTS = {
    "interleaved": ["parallel={tensor: 2, pipeline: 2, virtual_pipeline: 2}", "model.layers=4"],
    "context": ["parallel={context: 2, data: 2}"],
    "plain-data": ["parallel={tensor: 2, data: 2, distributed_optimizer: false}"],
    "bf16-data": ["parallel={tensor: 2, data: 2}", "dtype=bf16"],
}


def write_data(folder: Path) -> None:
    from megatron_octo.data.index.writer import write_indexed

    chance = random.Random(7)
    for name, stride in (("even", 2), ("odd", 3)):
        documents = [
            [(start + stride * place) % 90 + 1 for place in range(chance.randint(10, 60))] + [0] for start in range(120)
        ]
        write_indexed(folder / name, documents, 91)


def write_tokenizer(folder: Path) -> None:
    """A word for each token: enough for a run to see that its tokens fit the model."""
    from tokenizers import Tokenizer, models

    folder.mkdir(parents=True, exist_ok=True)
    words = models.WordLevel({f"w{number}": number for number in range(91)}, unk_token="w0")
    Tokenizer(words).save(str(folder / "tokenizer.json"))


def values(folder: Path) -> dict:
    return {
        "name": "tiny",
        "out": str(folder / "reference"),
        "seed": 5,
        "dtype": "fp32",
        "model": {
            "layers": 2,
            "hidden": 32,
            "heads": 4,
            "kv_groups": 2,
            "ffn": 64,
            "vocabulary": 91,
            "max_positions": 64,
        },
        "data": {
            "tokenizer": str(folder / "tokenizer"),
            "mixture": {
                "even": {"path": str(folder / "even"), "weight": 0.7},
                "odd": {"path": str(folder / "odd"), "weight": 0.3},
            },
            "sequence_length": 32,
            "seed": 3,
        },
        "batch": {"global_batch": 4, "micro_batch": 2},
        # Adam divides by the gradient's own size: a larger epsilon keeps rounding from growing between layouts.
        "optimizer": {"epsilon": 1e-6},
        "schedule": {"learning_rate": RATE, "warmup": 2 * STEP_TOKENS, "tokens": STEPS * STEP_TOKENS},
        "checkpoint": {"every": 4 * STEP_TOKENS, "keep": 9},
        "timeout_minutes": 2,
    }


def write_run(folder: Path) -> Path:
    write_tokenizer(folder / "tokenizer")
    write_data(folder)
    path = folder / "run.yaml"
    path.write_text(yaml.safe_dump(values(folder)))
    return path


def metrics(run_dir: Path) -> list[dict]:
    return [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
