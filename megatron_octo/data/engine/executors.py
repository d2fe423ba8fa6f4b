"""Who does the tasks of a stage: this process, worker processes of this machine, or Ray.

datatrove's executors would do, but for one thing: a worker that is killed, by hand or by a machine short of memory,
leaves datatrove 0.10.1 waiting for ever, on one machine and inside each of its Ray actors alike, and a failed Ray task
is logged and forgotten. So what starts processes here is ours, and small; what a task does is datatrove's.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import multiprocessing.connection
import os
import pickle
import signal
import sys
import threading
import traceback
import types
import warnings
from collections import deque
from collections.abc import Iterator, Sequence
from multiprocessing import resource_tracker
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from multiprocessing.reduction import DupFd
from typing import IO, Any

from megatron_octo.data.engine.stage import Advance, Call, heard_by
from megatron_octo.errors import ConfigError, OctoError, StageFailed, machine_problem

_ONE_THREAD = ("OMP_NUM_THREADS", "RAYON_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS")
_GRACE = 5.0  # seconds for a worker to end after it was told to


class InProcess:
    """Tasks one after the other in this process."""

    def run(self, calls: Sequence[Call], advance: Advance) -> Iterator[tuple[int, dict[str, Any]]]:
        """Do the tasks in order, see `Executor.run`."""
        heard_by(advance)
        for place, call in enumerate(calls):
            yield place, call.perform()


class Workers:
    """Tasks in processes of this machine, which stay from stage to stage; use as a context manager.

    Args:
        count: how many processes.
        lock: the lock on the directory they write to, see `files.hold`. Each worker keeps it open, so that nobody
            else gets it while one that outlived this process, if only by a moment, still writes.
    """

    def __init__(self, count: int, lock: IO[str] | None = None) -> None:
        self._count, self._lock = count, lock
        self._workers: list[_Worker] = []

    def __enter__(self) -> Workers:
        return self

    def __exit__(self, *error: object) -> None:
        self._end()

    def run(self, calls: Sequence[Call], advance: Advance) -> Iterator[tuple[int, dict[str, Any]]]:
        """Hand the tasks out in order, see `Executor.run`."""
        waiting = deque(enumerate(calls))
        try:
            while len(self._workers) < min(self._count, len(calls)):
                self._workers.append(_Worker(self._lock))
            for worker in self._workers:
                worker.take(waiting)
            while busy := [worker for worker in self._workers if worker.place is not None]:
                for worker in _heard(busy):
                    kind, value = worker.listen()
                    if kind == "advance":
                        advance(value)
                        continue
                    place = worker.place
                    worker.take(waiting)
                    assert place is not None
                    yield place, outcome(kind, value)
        except BaseException:
            self._end()
            raise

    def _end(self) -> None:
        for worker in self._workers:
            worker.process.terminate()
        for worker in self._workers:
            worker.process.join(_GRACE)
            worker.process.kill()
            worker.process.join()
        self._workers = []


class _Worker:
    """One process and the pipe to it."""

    def __init__(self, lock: IO[str] | None) -> None:
        context = multiprocessing.get_context("spawn")
        self._pipe, other = context.Pipe()
        self.process: BaseProcess = context.Process(target=_serve, args=(other, _Kept(lock)), daemon=True)
        with _nothing_to_import(), _without_interrupts():
            self.process.start()
        other.close()
        self.place: int | None = None
        self._call: Call | None = None

    @property
    def ears(self) -> tuple[Connection, int]:
        """What becomes ready when the worker says something, or ends."""
        return self._pipe, self.process.sentinel

    def take(self, waiting: deque[tuple[int, Call]]) -> None:
        """Give it the next task, if there is one."""
        self.place, self._call = waiting.popleft() if waiting else (None, None)
        if self._call is not None:
            with contextlib.suppress(BrokenPipeError):  # it is dead, and `listen` tells
                self._pipe.send(self._call)

    def listen(self) -> tuple[str, Any]:
        """What it says.

        Raises:
            StageFailed: it is dead.
        """
        try:
            return self._pipe.recv()
        except (EOFError, OSError):
            self.process.join()
            raise killed(self._call, self.process.exitcode) from None


class _Kept:
    """An open file that stays open in another process."""

    def __init__(self, file: IO[str] | None) -> None:
        self._file = file

    def __reduce__(self) -> tuple[Any, ...]:
        return (_Kept, (None,)) if self._file is None else (_detach, (DupFd(self._file.fileno()),))


def _detach(copy: Any) -> int:
    return copy.detach()


def _heard(busy: list[_Worker]) -> list[_Worker]:
    ready = set(multiprocessing.connection.wait([ear for worker in busy for ear in worker.ears]))
    return [worker for worker in busy if ready.intersection(worker.ears)]


def killed(call: Call | None, code: int | None) -> StageFailed:
    """What to tell when the process of a task is gone; `code` is its exit code, where it is known."""
    where = f"at task {call.number + 1} of '{call.stage}'" if call else "before its first task"
    how = "was lost" if code is None else f"ended with code {code}"
    if code is not None and code < 0:
        how = f"was killed by {signal.Signals(-code).name}"
    return StageFailed(
        f"a data worker {how} {where}",
        "stopped from outside, or out of memory; what was finished before is kept",
        "start the same command again, with fewer workers if memory is short",
    )


@contextlib.contextmanager
def _nothing_to_import() -> Iterator[None]:
    """Keep new processes from importing this one's main module.

    They need nothing of it, for tasks live in modules; and a script that builds data without the guard
    `if __name__ == "__main__"` would start itself over and over.
    """
    main = sys.modules["__main__"]
    sys.modules["__main__"] = types.ModuleType("__main__")
    try:
        yield
    finally:
        sys.modules["__main__"] = main


@contextlib.contextmanager
def _without_interrupts() -> Iterator[None]:
    """Keep Ctrl-C from a process that does not ignore it yet; this one hears of it when the block ends."""
    resource_tracker.ensure_running()  # else starting it lets signals through
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})


def _serve(pipe: Connection, kept: Any) -> None:
    """What a worker process does: tasks as they come, until the other end of the pipe is gone."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches all processes; the first one ends the others
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})
    threading.Thread(target=_end_with_parent, daemon=True).start()
    use_one_thread()
    heard_by(lambda amount: pipe.send(("advance", amount)))
    with contextlib.suppress(EOFError, BrokenPipeError):
        while True:
            pipe.send(attempt(pipe.recv()))


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


def use_one_thread() -> None:
    """Make the libraries of this process compute with one thread: a worker is a core."""
    for name in _ONE_THREAD:
        os.environ[name] = "1"
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    warnings.filterwarnings("ignore", module=r"(megatron|torch)\.")


def attempt(call: Call) -> tuple[str, Any]:
    """Do a task and catch what it raises, in a form that travels between processes.

    Returns:
        "facts" and the facts, or "error" and the exception.
    """
    try:
        return "facts", call.perform()
    except OctoError as error:
        return "error", error
    except Exception as error:
        return "error", machine_problem(error) or _travelling(error)


def _travelling(error: Exception) -> Exception:
    """A defect with its traceback, as a type that any process can unpack."""
    text = "".join(traceback.format_exception(error))
    try:
        pickle.loads(pickle.dumps(error))
    except Exception:
        return RuntimeError(text)
    error.add_note(text)
    return error


def outcome(kind: str, value: Any) -> dict[str, Any]:
    """The facts out of what `attempt` returned, or its exception, raised."""
    if kind == "error":
        raise value
    return value


def executor_of(name: str, workers: int | None, lock: IO[str] | None = None) -> Any:
    """The executor of a command line, a context manager.

    Args:
        name: `local` or `ray`.
        workers: tasks at the same time; by default one, on Ray one for each core of the cluster.
        lock: see `Workers`.

    Raises:
        ConfigError: there is no such executor, or nobody to do the work.
    """
    if workers is not None and workers < 1:
        raise ConfigError(f"workers = {workers}", "somebody has to do the work", "use 1 or more")
    if name == "ray":
        from megatron_octo.data.engine.on_ray import OnRay

        return OnRay(workers)
    if name != "local":
        raise ConfigError(f"executor = {name!r}", "there is no such executor", "use local, ray or slurm")
    return Workers(workers, lock) if workers and workers > 1 else contextlib.nullcontext(InProcess())
