"""Small sources, runs that read them, and run directories as training leaves them."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

from megatron_octo.checkpoint import store
from megatron_octo.config.load import parse_config
from megatron_octo.config.mixture import DataConfig
from megatron_octo.config.run import RunConfig
from megatron_octo.data.index.table import TableWriter, docs_path
from megatron_octo.data.index.writer import write_indexed
from megatron_octo.train.start import only_trainer, open_run

LENGTH, BATCH, STEPS = 16, 4, 20
STEP = LENGTH * BATCH


def write_sources(folder: Path) -> Path:
    """Three sources; one has no table of documents."""
    for name, documents in (("web", 60), ("math", 25), ("code", 20)):
        chance, table = random.Random(name), TableWriter()
        lengths = [0, *(chance.randint(1, 60) for _ in range(documents - 1))]
        write_indexed(folder / name, [[chance.randrange(1, 90) for _ in range(n)] for n in lengths], 91)
        if name != "code":
            for number in range(documents):
                table.add(f"{name}/part-{number // 30}.jsonl:{number % 30 + 1}")
            table.write(docs_path(folder / name))
    return folder


def mixture(folder: Path, **weights: float) -> dict[str, Any]:
    return {name: {"path": str(folder / name), "weight": weight} for name, weight in weights.items()}


def values(out: Path, sources: Path, **more: Any) -> dict[str, Any]:
    data = {"tokenizer": str(sources), "mixture": mixture(sources, web=0.75, math=0.25), "sequence_length": LENGTH}
    return {
        "name": out.name,
        "out": str(out),
        "dtype": "fp32",
        "model": {"layers": 2, "hidden": 32, "heads": 4, "kv_groups": 2, "ffn": 64, "vocabulary": 91},
        "batch": {"global_batch": BATCH, "micro_batch": 2},
        "schedule": {"learning_rate": 1e-3, "tokens": STEPS * STEP},
        "checkpoint": {"every": 1000},
        **more,
        "data": data | more.get("data", {}),
    }


def trained(run: RunConfig, *steps: int, **more: Any) -> RunConfig:
    """A run directory as training leaves it, after these steps."""
    with only_trainer(run.out):
        start = open_run(run)
    for step in steps:
        facts = {"step": step, "run_tokens": step * STEP, "tokens": start.root_tokens + step * STEP}
        facts |= {"config": start.run.model_dump(mode="json"), "lineage": start.lineage, **more}
        temporary = store.begin(run.out, step)
        store.write_facts(temporary, facts)
        store.publish(temporary, run.out, step)
    return start.run


def run_of(out: Path, sources: Path, **more: Any) -> RunConfig:
    return RunConfig.model_validate(values(out, sources, **more))


def data_of(folder: Path, **more: Any) -> DataConfig:
    plain = {"tokenizer": "t", "mixture": mixture(folder, web=0.75, math=0.25), "sequence_length": LENGTH}
    return parse_config(DataConfig, plain | more, "data")
