"""Start the local ranks of a run, watch them, and say clearly which one failed and why."""

from __future__ import annotations

import ctypes
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from megatron_octo.errors import EnvironmentProblem, OctoError, StageFailed, no_space
from megatron_octo.runtime.stop import LOST, name_of

ERROR_PREFIX = "octo: error:"
"""Start of the one line a rank prints for a mistake of the user."""

LISTENER = "OCTO_LISTENER"
"""Environment of rank 0: the descriptor of a socket that already listens where the ranks are to meet."""

_POLL_SECONDS = 0.05
_FAILURE_GRACE_SECONDS = 3.0
_SETTLE_SECONDS = 3.0
_ROOM_FOR_A_MESSAGE = 64 * 1024  # bytes of free disk below which a rank may fail without a word
_PR_SET_PDEATHSIG = 1
_COLLATERAL = re.compile(r"Connection (closed by peer|reset by peer)|Broken pipe|Connection refused")


@dataclass
class _Rank:
    """One started process, its log, and where in the log this start begins."""

    number: int
    process: subprocess.Popen
    log: Path
    start: int

    def text(self) -> str:
        with self.log.open("rb") as file:
            file.seek(self.start)
            return file.read().decode(errors="replace")

    def error_line(self) -> str | None:
        lines = [line for line in self.text().splitlines() if line.startswith(ERROR_PREFIX)]
        return lines[-1].removeprefix(ERROR_PREFIX).strip() if lines else None

    def innocence(self) -> tuple[bool, bool, int]:
        """Sorts failed ranks: one that states its error or was killed comes before one that lost another."""
        stated = self.error_line() is not None
        lost = not stated and self.process.returncode > 0 and _COLLATERAL.search(self.text()) is not None
        return lost or self.process.returncode == LOST, not stated, self.number

    def signal_all(self, number: int) -> None:
        """Signal the rank and whatever it started; it leads a process group of its own."""
        try:
            os.killpg(self.process.pid, number)
        except (ProcessLookupError, PermissionError):
            return


def launch(
    module: str,
    arguments: list[str],
    nproc: int,
    log_dir: Path,
    threads: int | None = None,
    *,
    port: int | None = None,
    environment: dict[str, str] | None = None,
    watch: Callable[[], None] | None = None,
    grace: float = 30.0,
    stopped_code: int | None = None,
) -> None:
    """Run `python -m MODULE ARGUMENTS` in `nproc` processes that form one world; return when all have ended well.

    Each rank writes log-rankN.txt in `log_dir` (appended). SIGTERM and SIGINT are handed to the ranks as SIGTERM,
    which have `grace` seconds to end. When one rank fails the others are ended. If this process is killed
    the ranks die with it (Linux), so a restart never meets a trainer that still writes.

    Args:
        module: module to run.
        arguments: its arguments.
        nproc: number of ranks.
        log_dir: where logs go; made if missing.
        threads: CPU threads of each rank; cores / ranks if not given.
        port: where rank 0 listens; a free one if not given.
        environment: variables added to this process's own.
        watch: called about twenty times a second while the ranks run.
        grace: seconds from a stop signal to SIGKILL.
        stopped_code: exit code of ranks that were told to stop and have something to go on from; also told where a rank
            died of the signal or of the end of the grace. A signal that finds all ranks at their end stops nothing
            then. If not given, the ranks' own, or 128 + signal.

    Raises:
        EnvironmentProblem: the given port is in use.
        StageFailed: a rank failed, or this process was told to stop. Its `exit_code` is the rank's.
    """
    shared = {**os.environ, **_thread_settings(threads, nproc), **_loopback(), "WORLD_SIZE": str(nproc)}
    log_dir.mkdir(parents=True, exist_ok=True)
    ranks: list[_Rank] = []
    with _stop_signals() as stopped:
        try:
            with listen(port) as listener:
                shared |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(listener.getsockname()[1])}
                shared |= environment or {}
                for number in range(nproc):
                    command = [sys.executable, "-m", module, *arguments]
                    ranks.append(_start(number, command, log_dir, shared, listener if number == 0 else None))
            while _running(ranks) and not _failed(ranks) and not stopped:
                (watch or _nothing)()
                time.sleep(_POLL_SECONDS)
            if stopped:
                _stop(ranks, stopped[0], grace, stopped_code)
            _raise_failure(ranks)
        finally:
            _end(ranks)


def _start(
    number: int, command: list[str], log_dir: Path, shared: dict[str, str], listener: socket.socket | None
) -> _Rank:
    log = log_dir / f"log-rank{number}.txt"
    own = {**shared, "RANK": str(number), "LOCAL_RANK": str(number), "PYTHONUNBUFFERED": "1"}
    handed = () if listener is None else (listener.fileno(),)
    if listener is not None:
        own[LISTENER] = str(listener.fileno())
    with log.open("ab") as file:
        start = file.tell()
        process = _spawn(command, file, own, handed)
    return _Rank(number, process, log, start)


def _spawn(command: list[str], log: BinaryIO, environment: dict[str, str], handed: tuple[int, ...]) -> subprocess.Popen:
    return subprocess.Popen(
        command,
        stdin=subprocess.DEVNULL,
        stdout=log,
        stderr=subprocess.STDOUT,
        env=environment,
        start_new_session=True,
        preexec_fn=die_with_parent(),
        pass_fds=handed,
    )


def die_with_parent() -> Callable[[], None] | None:
    """For `preexec_fn`: what a child does before it runs, so that the kernel kills it when its parent is gone.

    The parent is the thread that starts the child: it must live as long as the child shall. None where the
    system has no such request.
    """
    if not sys.platform.startswith("linux"):
        return None
    libc, parent = ctypes.CDLL(None), os.getpid()

    def ask() -> None:
        libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != parent:  # it died between the fork and the request
            os._exit(1)

    return ask


def _nothing() -> None:
    pass


def _raise_failure(ranks: list[_Rank]) -> None:
    if _failed(ranks):
        error = _explain(_culprit(ranks))
        # Others may be about to end well (a save that all were told to stop after): a moment for it.
        _end(ranks, _FAILURE_GRACE_SECONDS, signal.SIGTERM)
        raise error


def _running(ranks: list[_Rank]) -> list[_Rank]:
    return [rank for rank in ranks if rank.process.poll() is None]


def _failed(ranks: list[_Rank]) -> list[_Rank]:
    return [rank for rank in ranks if rank.process.poll() not in (None, 0)]


def _stop(ranks: list[_Rank], number: int, grace: float, stopped_code: int | None) -> None:
    began = time.monotonic()
    _end(ranks, grace, signal.SIGTERM)
    if stopped_code is not None:
        as_told = (stopped_code, -signal.SIGTERM, -signal.SIGKILL)
        _raise_failure([rank for rank in ranks if rank.process.returncode not in as_told])
        if not _failed(ranks):
            return
    took = f"{time.monotonic() - began:.1f} s (grace {grace:g} s)"
    told = [rank for rank in ranks if rank.process.returncode == stopped_code]
    said = next((line for rank in told if (line := rank.error_line())), "")  # where it stands, and what is saved
    said = said.replace(f" {name_of(signal.SIGTERM)}", f" {name_of(number)}", 1)  # which is how ranks are told
    error = StageFailed(
        said or f"stopped by {name_of(number)} within {took}",
        fix="" if said else "start the same command again to go on",
    )
    codes = {rank.process.returncode for rank in ranks}
    # Ranks may have a code of their own for having stopped well; a shell's convention otherwise.
    error.exit_code = stopped_code or (code if len(codes) == 1 and (code := codes.pop()) > 0 else 128 + number)
    raise error


def _culprit(ranks: list[_Rank]) -> _Rank:
    """The failed rank to name: not one that only lost its connection to another, if that one can be seen to fail."""
    deadline = time.monotonic() + _SETTLE_SECONDS
    while (guilty := min(_failed(ranks), key=_Rank.innocence)).innocence()[0] and time.monotonic() < deadline:
        if not _running(ranks):
            break
        time.sleep(_POLL_SECONDS)
    return guilty


def _explain(rank: _Rank) -> OctoError:
    code = rank.process.returncode
    line = rank.error_line()
    said = [text.strip() for text in rank.text().splitlines() if text.strip()]
    if line is None and not said and shutil.disk_usage(rank.log.parent).free < _ROOM_FOR_A_MESSAGE:
        return no_space(rank.log.parent)
    if line is not None:
        error = StageFailed(line)
    else:
        how = f"was ended by {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code}"
        killed = "the kernel does this where memory runs out (dmesg tells); the same command goes on"
        fix = killed if code == -signal.SIGKILL else f"see {rank.log}"
        error = StageFailed(f"rank {rank.number} {how}", said[-1] if said else "it wrote nothing", fix)
    error.exit_code = 128 - code if code < 0 else code
    return error


def _end(ranks: list[_Rank], grace: float = 0.0, notice: int | None = None) -> None:
    """Signal `notice`, give ranks `grace` seconds to end, then kill them and whatever they started."""
    if notice is not None:
        for rank in _running(ranks):
            rank.signal_all(notice)
    deadline = time.monotonic() + grace
    for rank in ranks:
        try:
            rank.process.wait(max(0.0, deadline - time.monotonic()))
        except subprocess.TimeoutExpired:
            rank.signal_all(signal.SIGKILL)
    for rank in ranks:
        rank.process.wait()


@contextmanager
def _stop_signals() -> Iterator[list[int]]:
    """Collect SIGTERM and SIGINT in a list instead of dying of them; only the main thread can."""
    received: list[int] = []
    if threading.current_thread() is not threading.main_thread():
        yield received
        return
    numbers = (signal.SIGTERM, signal.SIGINT)
    before = {number: signal.signal(number, lambda caught, _frame: received.append(caught)) for number in numbers}
    try:
        yield received
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def listen(wanted: int | None = None) -> socket.socket:
    """A socket that listens from now on, for rank 0 to take over: a port only looked up may be another's by then.

    Args:
        wanted: its port; a free one if not given.

    Raises:
        EnvironmentProblem: the port cannot be used.
    """
    listener = socket.socket()
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind(("127.0.0.1", wanted or 0))
        listener.listen()
    except (OSError, OverflowError) as error:
        listener.close()
        raise EnvironmentProblem(
            f"port {wanted} cannot be used ({error})", "rank 0 listens on it", "choose another, or leave it out"
        ) from None
    return listener


def _thread_settings(threads: int | None, nproc: int) -> dict[str, str]:
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    count = str(threads or max(1, cores // nproc))
    # Passive waiting: ranks that share cores must not spin while they wait for each other.
    return {"OMP_NUM_THREADS": count, "MKL_NUM_THREADS": count, "OMP_WAIT_POLICY": "PASSIVE"}


def _loopback() -> dict[str, str]:
    """Let gloo use the loopback interface: all ranks are here, and the host's own name may not resolve."""
    names = [name for _, name in socket.if_nameindex()]
    return {} if "lo" not in names or "GLOO_SOCKET_IFNAME" in os.environ else {"GLOO_SOCKET_IFNAME": "lo"}
