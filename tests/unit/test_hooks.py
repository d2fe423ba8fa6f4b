"""The list of hooks, and the moments of a signal that no run meets on purpose."""

from __future__ import annotations

import os
import signal
import time
from typing import Any

import pytest

from megatron_octo.runtime.stop import STOPPED, StopSignals
from megatron_octo.train.hooks.base import Hook, Hooks

pytestmark = pytest.mark.timeout(30)


class Noting(Hook):
    def __init__(self, name: str, told: list[str], *, refuses: bool = False) -> None:
        self.name, self.told, self.refuses = name, told, refuses

    def open(self, state: Any) -> None:
        self.told.append(f"open {self.name}")
        if self.refuses:
            raise ValueError("no")

    def close(self) -> None:
        self.told.append(f"close {self.name}")


def test_hooks_are_closed_in_turn_also_where_one_refuses_to_open() -> None:
    told: list[str] = []
    with pytest.raises(ValueError, match="no"), Hooks([Noting("a", told), Noting("b", told, refuses=True)], None):
        raise AssertionError("not reached")
    assert told == ["open a", "open b", "close b", "close a"]
    told.clear()
    with Hooks([Noting("a", told), Noting("b", told)], None):
        assert told == ["open a", "open b"]
    assert told[2:] == ["close b", "close a"]


class Interrupted(StopSignals):
    """One to which a signal comes in the middle of `begin`."""

    def __setattr__(self, name: str, value: Any) -> None:
        super().__setattr__(name, value)
        if name == "_ask" and value:
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(0.3)


def ended(kind: type[StopSignals], grace: float, pauses: list[float]) -> tuple[int, bytes]:
    """In a child, be told to stop before each pause; its exit code, and what it was asked for."""
    readable, writable = os.pipe()
    child = os.fork()
    if child == 0:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
        with kind() as signals:
            signals.begin(lambda: os.write(writable, b"stop "), grace)
            for seconds in pauses:
                os.kill(os.getpid(), signal.SIGTERM)
                time.sleep(seconds)
        os._exit(0)
    os.close(writable)
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    with os.fdopen(readable, "rb") as asked:
        return code, asked.read()


def test_a_signal_that_comes_as_the_grace_is_set_has_all_of_it() -> None:
    assert ended(Interrupted, 30.0, []) == (0, b"stop ")


def test_the_first_signal_counts_a_second_gives_no_more_time_and_asks_for_nothing() -> None:
    assert ended(StopSignals, 1.0, [0.7, 0.7]) == (STOPPED, b"stop ")
