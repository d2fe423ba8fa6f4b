"""The launcher with real processes: logs, failures, stop signals, a killed parent, ports. No torch in the ranks."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from megatron_octo.errors import EnvironmentProblem, StageFailed
from megatron_octo.runtime.launch import launch
from megatron_octo.runtime.stop import STOPPED, name_of

pytestmark = pytest.mark.timeout(60)

RANK = """
import os, signal, sys, time
rank, kind = os.environ["RANK"], sys.argv[1]
open(os.path.join(sys.argv[2], f"pid{rank}"), "w").write(str(os.getpid()))
if kind == "fine":
    print("hello", rank, os.environ["WORLD_SIZE"], os.environ["OMP_NUM_THREADS"], os.environ["MASTER_PORT"])
elif kind == "crash" and rank == "1":
    raise RuntimeError("the reason")
elif kind == "user" and rank == "1":
    print("octo: error: data.seed = -1; must not be negative; fix: write 0"); sys.exit(2)
elif kind == "killed" and rank == "1":
    os.kill(os.getpid(), signal.SIGKILL)
elif kind == "collateral":
    if rank == "0":
        print("RuntimeError: Connection closed by peer [127.0.0.1]:1"); sys.exit(1)
    time.sleep(0.5); print("ValueError: the reason"); sys.exit(1)
elif kind == "port":
    print(os.environ["MASTER_PORT"] if rank == "0" else ""); time.sleep(0.5)
elif kind == "saves":
    signal.signal(signal.SIGTERM, lambda *_: (print("saved", flush=True), sys.exit(0)))
    print("ready", flush=True); time.sleep(60)
else:
    time.sleep(60)
"""


@pytest.fixture
def start(tmp_path):
    (tmp_path / "rank_script.py").write_text(RANK)

    def run(kind: str, nproc: int = 2, **options):
        environment = {"PYTHONPATH": str(tmp_path)}
        launch("rank_script", [kind, str(tmp_path)], nproc, tmp_path / "logs", environment=environment, **options)
        return [(tmp_path / "logs" / f"log-rank{rank}.txt").read_text() for rank in range(nproc)]

    return run


def is_running(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0]
    except (FileNotFoundError, ProcessLookupError):
        return False
    return state != "Z"


def ended(pids: list[int], seconds: float = 5) -> bool:
    deadline = time.monotonic() + seconds
    while any(is_running(pid) for pid in pids) and time.monotonic() < deadline:
        time.sleep(0.02)
    return not any(is_running(pid) for pid in pids)


def pids(folder: Path) -> list[int]:
    deadline = time.monotonic() + 10
    files = [folder / f"pid{rank}" for rank in range(2)]
    while not all(file.exists() and file.read_text() for file in files) and time.monotonic() < deadline:
        time.sleep(0.02)
    return [int(file.read_text()) for file in files]


def test_ranks_get_their_world_and_logs_are_appended(start):
    logs = start("fine", threads=3)
    assert [log.split()[:4] for log in logs] == [["hello", "0", "2", "3"], ["hello", "1", "2", "3"]]
    assert logs[0].split()[4] == logs[1].split()[4]
    assert start("fine")[0].count("hello") == 2


def test_a_crash_names_the_rank_and_ends_the_others(start, tmp_path):
    with pytest.raises(StageFailed, match="rank 1 ended with exit code 1") as caught:
        start("crash")
    assert "RuntimeError: the reason" in str(caught.value)
    assert "log-rank1.txt" in str(caught.value)
    assert caught.value.exit_code == 1
    assert ended(pids(tmp_path), 0.1)


def test_a_users_mistake_stays_one_clear_line(start):
    with pytest.raises(StageFailed) as caught:
        start("user")
    assert str(caught.value) == "data.seed = -1; must not be negative; fix: write 0"
    assert caught.value.exit_code == 2


def test_a_killed_rank_is_told_by_its_signal(start):
    with pytest.raises(StageFailed, match="rank 1 was ended by SIGKILL") as caught:
        start("killed")
    assert caught.value.exit_code == 137


def test_the_cause_is_named_not_the_rank_that_lost_its_connection(start):
    with pytest.raises(StageFailed, match="the reason"):
        start("collateral")


def test_a_port_in_use_is_refused_before_anything_starts(start, tmp_path):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        with pytest.raises(EnvironmentProblem, match="cannot be used"):
            start("fine", port=taken.getsockname()[1])
    assert not (tmp_path / "pid0").exists()


def test_a_port_belongs_to_the_ranks_from_the_start_whoever_else_asks_for_it(start, tmp_path):
    """No rank has taken it over yet when another process tries it: imports take seconds."""
    refused = []

    def ask():
        log = tmp_path / "logs" / "log-rank0.txt"
        if not refused and log.exists() and (told := log.read_text().split()):
            for reuse in (0, 1):
                with socket.socket() as other:
                    other.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, reuse)
                    with pytest.raises(OSError, match="in use"):
                        other.bind(("127.0.0.1", int(told[0])))
                    refused.append(reuse)

    start("port", watch=ask)
    assert refused == [0, 1]


def test_watch_is_called_while_ranks_run(start):
    calls = []
    start("fine", watch=lambda: calls.append(1))
    assert calls


def parent_command(folder: Path, kind: str) -> list[str]:
    code = (
        "import sys; from pathlib import Path; from megatron_octo.runtime.launch import launch\n"
        "from megatron_octo.errors import StageFailed\n"
        f"try: launch('rank_script', [{kind!r}, {str(folder)!r}], 2, Path({str(folder)!r}) / 'logs')\n"
        "except StageFailed as error: print(error); sys.exit(error.exit_code)\n"
    )
    return [sys.executable, "-c", code]


@pytest.fixture
def parent(start, tmp_path):
    """Start a launcher in a process of its own and wait until both ranks are up."""
    started = []

    def run(kind: str) -> tuple[subprocess.Popen, list[int]]:
        environment = {**os.environ, "PYTHONPATH": str(tmp_path)}
        process = subprocess.Popen(parent_command(tmp_path, kind), env=environment, stdout=subprocess.PIPE, text=True)
        started.append(process)
        return process, pids(tmp_path)

    yield run
    for process in started:
        process.kill()
        process.wait()


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="the kernel's parent-death signal is Linux's")
def test_ranks_die_with_a_killed_launcher(parent):
    process, ranks = parent("hang")
    process.kill()
    assert ended(ranks)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_stop_signal_reaches_the_ranks_and_is_reported(parent, tmp_path, number):
    process, ranks = parent("saves")
    time.sleep(0.2)
    process.send_signal(number)
    said, _ = process.communicate(timeout=20)
    assert process.returncode == 128 + number
    assert f"stopped by {name_of(number)}" in said
    assert ended(ranks, 0.1)
    assert "saved" in (tmp_path / "logs" / "log-rank0.txt").read_text()


def test_a_signal_that_finds_all_ranks_at_their_end_stops_nothing(start, tmp_path):
    told = []

    def tell():
        logs = [tmp_path / "logs" / f"log-rank{rank}.txt" for rank in range(2)]
        if not told and all(log.exists() and "ready" in log.read_text() for log in logs):
            told.append(os.kill(os.getpid(), signal.SIGTERM))

    assert all("saved" in log for log in start("saves", watch=tell, stopped_code=STOPPED))
    assert told
