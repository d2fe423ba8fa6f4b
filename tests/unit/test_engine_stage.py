"""Stages: what is repeated after a stop and what is not, in one process and in several."""

from __future__ import annotations

import multiprocessing
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from engine_tasks import Task, work

from megatron_octo.data.engine import on_ray
from megatron_octo.data.engine import stage as stage_module
from megatron_octo.data.engine.executors import InProcess, Workers, executor_of
from megatron_octo.data.engine.stage import Stage, calls_of, plain, run_stages
from megatron_octo.errors import ConfigError, DataError, EnvironmentProblem, StageFailed
from megatron_octo.files import hold


def _stage(out: Path, *does: str, made_from: Any = 1) -> Stage:
    return Stage("squares", [Task(number, out, what) for number, what in enumerate(does)], work, made_from)


def _done(out: Path) -> list[int]:
    """Numbers of the tasks that were begun since the last look, sorted."""
    log = out / "log"
    numbers = sorted(map(int, log.read_text().split())) if log.exists() else []
    log.unlink(missing_ok=True)
    return numbers


FACTS = [{"square": n * n, "files": {f"piece-{n}": len(str(n * n))}} for n in range(5)]


@pytest.fixture(scope="module")
def workers() -> Any:
    """Two processes that all tests share; a test that loses them starts them anew."""
    with Workers(2) as started:
        yield started


@pytest.fixture(params=["in this process", "in two"])
def executor(request: pytest.FixtureRequest) -> Any:
    return InProcess() if request.param == "in this process" else request.getfixturevalue("workers")


def test_facts_come_in_the_order_of_the_tasks(tmp_path: Path, executor: Any) -> None:
    assert run_stages([_stage(tmp_path, *["square"] * 5)], tmp_path, executor) == {"squares": FACTS}
    assert _done(tmp_path) == [0, 1, 2, 3, 4]


def test_a_log_hears_of_every_stage_once_the_build_takes_long(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    stages = [replace(_stage(tmp_path, "square", made_from=name), name=name) for name in ("first", "second", "third")]
    run_stages(stages[:2], tmp_path, InProcess())
    assert capsys.readouterr().err == ""
    clock = [100.0]
    monkeypatch.setattr(stage_module.time, "monotonic", lambda: clock[0])
    late = replace(stages[1], made_from=2, work=lambda task: [clock.append(clock.pop() + 40), work(task)][1])
    run_stages([replace(stages[0], made_from=2), late, stages[2]], tmp_path, InProcess())
    told = capsys.readouterr().err.splitlines()
    assert [line.split(" ", 1)[1] for line in told] == ["second: 100.0% · 1 of 1 tasks", "third: 100.0% · 1 of 1 tasks"]


def test_only_what_changed_is_done_again(tmp_path: Path) -> None:
    stage = _stage(tmp_path, *["square"] * 5)
    run_stages([stage], tmp_path, InProcess())
    assert _done(tmp_path) == [0, 1, 2, 3, 4]
    assert run_stages([stage], tmp_path, InProcess()) == {"squares": FACTS} and _done(tmp_path) == []
    changed = replace(stage, tasks=[*stage.tasks[:2], replace(stage.tasks[2], number=7), *stage.tasks[3:]])
    assert run_stages([changed], tmp_path, InProcess())["squares"][2]["square"] == 49 and _done(tmp_path) == [7]
    run_stages([replace(stage, made_from={"seed": 2})], tmp_path, InProcess())
    assert _done(tmp_path) == [0, 1, 2, 3, 4]


def test_a_record_without_its_files_counts_for_nothing(tmp_path: Path) -> None:
    stage = _stage(tmp_path, *["square"] * 5)
    run_stages([stage], tmp_path, InProcess())
    (tmp_path / "piece-1").unlink()
    (tmp_path / "piece-3").write_text("cut"[:0])
    (tmp_path / "records" / "squares" / "00004.json").write_text('{"made_from"')
    _done(tmp_path)
    assert run_stages([stage], tmp_path, InProcess()) == {"squares": FACTS} and _done(tmp_path) == [1, 3, 4]


def test_the_error_of_a_task_arrives_as_it_was(tmp_path: Path, executor: Any) -> None:
    with pytest.raises(DataError) as caught:
        run_stages([_stage(tmp_path, "square", "refuse", "square")], tmp_path, executor)
    assert str(caught.value) == "that shard, line 7: broken; a rule; fix: mend it"
    assert not (tmp_path / "records" / "squares" / "00001.json").exists()


def test_the_other_tasks_do_not_go_on(tmp_path: Path, workers: Workers) -> None:
    began = time.monotonic()
    with pytest.raises(DataError):
        run_stages([_stage(tmp_path, "sleep", "refuse", "square")], tmp_path, workers)
    assert time.monotonic() - began < 20 and multiprocessing.active_children() == []


def test_a_full_disk_is_told_as_such(tmp_path: Path, workers: Workers) -> None:
    with pytest.raises(EnvironmentProblem, match="piece: no space left on device"):
        run_stages([_stage(tmp_path, "full", "square")], tmp_path, workers)


def test_a_defect_keeps_its_traceback(tmp_path: Path, workers: Workers) -> None:
    with pytest.raises(RuntimeError, match="engine_tasks.py.*\n.*raise Peculiar"):
        run_stages([_stage(tmp_path, "fail", "square")], tmp_path, workers)


@pytest.mark.timeout(60)
@pytest.mark.parametrize(("does", "how"), [("die", "killed by SIGKILL"), ("exit", "ended with code 3")])
def test_a_killed_worker_is_told_and_what_was_done_stays(tmp_path: Path, workers: Workers, does: str, how: str) -> None:
    with pytest.raises(StageFailed, match=f"{how} at task 4 of 'squares'.*fix: start the same command again"):
        run_stages([_stage(tmp_path, "square", "square", "square", does)], tmp_path, workers)
    _done(tmp_path)
    run_stages([_stage(tmp_path, *["square"] * 4)], tmp_path, workers)
    assert 3 in _done(tmp_path)


ORPHANS = """
import sys
from pathlib import Path
sys.path.insert(0, sys.argv[1])
from engine_tasks import Task, work
from megatron_octo.data.engine import stage as stage_module
from megatron_octo.data.engine.executors import Workers
from megatron_octo.data.engine.stage import Stage, run_stages
from megatron_octo.files import hold
out = Path(sys.argv[2])
with hold(out) as lock, Workers(2, lock) as workers:  # a script without a guard of its main module
    run_stages([Stage("squares", [Task(n, out, "sleep") for n in range(2)], work, 1)], out, workers)
"""


@pytest.mark.timeout(60)
def test_workers_end_with_the_process_that_started_them(tmp_path: Path) -> None:
    """It is killed while both of its workers are busy; the directory is free again at once, and nothing runs on."""
    process = subprocess.Popen([sys.executable, "-", str(Path(__file__).parent), str(tmp_path)], stdin=subprocess.PIPE)
    assert process.stdin is not None
    process.stdin.write(ORPHANS.encode())
    process.stdin.close()
    while not (tmp_path / "log").exists() or len((tmp_path / "log").read_text().split()) < 2:
        assert process.poll() is None
        time.sleep(0.05)
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    with hold(tmp_path, patience=20.0):
        assert [child for child in children if _computes(child)] == []


def _computes(process: str) -> bool:
    try:
        return "spawn_main" in Path(f"/proc/{process}/cmdline").read_text()
    except OSError:
        return False


def _lives(pid: Path) -> bool:
    try:
        state = Path(f"/proc/{pid.read_text()}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return False
    return state != "Z"


@pytest.mark.slow
@pytest.mark.timeout(120)
def test_ray_does_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A real Ray of this machine: results, errors as they were, and a task that kills its worker each time."""
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parent))
    ending = signal.getsignal(signal.SIGTERM)
    with executor_of("ray", 2) as ray:
        assert run_stages([_stage(tmp_path, *["square"] * 5)], tmp_path, ray) == {"squares": FACTS}
        assert signal.getsignal(signal.SIGTERM) == ending, "Ray has its own, with another exit code"
        with pytest.raises(DataError, match="that shard, line 7: broken; a rule; fix: mend it"):
            run_stages([_stage(tmp_path, "square", "refuse", made_from=2)], tmp_path, ray)
        with pytest.raises(RuntimeError, match="raise Peculiar"):
            run_stages([_stage(tmp_path, "fail", made_from=3)], tmp_path, ray)
        _done(tmp_path)
        with pytest.raises(StageFailed, match="a data worker was lost at task 1 of 'squares'"):
            run_stages([_stage(tmp_path, "exit", made_from=4)], tmp_path, ray)
        assert _done(tmp_path) == [0, 0, 0]
        with pytest.raises(DataError, match="line 8"):
            run_stages([_stage(tmp_path, "linger", "wait and refuse", made_from=5)], tmp_path, ray)
        deadline = time.monotonic() + 5  # Ray tells of the end of a killed process a moment before the system does
        while _lives(tmp_path / "pid"):
            assert time.monotonic() < deadline, "a cancelled task has ended when the error is told"
            time.sleep(0.02)


@pytest.fixture
def ends_with_143() -> Iterator[None]:
    """As a command does on SIGTERM."""
    before = signal.signal(signal.SIGTERM, lambda number, _frame: sys.exit(128 + number))
    yield
    signal.signal(signal.SIGTERM, before)


@pytest.mark.usefixtures("ends_with_143")
def test_sigterm_while_ray_starts_is_this_processs_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ray's handlers end with other codes and say nothing; the first is put in place before it starts a process."""
    import ray

    def at_once(handler: Any) -> None:
        signal.signal(signal.SIGTERM, handler)
        signal.raise_signal(signal.SIGTERM)

    own = signal.getsignal(signal.SIGTERM)
    monkeypatch.setattr(ray._private.utils, "set_sigterm_handler", at_once)
    with executor_of("ray", 2) as team, pytest.raises(SystemExit, match="143"):
        run_stages([_stage(tmp_path, "square")], tmp_path, team)
    assert signal.getsignal(signal.SIGTERM) == own and not ray.is_initialized()
    with pytest.raises(SystemExit, match="143"), on_ray._own_sigterm():
        at_once(lambda *_: sys.exit(1))  # as the second does, which first ends what Ray has started
    assert signal.getsignal(signal.SIGTERM) == own
    imported = []
    with pytest.raises(SystemExit, match="143"), on_ray._sigterm_afterwards():
        signal.raise_signal(signal.SIGTERM)
        imported.append("whole")
    assert imported and signal.getsignal(signal.SIGTERM) == own


def test_nobody_to_do_the_work() -> None:
    with pytest.raises(ConfigError, match="workers = 0"):
        executor_of("local", 0)
    with pytest.raises(ConfigError, match="executor = 'dask'"):
        executor_of("dask", 1)


def test_what_has_no_form_of_its_own_cannot_be_a_task() -> None:
    assert plain({"a": frozenset(["y", "x"]), "b": (Path("c"), None)}) == {"a": ["x", "y"], "b": ["c", None]}
    with pytest.raises(TypeError):
        plain(object())


def test_keys_of_many_tasks_take_linear_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A stage may be made from as many files as it has tasks; that is turned to JSON and hashed once, not for each."""
    visited, hashed, hash_json = [], [], stage_module.hash_json
    monkeypatch.setattr(stage_module, "plain", lambda value: (visited.append(1), plain(value))[1])
    monkeypatch.setattr(stage_module, "hash_json", lambda value: (hashed.append(len(str(value))), hash_json(value))[1])

    def cost(count: int) -> tuple[int, int, set[str]]:
        visited.clear(), hashed.clear()
        stage = Stage("many", range(count), work, [{"sha256": "0" * 64, "bytes": n} for n in range(count)])
        keys = {call.key for call in calls_of(stage, tmp_path)}
        return len(visited), sum(hashed), keys

    (few, short, some), (many, long, others) = cost(100), cost(200)
    assert many < 2.5 * few and long < 2.5 * short
    assert len(some) == 100 and len(others) == 200 and not some & others, "each follows from all the files"
