"""Tasks on a Ray cluster, or on a Ray of this machine where none is named."""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import threading
import warnings
from collections import deque
from collections.abc import Iterator, Sequence
from typing import Any

from megatron_octo.data.engine.code import code_of, refuse_other_code
from megatron_octo.data.engine.executors import attempt, killed, outcome, use_one_thread
from megatron_octo.data.engine.stage import Advance, Call
from megatron_octo.errors import EnvironmentProblem

_TRIES_MORE = 2
_GRACE = 30.0  # seconds for cancelled tasks to end
_RAYS_ENDS = (signal.SIGTERM, 1)  # exit codes of its handlers of SIGTERM, early and late in `ray.init`


class OnRay:
    """Tasks as Ray tasks of one core each; use as a context manager.

    The cluster is the one that `RAY_ADDRESS` or a surrounding `ray.init` names. A cluster loses nodes: a task whose
    worker is gone is done again on another, twice at most. The directories must be reachable from every node.

    Args:
        workers: how many tasks may run at the same time; None for as many as the cluster has cores.
    """

    def __init__(self, workers: int | None = None) -> None:
        self._workers, self._started = workers, False

    def __enter__(self) -> OnRay:
        return self

    def __exit__(self, *error: object) -> None:
        if self._started:
            import ray

            ray.shutdown()

    def run(self, calls: Sequence[Call], advance: Advance) -> Iterator[tuple[int, dict[str, Any]]]:
        """Hand the tasks out in order, see `Executor.run`; what tasks report inside is not heard."""
        ray = self._connect()
        remote = ray.remote(_attempt).options(num_cpus=1, max_retries=_TRIES_MORE)
        limit = self._workers or max(1, int(ray.cluster_resources().get("CPU", 1)))
        waiting, running = deque(enumerate(calls)), {}
        try:
            while waiting or running:
                while waiting and len(running) < limit:
                    place, call = waiting.popleft()
                    running[remote.remote(call, os.getcwd(), code_of())] = place
                (ready, *_), _ = ray.wait(list(running), num_returns=1)
                place = running.pop(ready)
                try:
                    answer = ray.get(ready)
                except ray.exceptions.RayTaskError as error:  # tasks return their errors, so it never began
                    raise EnvironmentProblem(
                        f"a node of the cluster cannot do the work ({str(error.cause).splitlines()[0]})",
                        "every node needs this package and what it needs",
                        "install it there",
                    ) from None
                except ray.exceptions.RayError:
                    raise killed(calls[place], None) from None
                yield place, outcome(*answer)
        except BaseException:
            for reference in running:
                ray.cancel(reference, force=True)
            if running:  # what is still written would meet what the next start writes
                ray.wait(list(running), num_returns=len(running), timeout=_GRACE)
            raise

    def _connect(self) -> Any:
        with _sigterm_afterwards():
            import ray

        if not ray.is_initialized():
            try:
                # of accelerators, which data does not need
                warnings.filterwarnings("ignore", category=FutureWarning, module="ray.*")
                with _own_sigterm():
                    ray.init(
                        num_cpus=self._workers if not os.environ.get("RAY_ADDRESS") else None, include_dashboard=False,
                        log_to_driver=False, logging_level=logging.ERROR,
                    )  # fmt: skip
            except (ConnectionError, RuntimeError, ValueError, OSError) as error:
                raise EnvironmentProblem(
                    f"Ray cannot be reached ({error})", "RAY_ADDRESS names the cluster", "mend it, or unset it"
                ) from None
            self._started = True
        return ray


@contextlib.contextmanager
def _sigterm_afterwards() -> Iterator[None]:
    """Let SIGTERM wait for an import: what Ray does at exit fails where it was imported by half."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    received: list[int] = []
    before = signal.signal(signal.SIGTERM, lambda number, _frame: received.append(number))
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
    for number in received[:1]:
        signal.raise_signal(number)


@contextlib.contextmanager
def _own_sigterm() -> Iterator[None]:
    """Keep what this process does on SIGTERM: Ray puts its own in place, which ends with 15 and, while it starts, 1."""
    if threading.current_thread() is not threading.main_thread():  # where Ray puts nothing in place
        yield
        return
    before = signal.getsignal(signal.SIGTERM)
    try:
        yield
    except SystemExit as end:
        signal.signal(signal.SIGTERM, before)
        if end.code in _RAYS_ENDS:
            signal.raise_signal(signal.SIGTERM)
        raise
    finally:
        signal.signal(signal.SIGTERM, before)


def _attempt(call: Call, directory: str, code: dict[str, str]) -> tuple[str, Any]:
    try:
        refuse_other_code(code)
    except EnvironmentProblem as error:
        return "error", error
    os.chdir(directory)  # paths in a configuration may be relative
    use_one_thread()
    return attempt(call)
