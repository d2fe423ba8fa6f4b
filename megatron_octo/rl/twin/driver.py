"""The one process that starts Ray and calls OpenRLHF's `train` for each run, several at a time.

Usage: python -m megatron_octo.rl.twin.driver JOB.json

JOB.json: {"socket": path, "temporary": directory, "seed": n, "parallel": n, "parent": process id,
"runs": [{"label": name, "outcome": file, "stages": [{"arguments": [...], "complete": file}]}]}. Each run's outcome
file is written when it ends: {"error": null or text}.
"""

from __future__ import annotations

import importlib
import json
import logging
import os
import sys
import threading
import traceback
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from megatron_octo.files import write_text
from megatron_octo.rl.parser import parse
from megatron_octo.rl.twin import client, nursery, patches

PRELOADED = (
    "torch.utils.tensorboard",
    "torchdata.stateful_dataloader",
    "transformers.models.llama.modeling_llama",
    "transformers.trainer",
    "transformers.generation.utils",
    "deepspeed",
    "datasets",
    "openrlhf.models",
    "openrlhf.datasets",
    "openrlhf.utils.deepspeed",
    "megatron_octo.evaluate.generate",
    "megatron_octo.evaluate.grade",
)
"""What every worker needs and has from the nursery. Ray is not among it: its library reads each worker's own
environment when it is loaded, and is loaded after the fork."""

_PROCESSES_OF_A_RUN = 5
"""Logical CPUs and GPUs of one length stage: controller, policy, critic, reference, engine. OpenRLHF leaves the
engine's placement behind when a stage ends, so every stage has its own share."""

_OBJECT_STORE_BYTES = 200 * 2**20


def main(job: dict[str, Any]) -> None:
    """Run a job; returns when every run has an outcome."""
    nursery.die_with(job["parent"])
    patches.install()
    os.environ.pop("CUDA_VISIBLE_DEVICES", None)  # Ray would count the logical GPUs against it
    for name in PRELOADED:
        importlib.import_module(name)
    nursery.open_nursery(Path(job["socket"]), job["seed"])
    _start_ray(job)
    train = importlib.import_module("openrlhf.cli.train_ppo_ray").train
    quota = threading.BoundedSemaphore(job["parallel"])
    with ThreadPoolExecutor(len(job["runs"])) as threads:
        list(threads.map(lambda run: _run(run, train, quota), job["runs"]))


def _start_ray(job: dict[str, Any]) -> None:
    """A Ray of our own, whatever else runs on the machine, with as many logical devices as the runs name."""
    import ray

    stages = sum(len(run["stages"]) for run in job["runs"])
    ray.init(
        address="local",
        num_cpus=_PROCESSES_OF_A_RUN * stages,
        num_gpus=_PROCESSES_OF_A_RUN * stages,
        include_dashboard=False,
        object_store_memory=_OBJECT_STORE_BYTES,
        log_to_driver=False,
        logging_level=logging.ERROR,
        _temp_dir=job["temporary"],
        _node_ip_address="127.0.0.1",
        runtime_env={"py_executable": f"{sys.executable} -S -E {client.__file__} {job['socket']}"},
    )


def _run(run: dict[str, Any], train: Callable[[Any], None], quota: threading.BoundedSemaphore) -> None:
    error = None
    with quota:
        try:
            for stage in run["stages"]:
                train(parse(stage["arguments"]))
                write_text(Path(stage["complete"]), "")
        except Exception as failure:
            traceback.print_exc()
            error = cause_of(failure)
    write_text(Path(run["outcome"]), json.dumps({"error": error}))


def cause_of(failure: BaseException) -> str:
    """The innermost message of a failure that came through Ray, in one line."""
    while (inner := getattr(failure, "cause", None) or failure.__cause__) is not None:
        failure = inner
    lines = [line.strip() for line in str(failure).splitlines() if line.strip()]
    return f"{type(failure).__name__}: {lines[-1] if lines else ''}"[:600]


if __name__ == "__main__":
    main(json.loads(Path(sys.argv[1]).read_text(encoding="utf-8")))
    sys.stdout.flush()
    sys.stderr.flush()
    import ray

    ray.shutdown()
    os._exit(0)
