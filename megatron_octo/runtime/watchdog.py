"""Which rank hangs? Every rank tells where it stands; whoever waits too long names the one that does not come.

A thread of each rank writes a heartbeat and the place of its main thread into the store in which the ranks of a run
meet. Others' entries are read only by a rank that itself makes no progress, so that the store of a thousand ranks sees
a few hundred small messages a second.
"""

from __future__ import annotations

import faulthandler
import json
import os
import re
import socket
import sys
import threading
import time
import traceback
from collections.abc import Callable
from contextlib import suppress
from types import TracebackType
from typing import Any

from megatron_octo.runtime import groups
from megatron_octo.runtime.groups import Runtime
from megatron_octo.runtime.place import Place, place_of
from megatron_octo.runtime.stop import RankLost

ASIDE_PATIENCE = 3.0
"""What is no step (set-up, a validation, a save, a rewind) may stand still this many times `timeout_minutes`: all ranks
wait for one there that reads or writes whole files."""

GROUP_PATIENCE = 1.2 * ASIDE_PATIENCE
"""Process groups wait this many times `timeout_minutes`, so that the watchdog speaks before they break off."""

_PERIOD, _SHORTEST_PERIOD, _PERIODS = 5.0, 0.2, 40  # seconds between beats, and beats within the time out
_JOINED = 2.0  # seconds that a thread may take to end
_LINGER = 3.0  # seconds for which the rank that holds the store waits until others have read what it says
_HURRY = 0.1  # seconds between beats of a rank that is about to end
_MISSED = 4  # beats without which a rank counts as silent
_BROKEN = re.compile(
    r"Connection (closed|reset|refused)|Broken pipe|[Tt]imed? ?out|Socket|NCCL|failed to (recv|send)|remote process"
)


class Watchdog:
    """Watches the thread that enters it, on each rank; a context manager around all that ranks do together.

    When the watched thread has stood in one place of one step for `timeout` seconds, or `ASIDE_PATIENCE` times as long
    in one place of what is no step, the process prints who is to blame, dumps the stacks of all its threads, and ends
    with exit code 76. An error of a collective inside the context (a connection lost, a time-out of the process group)
    becomes a `RankLost` that says the same.

    Args:
        rank: of this process.
        world_size: ranks of the run.
        store: where the ranks meet: a client of its own, since a client serves one thread at a time.
        timeout: seconds without progress in a step.

    Raises:
        RankLost: another rank is gone or hangs.
    """

    def __init__(self, rank: int, world_size: int, store: Any, timeout: float) -> None:
        self._rank, self._world, self._store, self._timeout = rank, world_size, store, timeout
        self._period = min(_PERIOD, max(_SHORTEST_PERIOD, timeout / _PERIODS))
        self._step: Callable[[], str] = str
        self._aside: Callable[[], str] = lambda: "set-up"
        self._end, self._suspicious = threading.Event(), threading.Event()
        self._leaving, self._posted = threading.Event(), threading.Event()
        self._others: dict[int, _Other] = {}
        self._answered = time.monotonic()
        self._place, self._since = Place("", ""), time.monotonic()
        self._farewell: dict[str, Any] | None = None
        self._confessor: int | None = None  # who has said itself with which error it ended
        self._watched = 0

    def __enter__(self) -> Watchdog:
        self._watched = threading.get_ident()
        work = {"watchdog": self._keep_watching} | ({"heartbeat": self._keep_beating} if self._world > 1 else {})
        self._threads = [threading.Thread(target=act, name=name, daemon=True) for name, act in work.items()]
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._leaving.set()
        try:
            if isinstance(error, Exception) and self._world > 1:
                self._part(error)
        finally:
            self._end.set()
            # An interpreter that ends while a thread is inside the store aborts, with all work done. There is a limit,
            # for the store may hold a thread up for ever.
            for thread in self._threads:
                thread.join(_JOINED)

    def follow(self, step: Callable[[], str], aside: Callable[[], str] = str) -> None:
        """Let messages say how far the run is, once it is set up.

        Args:
            step: answers in words, from any thread, which step is taken.
            aside: answers what is done instead of a step; empty while one is taken.
        """
        self._step, self._aside = step, aside

    def _stage(self) -> tuple[str, float]:
        """What the run does now, in words, and the seconds it may stand in one place of it."""
        aside = self._aside()
        return aside or self._step(), self._timeout * (ASIDE_PATIENCE if aside else 1.0)

    def _part(self, error: Exception) -> None:
        """Tell the others of an error before this rank is gone; raise `RankLost` if it came from them."""
        said = f"{type(error).__name__}: {error}".splitlines()[0]
        if not isinstance(error, RuntimeError) or not _BROKEN.search(said):
            self._say_farewell(said, own=True)
            return
        traceback.print_exception(error)
        lost = self._lost(self._look(_MISSED * self._period + 1.0), said)
        self._say_farewell(str(lost), own=False)
        raise lost from error

    def _keep_watching(self) -> None:
        """Look at the watched thread's place once a period, and act when it has not moved for too long."""
        signature, looked = None, time.monotonic()
        while not self._leaving.wait(self._period):
            frame, now = sys._current_frames().get(self._watched), time.monotonic()
            if frame is None:
                return
            stage, limit = self._stage()
            found = (stage, _signature(frame))  # steps that spend all their time in one place are no hang
            suspended = now - looked > 3 * self._period + 1.0  # this process itself was stopped for a while
            looked = now
            if found != signature or suspended:
                signature, self._since = found, now
                self._suspicious.clear()
            self._place = place_of(frame)
            if now - self._since >= limit / 2:
                self._suspicious.set()
            if now - self._since >= limit:
                self._fire()

    def _fire(self) -> None:
        lost = self._lost(self._look(0.0))
        if self._leaving.is_set():
            return
        faulthandler.dump_traceback(sys.stderr)
        with suppress(OSError):
            print(f"octo: error: {lost}", file=sys.stderr, flush=True)
        self._say_farewell(str(lost), own=False)
        os._exit(lost.exit_code)

    def _keep_beating(self) -> None:
        """The only thread that talks to the store: it may be held up there for ever."""
        beat = 0
        with suppress(Exception):  # the store is gone: `_answered` stays behind, and that tells
            while not self._end.is_set():
                beat += 1
                told = {"beat": beat, "host": socket.gethostname(), "pid": os.getpid(), "stage": self._stage()[0]}
                told |= {"where": self._place.text, "waits": self._place.collective, "end": self._farewell}
                self._store.set(f"beat/{self._rank}", json.dumps(told))
                # The first answers to all, and keeps the store: it is read always, so that its last place is known.
                everybody = self._suspicious.is_set() or self._leaving.is_set()
                self._read(range(self._world) if everybody else range(1))
                self._answered = time.monotonic()
                if told["end"]:
                    self._posted.set()
                if not self._leaving.wait(self._period):
                    continue
                self._end.wait(_HURRY)

    def _read(self, ranks: range) -> None:
        """Read what others tell; forget what was read of those that are not to be read now."""
        found = {}
        for rank in ranks:
            key = f"beat/{rank}"
            told = json.loads(self._store.get(key)) if self._store.check([key]) else None
            before = self._others.get(rank)
            same = before is not None and (told or {}).get("beat") == (before.told or {}).get("beat")
            found[rank] = before if same else _Other(told, time.monotonic())
        self._others = found

    def _look(self, patience: float) -> str:
        """Who is to blame, in words; looks again for `patience` seconds while nobody is."""
        deadline = time.monotonic() + patience
        while not (found := self._blame(final=False)) and time.monotonic() < deadline:
            time.sleep(self._period / 4)
        return found or self._blame(final=True)

    def _blame(self, *, final: bool) -> str:
        """The others that ended, are silent, are elsewhere, or (only if nothing better is found) wait elsewhere."""
        if self._world == 1:
            return "this process makes no progress"
        others = {rank: other for rank, other in sorted(self._others.items()) if rank != self._rank}
        ends = {rank: other.told["end"] for rank, other in others.items() if other.told and other.told["end"]}
        for own in (True, False):
            for rank, end in ends.items():
                if end["own"] is own:
                    self._confessor = rank if own else None
                    return f"rank {rank} ended with an error: {end['text']}" if own else end["text"]
        now, patience = time.monotonic(), _MISSED * self._period
        if now - self._answered > patience + 1.0:
            return self._silent_store(now - self._answered)
        silent = [rank for rank, other in others.items() if now - other.changed > patience]
        if silent:
            return "; ".join(_silent(rank, others[rank], now) for rank in silent)
        if not final:
            return ""
        for rank, other in others.items():
            if other.told and not other.told["waits"]:
                return f"{_name(rank, other.told)} is alive and does not come: it is in {_standing(other.told)}"
        for rank, other in others.items():
            if other.told and other.told["where"] != self._place.text:
                return f"{_name(rank, other.told)} waits in another place: {other.told['where']}"
        return f"rank {self._rank} waits, and all others are alive in the same place: the network, or a device"

    def _silent_store(self, seconds: float) -> str:
        at = f"{os.environ.get('MASTER_ADDR', '?')}:{os.environ.get('MASTER_PORT', '?')}"
        if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True":
            return f"the torchrun agent at {at}, where the ranks meet, has not answered for {seconds:.0f} s"
        first = self._others.get(0)
        name, last = (_name(0, first.told), _last(first.told)) if first and first.told else ("rank 0", "")
        return f"{name} gives no sign of life: {at}, where the ranks meet, has not answered for {seconds:.0f} s{last}"

    def _lost(self, blame: str, error: str = "") -> RankLost:
        waited, (stage, limit) = time.monotonic() - self._since, self._stage()
        how = f"lost contact ({error[:200]})" if error else f"has waited {waited:.0f} s"
        aside = f", and what is no step may take {ASIDE_PATIENCE:g} times that" if limit > self._timeout else ""
        slow = "raise timeout_minutes if this is slow, and no hang; " if aside and not error else ""
        lost = RankLost(
            blame,
            f"rank {self._rank} {how} in {stage}{self._place.text and ', '}{self._place.text}; timeout_minutes is "
            f"{self._timeout / 60:g}{aside}",
            f"{slow}start the same command again, without that machine if it happens twice; what was sealed is "
            "untouched; stacks are in log-rank*.txt",
        )
        lost.in_its_words = blame.startswith(f"rank {self._confessor} ")
        return lost

    def _say_farewell(self, text: str, *, own: bool) -> None:
        """Tell the others before this rank is gone; the one that holds the store stays until they have read it."""
        self._farewell = {"text": text, "own": own}
        self._leaving.set()
        deadline = time.monotonic() + _LINGER
        if not self._posted.wait(_LINGER) or self._rank:
            return
        while time.monotonic() < deadline and not self._end.wait(_HURRY):
            others = [self._others.get(rank) for rank in range(self._world) if rank != self._rank]
            if all(other and other.is_over(_MISSED * self._period) for other in others):
                return


def watch_ranks(runtime: Runtime, timeout_minutes: float) -> Watchdog:
    """The watchdog of this rank; its process groups should wait `GROUP_PATIENCE` times as long as it does."""
    return Watchdog(runtime.rank, runtime.world_size, groups.meeting_place(), 60 * timeout_minutes)


class _Other:
    """What another rank told last, and when this one first read it."""

    def __init__(self, told: dict[str, Any] | None, changed: float) -> None:
        self.told, self.changed = told, changed

    def is_over(self, patience: float) -> bool:
        """Whether nobody is left to read what is said to this rank."""
        return time.monotonic() - self.changed > patience or bool(self.told and self.told["end"])


def _name(rank: int, told: dict[str, Any]) -> str:
    return f"rank {rank} (process {told['pid']} on {told['host']})"


def _silent(rank: int, other: _Other, now: float) -> str:
    if other.told is None:
        return f"rank {rank} never came"
    told, seconds = other.told, now - other.changed
    return f"{_name(rank, told)} gives no sign of life for {seconds:.0f} s{_last(told)}"


def _last(told: dict[str, Any]) -> str:
    return f"; last seen in {_standing(told)}"


def _standing(told: dict[str, Any]) -> str:
    return ", ".join(filter(None, (told["stage"], told["where"])))


def _signature(frame: Any) -> int:
    """A number that changes when the thread moves."""
    places = []
    while frame is not None:
        places.append((id(frame.f_code), frame.f_lasti))
        frame = frame.f_back
    return hash(tuple(places))
