"""Trainers killed, or out of disk or files, in a save: the last checkpoint stays, the run ends bitwise the same."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from megatron_octo.checkpoint.seal import verify_seal
from megatron_octo.checkpoint.store import latest_checkpoint, sealed_checkpoints

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent / "distributed"))

from tiny_run import STEP_TOKENS, metrics, values, write_run  # noqa: E402

pytestmark = [pytest.mark.slow, pytest.mark.timeout(240)]

STEPS, EVERY = 8, 3
KILLED_BY_SIGKILL = -9
SAME = ("step", "tokens", "loss", "learning_rate", "grad_norm")

# What a kill leaves under checkpoints/, and what is in charge then.
KILLS = {
    "before any byte": (["step_00000003"], "step_00000003"),
    "mid-shard": ([".tmp-step_00000006", "step_00000003"], "step_00000003"),
    "before the metadata": ([".tmp-step_00000006", "step_00000003"], "step_00000003"),
    "before the rename": ([".tmp-step_00000006", "step_00000003"], "step_00000003"),
    "before the pointer": (["step_00000003", "step_00000006"], "step_00000003"),
    "in the pointer": (["step_00000003", "step_00000006"], "step_00000003"),
    "while pruning": ([".old-step_00000003", "step_00000006"], "step_00000006"),
    "in the background": ([".tmp-step_00000006", "step_00000003"], "step_00000003"),
}
SPARED = ("checkpoints/step_00000003 is untouched", "what was sealed before is untouched")  # looked up, or not
FAILURES = {
    "disk full": "no space for a checkpoint",
    "disk full in the background": "no space for a checkpoint",
    "read-only directory": "could not be written (Read-only file system)",
    "failing device": "could not be written (Input/output error)",
    "too many open files": "could not be written (Too many open files)",
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("killed-saves")
    run = write_run(folder)
    plain = values(folder)
    plain["schedule"]["tokens"] = STEPS * STEP_TOKENS
    plain["checkpoint"] = {"every": EVERY * STEP_TOKENS, "keep": 9}
    run.write_text(yaml.safe_dump({**plain, "threads": 1}))
    environment = {**os.environ, "PYTHONPATH": str(HERE), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "forked_worker", str(run), str(folder / "notes.json")]
    subprocess.run(command, env=environment, check=True, timeout=200, stderr=subprocess.DEVNULL)
    return folder


@pytest.fixture(scope="module")
def notes(folder):
    return json.loads((folder / "notes.json").read_text())


def shards(run_dir: Path) -> dict[str, str]:
    files = json.loads((latest_checkpoint(run_dir) / "seal.json").read_text())["files"]
    return {name: entry["blake3"] for name, entry in files.items() if name.endswith(".distcp")}


def lines(run_dir: Path) -> list[tuple]:
    return [tuple(line[name] for name in SAME) for line in metrics(run_dir)]


def ends_like_the_undisturbed(folder: Path, name: str) -> None:
    assert lines(folder / name) == lines(folder / "undisturbed")
    assert len(lines(folder / name)) == STEPS
    assert shards(folder / name) == shards(folder / "undisturbed")
    for path in sealed_checkpoints(folder / name):
        verify_seal(path)
    assert not [path for path in (folder / name / "checkpoints").iterdir() if path.name.startswith(".")]


@pytest.mark.parametrize("point", KILLS)
def test_a_trainer_killed_while_saving_loses_nothing(folder, notes, point):
    killed, resumed = notes[point]
    assert killed["code"] == KILLED_BY_SIGKILL
    assert (killed["left"], killed["latest"]) == KILLS[point]
    assert killed["lines"] == EVERY * 2 if point != "in the background" else killed["lines"] > EVERY * 2
    assert resumed["code"] == 0, resumed["said"]
    ends_like_the_undisturbed(folder, point)


@pytest.mark.parametrize("kind", FAILURES)
def test_a_save_that_cannot_be_written_is_one_line_and_leaves_the_last_checkpoint(folder, notes, kind):
    failed, resumed = notes[kind]
    assert failed["code"] == 6
    (line,) = [line for line in failed["said"].splitlines() if line.startswith("octo: error:")]
    assert FAILURES[kind] in line and SPARED[kind == "too many open files"] in line and "fix:" in line
    assert "Traceback" not in failed["said"]
    assert failed["latest"] == "step_00000003"
    assert [name for name in failed["left"] if not name.startswith(".")] == ["step_00000003"]
    if "files" not in kind:  # without a file left to open, not even a directory can be listed and removed
        assert failed["left"] == ["step_00000003"]
    assert resumed["code"] == 0, resumed["said"]
    ends_like_the_undisturbed(folder, kind)


def test_short_writes_are_completed(folder, notes):
    assert [ended["code"] for ended in notes["short writes"]] == [0, 0]
    ends_like_the_undisturbed(folder, "short writes")
