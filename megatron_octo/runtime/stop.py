"""SIGTERM and SIGINT of one rank, from the first moment of its process to the last."""

from __future__ import annotations

import faulthandler
import os
import select
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from types import FrameType, TracebackType
from typing import Any, NoReturn

from megatron_octo.errors import StageFailed

STOPPED = 75
"""Exit code of a run that ended because it was told to; the same command goes on (sysexits: temporary failure)."""

LOST = 76
"""Exit code of a rank that another one keeps waiting: a hung or dead rank (sysexits: remote error in protocol)."""

EXIT_CODES = f"""exit codes:
   0  the run, or the leg asked for, is done
   1  a bug of this program; its traceback is in log-rank*.txt
   2  the configuration    3  the data    4  the checkpoint
   6  the machine: disk, port, GPU, a package; or another process trains in the same `out`
   7  the run failed: numbers that stay bad, weights that change by themselves
  {STOPPED}  stopped by SIGTERM or SIGINT, within stop_grace_seconds; steps taken, if any were, are saved
  {LOST}  a rank hung or was lost; it is named, with the last collective
 137  a rank was killed (128 + signal)
Whatever the code, a checkpoint that was sealed is whole: the same command goes on from the last one."""
"""For `--help`."""

_SIGNALS = (signal.SIGTERM, signal.SIGINT)
_OWN_SHARE = 0.9  # of the grace: whoever sent the signal kills at its end


def name_of(number: int) -> str:
    """A signal as messages call it: SIGINT is what a terminal sends for Ctrl-C."""
    return "Ctrl-C (SIGINT)" if number == signal.SIGINT else signal.Signals(number).name


class RankLost(StageFailed):
    """Another rank hung, died, or is somewhere else in the program; what was sealed is untouched.

    `in_its_words`: that rank itself has said which error it ended with.
    """

    exit_code = LOST
    in_its_words = False


class Stopped(StageFailed):
    """The run ended because it was told to; the same command goes on."""

    exit_code = STOPPED


class StopSignals:
    """Takes the signals over while used as a context manager; outside the main thread it does nothing.

    Until `begin` there is no progress to save, and a signal ends the process at once with exit code 75. From then on it
    asks for an orderly stop, which must end within the grace: if a step, a save or another rank takes longer, the
    process says where it stands and ends with exit code 75 all the same, and the last sealed checkpoint counts. A
    second signal changes nothing. The kernel wakes a thread of its own, so that none of this waits for the main thread,
    which may be inside a collective.
    """

    def __init__(self) -> None:
        self._ask: Callable[[], None] | None = None
        self._grace = 0.0
        self._received: tuple[int, float] | None = None
        self._first = threading.Lock()
        self._over = False
        self._pipe: tuple[int, int] | None = None
        self._before: dict[int, Any] = {}

    def __enter__(self) -> StopSignals:
        if threading.current_thread() is threading.main_thread():
            self._pipe = os.pipe()
            os.set_blocking(self._pipe[1], False)
            signal.set_wakeup_fd(self._pipe[1], warn_on_full_buffer=False)
            self._before = {number: signal.signal(number, self._handle) for number in _SIGNALS}
            threading.Thread(target=self._attend, args=(self._pipe[0],), name="stop signals", daemon=True).start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._over = True
        if self._pipe is not None:
            signal.set_wakeup_fd(-1)
            for number, handler in self._before.items():
                signal.signal(number, handler)
            os.close(self._pipe[1])  # which ends the thread

    @property
    def told(self) -> str:
        """Name of the signal that was received, see `name_of`; empty if none was."""
        return name_of(self._received[0]) if self._received else ""

    @property
    def seconds(self) -> float:
        """Since the signal was received."""
        return time.monotonic() - self._received[1] if self._received else 0.0

    @property
    def grace(self) -> float:
        """Seconds an orderly stop may take."""
        return self._grace

    def begin(self, ask: Callable[[], None], grace: float) -> None:
        """From now on there is progress to save.

        Args:
            ask: called once, from a signal handler or another thread, when a signal is received.
            grace: seconds from the signal to the end of the process.
        """
        self._grace = grace  # first: a signal that finds `_ask` finds its grace
        self._ask = ask

    def _handle(self, number: int, _frame: FrameType | None) -> None:
        self._receive(number)

    def _receive(self, number: int) -> None:
        if self._over or not self._first.acquire(blocking=False):
            return
        self._received = (number, time.monotonic())
        if self._ask is None:
            _leave(f"octo: error: stopped by {self.told} before a step was taken; fix: start the same command again")
        self._ask()

    def _attend(self, awake: int) -> None:
        """Wait for signals, then for the end of the grace."""
        while not self._over:
            stopping = self._ask is not None and self._received is not None
            left = max(0.0, self._grace * _OWN_SHARE - self.seconds) if stopping else None
            ready, _, _ = select.select([awake], [], [], left)
            if ready:
                for number in _read(awake):
                    if number in _SIGNALS:
                        self._receive(number)
            elif not self._over:
                self._give_up()
        os.close(awake)

    def _give_up(self) -> NoReturn:
        faulthandler.dump_traceback(sys.stderr)
        _leave(
            f"octo: error: rank {os.environ.get('RANK', '0')}: {self.told} {self.seconds:.1f} s ago, and the step "
            f"or save at hand is not over (stop_grace_seconds {self._grace:g}); what was sealed before counts; "
            "fix: start the same command again; raise stop_grace_seconds together with the grace of whoever sends the "
            "signal, or let steps be shorter"
        )


@contextmanager
def nothing_to_save() -> Iterator[None]:
    """While a command only prepares: a signal raises `Stopped`; outside the main thread it does nothing."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def leave(number: int, _frame: FrameType | None) -> NoReturn:
        raise Stopped(f"stopped by {name_of(number)} before a step was taken", fix="start the same command again")

    before = {number: signal.signal(number, leave) for number in _SIGNALS}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _read(descriptor: int) -> bytes:
    """The numbers of received signals; closed from the other end, none."""
    with suppress(OSError):
        return os.read(descriptor, 64)
    return b""


def _leave(line: str) -> NoReturn:
    with suppress(OSError):
        print(line, file=sys.stderr, flush=True)
    os._exit(STOPPED)
