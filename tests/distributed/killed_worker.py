"""A rank that kills itself with SIGKILL at a named point: `python -m killed_worker POINT RUN.yaml [overrides]`."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable
from typing import Any

import megatron_octo.train.loop as loop
from megatron_octo.checkpoint import store
from megatron_octo.train.__main__ import main
from megatron_octo.train.data import Batches


def dying(call: Callable[..., Any], at: int) -> Callable[..., Any]:
    """Die instead of the `at`-th call."""
    calls = 0

    def maybe(*arguments: Any, **options: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == at:
            os.kill(os.getpid(), signal.SIGKILL)
        return call(*arguments, **options)

    return maybe


def arm(point: str) -> None:
    if point == "during step 7":
        Batches.of_step = dying(Batches.of_step, 7)
    elif point == "before sealing":
        store.seal = dying(store.seal, 2)
    elif point == "before the pointer":
        store.point_at = dying(store.point_at, 2)
    else:
        raise SystemExit(f"no such point: {point}")


if __name__ == "__main__":
    assert loop.train
    arm(sys.argv[1])
    sys.exit(main(sys.argv[2:]))
