"""Signals and lost ranks: progress is saved and the code says so; whoever hangs is named; nothing hangs with it."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from megatron_octo.checkpoint.seal import verify_seal
from megatron_octo.checkpoint.store import latest_checkpoint, sealed_checkpoints
from megatron_octo.errors import StageFailed
from megatron_octo.runtime.launch import launch
from megatron_octo.runtime.stop import LOST, STOPPED

HERE = Path(__file__).parent
DISTRIBUTED = HERE.parent / "distributed"
sys.path.insert(0, str(DISTRIBUTED))

from tiny_run import STEPS, metrics, write_run  # noqa: E402

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]

THERE = {"PYTHONPATH": os.pathsep.join([str(HERE), str(DISTRIBUTED)])}
TWO = ["parallel.data=2", "batch.micro_batch=1", "timeout_minutes=0.1", "checkpoint.every=256"]
TIMEOUT, TO_END = 6.0, 15.0
KEPT = "step_00000004"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ranks")
    write_run(folder)
    return folder


@pytest.fixture(scope="module")
def stops(folder):
    """A trainer for each moment of a signal, and each again to its end."""
    environment = {**os.environ, **THERE, "OMP_NUM_THREADS": "1"}
    arguments = ["nursery", str(folder / "run.yaml"), str(folder / "stops.json")]
    subprocess.run([sys.executable, "-m", "ranks_worker", *arguments], env=environment, check=True, timeout=200)
    return json.loads((folder / "stops.json").read_text())


class Fate:
    """What became of a world of two ranks: the launcher's error, and how long a rank kept the others waiting."""

    def __init__(self, folder: Path, fault: str) -> None:
        self.out = folder / fault
        arguments = [fault, str(folder / "run.yaml"), f"out={self.out}", *TWO]
        with pytest.raises(StageFailed) as caught:
            launch("ranks_worker", arguments, 2, self.out, 1, environment=THERE)
        self.error, self.text = caught.value, str(caught.value)
        self.seconds = time.time() - max(line["time"] for line in metrics(self.out))


@pytest.fixture(scope="module")
def fates(folder):
    """Every fault of one rank of two, two worlds at a time."""
    faults = ("raise", "kill", "stop rank 1", "stop rank 0", "busy")
    with ThreadPoolExecutor(2) as pool:
        return dict(zip(faults, pool.map(lambda fault: Fate(folder, fault), faults), strict=True))


STOPPED_AT = {
    "in forward": "step_00000006",
    "in a save": "step_00000009",
    "twice": "step_00000006",
    "interrupted": "step_00000006",
}


@pytest.mark.parametrize("name", STOPPED_AT)
def test_a_signal_saves_and_ends_with_its_code_within_the_grace(folder, stops, name):
    first = stops[f"{name} first"]
    assert first["code"] == STOPPED, first["said"]
    assert STOPPED_AT[name] in stops[f"{name} left"]
    told = "Ctrl-C (SIGINT)" if name == "interrupted" else "SIGTERM"
    assert f"stopped by {told}, " in first["said"]
    assert " s ago, after step " in first["said"]
    assert "fix: start the same command again" in first["said"]


def test_a_signal_in_the_last_step_stops_nothing(folder, stops):
    first = stops["in the last step first"]
    assert first["code"] == 0, first["said"]
    assert "stopped" not in first["said"]
    assert f"finished: step {STEPS} of {STEPS}" in first["said"]
    assert shards(folder / "in the last step") == shards(folder / "reference")


def test_a_save_that_hangs_has_more_time_than_a_step_and_is_called_a_save(stops):
    hung = stops["save that hangs"]
    assert hung["code"] == LOST
    assert "has waited 4 s in a save after step 2, " in hung["said"]
    assert "fix: raise timeout_minutes if this is slow" in hung["said"]


def test_a_signal_before_the_first_step_ends_at_once(stops):
    first = stops["before the first step first"]
    assert first["code"] == STOPPED
    assert "stopped by SIGTERM before a step was taken" in first["said"]
    assert stops["before the first step left"] == []


def test_a_step_that_outlasts_the_grace_does_not_hold_up_the_end(stops):
    first = stops["too long first"]
    assert first["code"] == STOPPED
    assert "the step or save at hand is not over (stop_grace_seconds 2)" in first["said"]
    assert "for_ever" in first["said"], "the stacks are missing"
    assert stops["too long left"] == [KEPT]


@pytest.mark.parametrize("name", [*STOPPED_AT, "before the first step", "too long"])
def test_a_stopped_run_ends_bitwise_like_an_uninterrupted_one(folder, stops, name):
    assert stops["reference"]["code"] == stops[name]["code"] == 0, stops[name]["said"]
    assert len(metrics(folder / name)) == STEPS
    assert shards(folder / name) == shards(folder / "reference")


def test_a_signal_while_python_still_imports(folder):
    process = subprocess.Popen(
        [sys.executable, "-m", "megatron_octo.train", str(folder / "run.yaml"), f"out={folder / 'importing'}"],
        stderr=subprocess.PIPE,
        text=True,
    )
    deadline = time.monotonic() + 30
    while not catches_sigterm(process.pid) and time.monotonic() < deadline:
        time.sleep(0.005)
    process.send_signal(signal.SIGTERM)
    said = process.communicate(timeout=30)[1]
    assert process.returncode == STOPPED
    assert "before a step was taken" in said


def test_a_rank_that_raises_alone_is_named_with_its_reason(fates):
    fate = fates["raise"]
    assert "rank 1 ended with exit code 1" in fate.text
    assert "the reason" in fate.text
    assert fate.error.exit_code == 1


def test_a_killed_rank_is_named(fates):
    assert "rank 1 was ended by SIGKILL" in fates["kill"].text
    assert fates["kill"].error.exit_code == 128 + signal.SIGKILL


@pytest.mark.parametrize("rank", [0, 1])
def test_a_stopped_rank_is_named_within_the_timeout_with_the_last_collective(fates, rank):
    fate = fates[f"stop rank {rank}"]
    assert fate.error.exit_code == LOST
    assert fate.text.startswith(f"rank {rank} (process ")
    assert "gives no sign of life" in fate.text
    assert f"rank {1 - rank} has waited 6 s in step 6 of 16, " in fate.text
    assert any(f"{name}, called by megatron" in fate.text for name in ("all_reduce", "_coalescing_manager"))
    assert "fix: " in fate.text
    assert fate.seconds < TIMEOUT + TO_END
    assert "Current thread" in (fate.out / f"log-rank{1 - rank}.txt").read_text()


def test_a_rank_that_is_alive_but_elsewhere_is_named_with_its_place(fates):
    fate = fates["busy"]
    assert fate.error.exit_code == LOST
    assert "rank 1 (process " in fate.text
    assert "(busy)" in fate.text


@pytest.mark.parametrize("fault", ["raise", "kill", "stop rank 0", "stop rank 1", "busy"])
def test_the_last_checkpoint_outlives_a_lost_rank(fates, fault):
    last = latest_checkpoint(fates[fault].out)
    assert last.name == KEPT
    verify_seal(last)


def test_a_second_job_on_a_run_directory_is_refused_and_harms_nothing(folder, stops):
    out, release = folder / "shared", folder / "release"
    environment = {**THERE, "RELEASE": str(release)}
    command = [str(folder / "run.yaml"), f"out={out}"]
    with ThreadPoolExecutor(1) as pool:
        first = pool.submit(launch, "ranks_worker", ["hold", *command], 1, out / "logs", 1, environment=environment)
        deadline = time.monotonic() + 60
        while not release.with_suffix(".there").exists() and time.monotonic() < deadline:
            time.sleep(0.05)
        try:
            with pytest.raises(StageFailed, match="another process trains here") as caught:
                launch("megatron_octo.train", command, 1, out / "second", 1, environment=THERE)
        finally:
            release.touch()
        first.result(timeout=60)
    assert caught.value.exit_code == 6
    assert "choose another `out`" in str(caught.value)
    assert shards(out) == shards(folder / "reference")
    assert [path.name for path in sealed_checkpoints(out)][-1] == "step_00000016"


def shards(run_dir: Path) -> dict[str, str]:
    """Hashes of the files that hold every weight and moment of the last checkpoint."""
    files = json.loads((latest_checkpoint(run_dir) / "seal.json").read_text())["files"]
    return {name: entry["blake3"] for name, entry in files.items() if name.endswith(".distcp")}


def catches_sigterm(pid: int) -> bool:
    line = next(line for line in Path(f"/proc/{pid}/status").read_text().splitlines() if line.startswith("SigCgt"))
    return bool(int(line.split()[1], 16) >> (signal.SIGTERM - 1) & 1)
