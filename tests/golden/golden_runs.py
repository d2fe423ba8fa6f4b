"""Runs whose losses are kept as plain text, so that a change of the maths is seen, and seen for what it is.

    python tests/golden/golden_runs.py         writes every file anew; a commit that does so says why the maths changed

Each file holds one `step loss` a line. On one machine a run repeats bitwise (tests/distributed/test_exact_resume.py);
another processor may add in another order, hence the tolerances. The runs and their data are written out here and
depend on no other test's.
"""

from __future__ import annotations

import json
import os
import random
import sys
import tempfile
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
STEPS, STEP_TOKENS = 20, 128

RUNS: dict[str, dict[str, Any]] = {
    "tiny_llama_fp32_cpu": {},
    "tiny_llama_untied_fp32_cpu": {"model": {"tied_embeddings": False}},
    "tiny_qwen3_fp32_cpu": {"model": {"family": "qwen3"}},
    "tiny_llama_bf16_cpu": {"dtype": "bf16"},
    "tiny_llama_cosine_fp32_cpu": {"schedule": {"kind": "cosine"}},
}
TOLERANCE = {"fp32": 2e-5, "bf16": 2e-2}
"""Largest difference of a loss: fp32 sums in another order, bf16 rounds 256 times as coarsely."""


def dtype_of(name: str) -> str:
    """Precision a run is named by."""
    return "bf16" if "bf16" in name else "fp32"


def write_data(folder: Path) -> None:
    """Documents that count in steps of two and three."""
    from megatron_octo.data.index.writer import write_indexed

    chance = random.Random(7)
    for name, stride in (("even", 2), ("odd", 3)):
        lengths = [chance.randint(10, 60) for _ in range(120)]
        documents = [[(s + stride * place) % 90 + 1 for place in range(n)] + [0] for s, n in enumerate(lengths)]
        write_indexed(folder / name, documents, 91)
    (folder / "tokenizer").mkdir(exist_ok=True)


def write_run(folder: Path, name: str) -> Path:
    """The run file of one golden run, complete; JSON is YAML."""
    more = RUNS[name]
    model = {
        "layers": 2, "hidden": 32, "heads": 4, "kv_groups": 2, "ffn": 64, "vocabulary": 91, "max_positions": 64,
        **more.get("model", {}),
    }  # fmt: skip
    run = {
        "name": name, "out": str(folder / name), "seed": 5, "dtype": more.get("dtype", "fp32"), "threads": 1,
        "model": model,
        "data": {
            "tokenizer": str(folder / "tokenizer"), "sequence_length": 32, "seed": 3,
            "mixture": {key: {"path": str(folder / key), "weight": w} for key, w in (("even", 0.7), ("odd", 0.3))},
        },
        "batch": {"global_batch": 4, "micro_batch": 2},
        "optimizer": {"epsilon": 1e-6},
        "schedule": {
            "learning_rate": 3e-3, "warmup": 2 * STEP_TOKENS, "tokens": STEPS * STEP_TOKENS, **more.get("schedule", {}),
        },
        "checkpoint": {"every": STEPS * STEP_TOKENS},
        "timeout_minutes": 2,
    }  # fmt: skip
    path = folder / f"{name}.yaml"
    path.write_text(json.dumps(run), encoding="utf-8")
    return path


def train(folder: Path) -> dict[str, list[float]]:
    """Losses of every golden run, all trained in this process."""
    from functools import partial
    from unittest import mock

    import megatron_octo.train.loop as loop
    from megatron_octo.runtime import groups
    from megatron_octo.train.api import load_run

    losses = {}
    write_data(folder)
    for name in RUNS:
        with mock.patch.object(groups, "shutdown", partial(groups.shutdown, keep_world=True)):
            loop.train(load_run(write_run(folder, name)))
        lines = (folder / name / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
        losses[name] = [json.loads(line)["loss"] for line in lines]
    return losses


def read(name: str) -> list[float]:
    """A stored curve."""
    lines = (HERE / f"{name}.txt").read_text(encoding="utf-8").splitlines()
    assert [int(line.split()[0]) for line in lines] == list(range(1, len(lines) + 1))
    return [float(line.split()[1]) for line in lines]


if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    with tempfile.TemporaryDirectory() as scratch:
        found = train(Path(scratch))
    if sys.argv[1:]:
        Path(sys.argv[1]).write_text(json.dumps(found), encoding="utf-8")
    else:
        for name, losses in found.items():
            text = "".join(f"{step} {loss!r}\n" for step, loss in enumerate(losses, start=1))
            (HERE / f"{name}.txt").write_text(text, encoding="utf-8")
