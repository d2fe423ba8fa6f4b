"""Ranks to which something happens at a named point.

`python -m ranks_worker nursery RUN.yaml OUT.json` runs a child for each stop by a signal, forked since starting one
costs seconds. `python -m ranks_worker FAULT RUN.yaml [overrides]` is one rank of a world in which rank 1, or the rank
the fault names, meets the fault in step 6.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import time
import warnings
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from tiny_run import STEPS

import megatron_octo.train.loop as loop
import megatron_octo.train.step as step_module
from megatron_octo.checkpoint import store
from megatron_octo.train import forward
from megatron_octo.train.__main__ import main
from megatron_octo.train.data import Batches

STEP = 6
RANK = int(os.environ.get("RANK", "0"))


def term(times: int = 1) -> None:
    for _ in range(times):
        os.kill(os.getpid(), signal.SIGTERM)


def before(target: Any, name: str, action: Callable[[], None], call: int = 1) -> Any:
    """Do something before the `call`-th call of a function."""
    plain, left = getattr(target, name), [call]

    def called(*arguments: Any, **options: Any) -> Any:
        left[0] -= 1
        if left[0] == 0:
            action()
        return plain(*arguments, **options)

    return mock.patch.object(target, name, called)


def in_step(action: Callable[[], None]) -> Any:
    """Do something in the middle of step 6, before its second micro-batch."""
    return before(forward, "forward_step", action, 2 * STEP)


def for_ever() -> None:
    term()
    while True:  # as in a collective that never ends: the signal does not reach these lines
        time.sleep(0.05)


STOPS = {
    "in forward": lambda: [in_step(term)],
    "in a save": lambda: [before(store, "publish", term, 2)],
    "before the first step": lambda: [before(loop, "set_up", term)],
    "twice": lambda: [in_step(lambda: term(2)), before(store, "publish", term, 2)],
    "too long": lambda: [in_step(for_ever)],
    "in the last step": lambda: [before(forward, "forward_step", term, 2 * STEPS)],
    "interrupted": lambda: [in_step(lambda: os.kill(os.getpid(), signal.SIGINT))],
}


def forked(run: str, name: str, patches: list[Any], *overrides: str) -> dict[str, Any]:
    """Train in a child; how it ended, what it said, and the seconds it took."""
    said, began = Path(run).with_name(f"{name}.txt"), time.monotonic()
    child = os.fork()
    if child == 0:
        descriptor = os.open(said, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(descriptor, 1)
        os.dup2(descriptor, 2)
        with ExitStack() as stack:
            for patch in patches:
                stack.enter_context(patch)
            os._exit(main([run, f"out={Path(run).with_name(name)}", *overrides]))
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    return {"code": code, "said": said.read_text(), "seconds": time.monotonic() - began}


def never_saved() -> None:
    while True:
        time.sleep(0.05)


def nursery(run: str, out: str) -> None:
    notes = {"reference": forked(run, "reference", [])}
    hung = [before(store, "publish", never_saved)]
    notes["save that hangs"] = forked(run, "hung", hung, "checkpoint.every=256", "timeout_minutes=0.02")
    for name, patches in STOPS.items():
        notes[f"{name} first"] = forked(run, name, patches(), f"stop_grace_seconds={2 if name == 'too long' else 30}")
        notes[f"{name} left"] = sorted(path.name for path in store.sealed_checkpoints(Path(run).with_name(name)))
        notes[name] = forked(run, name, [])
    Path(out).write_text(json.dumps(notes))


def raising() -> None:
    raise ValueError("the reason")


def waiting_for(file: Path) -> None:
    file.with_suffix(".there").touch()
    while not file.exists():
        time.sleep(0.05)


def busy() -> None:
    """Alive, but not where the others wait."""
    while True:
        time.sleep(0.05)


FAULTS = {
    "raise": (1, raising),
    "kill": (1, lambda: os.kill(os.getpid(), signal.SIGKILL)),
    "stop rank 1": (1, lambda: os.kill(os.getpid(), signal.SIGSTOP)),
    "stop rank 0": (0, lambda: os.kill(os.getpid(), signal.SIGSTOP)),
    "busy": (1, busy),
    "hold": (0, lambda: waiting_for(Path(os.environ["RELEASE"]))),
}


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    assert step_module.run_batches
    if sys.argv[1] == "nursery":
        nursery(*sys.argv[2:])
        sys.exit()
    rank, action = FAULTS[sys.argv[1]]
    with before(Batches, "of_step", action if rank == RANK else lambda: None, STEP):
        code = main(sys.argv[2:])
    os._exit(code)
