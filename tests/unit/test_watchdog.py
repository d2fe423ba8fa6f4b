"""The watchdog's judgement, several ranks in one process; with real ones: tests/faults/test_ranks.py."""

from __future__ import annotations

import sys
import threading
import time

import pytest
import torch.distributed as dist

from megatron_octo.runtime.place import place_of
from megatron_octo.runtime.stop import LOST, RankLost
from megatron_octo.runtime.watchdog import ASIDE_PATIENCE, Watchdog

pytestmark = pytest.mark.timeout(60)

BROKEN = RuntimeError("[gloo/transport/tcp/pair.cc:553] Connection closed by peer [127.0.0.1]:7063")


@pytest.fixture
def store():
    return dist.HashStore()


def rank(number: int, store, world: int = 2) -> Watchdog:
    watchdog = Watchdog(number, world, store, timeout=8.0)
    watchdog.follow(lambda: "step 7 of 9")
    return watchdog.__enter__()


def leave(watchdog: Watchdog, error: BaseException | None) -> None:
    watchdog.__exit__(type(error), error, None)


def test_a_rank_that_ends_with_an_error_tells_the_others_why(store):
    first, second = rank(0, store), rank(1, store)
    ending = threading.Thread(target=leave, args=(second, ValueError("the reason")))
    ending.start()
    with pytest.raises(RankLost, match="rank 1 ended with an error: ValueError: the reason") as caught:
        leave(first, BROKEN)
    ending.join()
    assert caught.value.in_its_words
    assert caught.value.exit_code == LOST
    assert "rank 0 lost contact (RuntimeError: [gloo" in str(caught.value)


def test_a_rank_that_falls_silent_is_named_with_its_place(store):
    first, second = rank(0, store), rank(1, store)
    time.sleep(1.0)
    second._end.set()  # no more beats, as of a stopped process
    second._leaving.set()
    with pytest.raises(
        RankLost, match=r"rank 1 \(process \d+ on .*\) gives no sign of life for \d+ s; last seen in"
    ) as caught:
        leave(first, BROKEN)
    assert "step 7 of 9" in str(caught.value)
    assert not caught.value.in_its_words


def test_an_error_of_its_own_stays_what_it_is(store):
    first, second = rank(0, store), rank(1, store)
    assert leave(first, ValueError("mine")) is None
    leave(second, None)


@pytest.mark.parametrize("steps_go_by", [True, False])
def test_only_a_thread_that_stays_in_one_place_of_one_step_hangs(monkeypatch, steps_go_by):
    watchdog, fired, began = Watchdog(0, 1, None, timeout=1.0), threading.Event(), time.monotonic()
    monkeypatch.setattr(watchdog, "_fire", fired.set)
    watchdog.follow(lambda: f"step {int(4 * (time.monotonic() - began)) if steps_go_by else 7} of 9")
    with watchdog:
        assert fired.wait(2.5) is not steps_go_by


def test_what_is_no_step_has_more_time_and_is_called_what_it_is(monkeypatch):
    watchdog, lost, fired = Watchdog(0, 1, None, timeout=0.6), [], threading.Event()
    monkeypatch.setattr(watchdog, "_fire", lambda: (lost.append(watchdog._lost(watchdog._look(0.0))), fired.set()))
    assert watchdog._stage() == ("set-up", 0.6 * ASIDE_PATIENCE)
    watchdog.follow(lambda: "step 8 of 9", lambda: "a save after step 7")
    with watchdog:
        assert fired.wait(9.0)
    said = str(lost[0])
    assert "has waited 2 s in a save after step 7, " in said
    assert "timeout_minutes is 0.01, and what is no step may take 3 times that; fix: raise timeout_minutes if" in said


def test_where_a_thread_waits_is_said_with_the_collective_and_its_caller(store):
    dist.init_process_group("gloo", store=store, rank=0, world_size=1)
    try:
        places = []
        plain = dist.distributed_c10d._get_default_group
        dist.distributed_c10d._get_default_group = lambda: (places.append(place_of(sys._getframe(1))), plain())[1]
        try:
            dist.barrier()
        finally:
            dist.distributed_c10d._get_default_group = plain
        place = next(place for place in places if place.collective == "barrier")
        assert "barrier, called by test_watchdog.py:" in place.text
        assert "(test_where_a_thread_waits_is_said" in place.text
        assert place_of(sys._getframe()).collective == ""
    finally:
        dist.destroy_process_group()


def test_no_thread_outlives_a_rank_that_has_done_its_work(store):
    watchdog = rank(0, store)
    assert {thread.name for thread in watchdog._threads} == {"watchdog", "heartbeat"}
    leave(watchdog, None)
    assert not any(thread.is_alive() for thread in watchdog._threads)
