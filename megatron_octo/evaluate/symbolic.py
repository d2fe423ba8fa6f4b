"""Symbolic comparison in killable child processes, usable from any thread and from inside a Ray actor.

The children are fresh interpreters, neither forked (a process that holds CUDA or threads must not be) nor made by
`multiprocessing` (which would import the caller's main module again, and is refused inside daemonic processes).
"""

from __future__ import annotations

import atexit
import contextlib
import functools
import importlib.util
import json
import logging
import os
import select
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

from megatron_octo.errors import EnvironmentProblem

CPU_SECONDS = 2.0
"""CPU budget of one comparison; ordinary ones need a few hundredths."""
WALL_SECONDS = 60.0
"""The parent's own deadline, for a child that hangs without using the CPU."""

_START_SECONDS = 120.0
_PASSED_ON = ("PATH", "LANG", "LC_ALL", "LD_LIBRARY_PATH", "PYTHONPATH", "PYTHONHOME", "VIRTUAL_ENV")
_log = logging.getLogger(__name__)


class _Spent(Exception):
    """A child ended by its CPU timer or memory limit: the comparison itself is to blame."""


class _Died(Exception):
    """A child ended for a reason outside the comparison, or missed the parent's deadline."""


def require_math_verify() -> None:
    """Check before a long run that the symbolic comparison can be had.

    Raises:
        EnvironmentProblem: math-verify is not installed.
    """
    if importlib.util.find_spec("math_verify") is None:
        raise EnvironmentProblem(
            "package math-verify is missing", "expressions are compared by it", "pip install math-verify==0.9.0"
        )


class _Worker:
    """One child and the pipe to it."""

    def __init__(self, cpu_seconds: float) -> None:
        script = str(Path(__file__).with_name("symbolic_worker.py"))
        environment = {name: os.environ[name] for name in _PASSED_ON if name in os.environ}
        self.process = subprocess.Popen(
            [sys.executable, "-P", "-B", script, str(cpu_seconds)],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL,
            env={**environment, "OMP_NUM_THREADS": "1"}, start_new_session=True,
        )  # fmt: skip
        try:
            self._read_line(_START_SECONDS)
        except Exception as error:
            self.kill()
            raise _Died("the child did not start") from error

    def compare(self, gold: str, answer: str, wall_seconds: float) -> bool:
        assert self.process.stdin is not None
        try:
            self.process.stdin.write(json.dumps({"gold": gold, "answer": answer}).encode() + b"\n")
            self.process.stdin.flush()
        except OSError as error:
            raise _Died("the pipe is closed") from error
        reply = self._read_line(wall_seconds)
        if reply == b"M":
            raise _Spent
        return reply == b"1"

    def _read_line(self, seconds: float) -> bytes:
        assert self.process.stdout is not None
        descriptor, received, deadline = self.process.stdout.fileno(), b"", time.monotonic() + seconds
        poll = select.poll()
        poll.register(descriptor, select.POLLIN)
        while not received.endswith(b"\n"):
            if not poll.poll(max(0.0, deadline - time.monotonic()) * 1000):
                raise _Died(f"no reply in {seconds:g} s")
            chunk = os.read(descriptor, 64)
            if not chunk:
                self._explain_end()
            received += chunk
        return received.strip()

    def _explain_end(self) -> None:
        if self.process.wait(timeout=10) == -signal.SIGPROF:
            raise _Spent
        raise _Died(f"the child ended with status {self.process.returncode}")

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()
        for pipe in (self.process.stdin, self.process.stdout):
            with contextlib.suppress(OSError):  # unsent bytes of a closed pipe
                pipe.close()


class SymbolicPool:
    """A few comparison processes, each started when first needed and replaced when it dies.

    Args:
        size: processes at most; further callers wait for one.
        cpu_seconds: CPU budget of one comparison.
        wall_seconds: deadline of the parent for one comparison.
    """

    def __init__(self, size: int = 2, cpu_seconds: float = CPU_SECONDS, wall_seconds: float = WALL_SECONDS) -> None:
        self.size, self.cpu_seconds, self.wall_seconds = size, cpu_seconds, wall_seconds
        self.started = 0
        self._slots = threading.BoundedSemaphore(size)
        self._lock = threading.Lock()
        self._workers: list[_Worker] = []
        self._idle: list[_Worker] = []
        self._remembered = functools.lru_cache(16_384)(self._decide)

    def equal(self, gold: str, answer: str) -> bool | None:
        """Compare two answers written in LaTeX.

        Returns:
            Whether they are equal; None when the comparison ran out of its CPU or memory budget or could not be
            made twice in a row. Repeated pairs are answered from memory.
        """
        try:
            return self._remembered(gold, answer)
        except _Died as error:
            _log.warning("symbolic comparison given up: %s", error)
            return None

    def _decide(self, gold: str, answer: str) -> bool | None:
        with self._slots:
            try:
                return self._attempt(gold, answer)
            except _Died:  # killed from outside, perhaps for memory it shared with others: once more
                return self._attempt(gold, answer)

    def _attempt(self, gold: str, answer: str) -> bool | None:
        worker = self._take()
        try:
            verdict = worker.compare(gold, answer, self.wall_seconds)
        except BaseException as error:
            self._discard(worker)
            if isinstance(error, _Spent):
                return None
            raise
        with self._lock:
            self._idle.append(worker)
        return verdict

    def _take(self) -> _Worker:
        while True:
            with self._lock:
                worker = self._idle.pop() if self._idle else None
                if worker is None:
                    self.started += 1
                    break
            if worker.process.poll() is None:
                return worker
            self._discard(worker)  # it died while it had nothing to do: no comparison is to blame
        worker = _Worker(self.cpu_seconds)
        with self._lock:
            self._workers.append(worker)
        return worker

    def _discard(self, worker: _Worker) -> None:
        worker.kill()
        with self._lock:
            if worker in self._workers:
                self._workers.remove(worker)

    def close(self) -> None:
        """End all children; a later comparison starts new ones."""
        with self._lock:
            workers, self._workers, self._idle = self._workers, [], []
        for worker in workers:
            worker.kill()


class _Shared:
    """The pool of this process; a forked child forgets its parent's, whose pipes are not its own."""

    def __init__(self) -> None:
        self.forget()
        os.register_at_fork(after_in_child=self.forget)
        atexit.register(self.close)

    def forget(self) -> None:
        self._pool: SymbolicPool | None = None
        self._lock = threading.Lock()

    def get(self) -> SymbolicPool:
        with self._lock:
            if self._pool is None:
                self._pool = SymbolicPool(size=max(1, min(4, os.cpu_count() or 1)))
            return self._pool

    def close(self) -> None:
        with self._lock:
            if self._pool is not None:
                self._pool.close()


shared = _Shared()
"""The pool that `grade` uses; made at the first comparison that needs it."""
