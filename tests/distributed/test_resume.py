"""Killed, stopped, resharded and forked runs end where they should; real processes, real checkpoints."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from megatron_octo.checkpoint.family import families
from megatron_octo.checkpoint.seal import verify_seal
from megatron_octo.checkpoint.store import latest_checkpoint, read_facts, sealed_checkpoints
from megatron_octo.runtime.launch import launch
from megatron_octo.schedule.fork import pinned_checkpoints

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE))

from tiny_run import LAYOUTS, RATE, STEP_TOKENS, STEPS, metrics, write_run  # noqa: E402

pytestmark = [pytest.mark.slow, pytest.mark.timeout(400)]

POINTS = {
    "killed-step": "during step 7",
    "killed-seal": "before sealing",
    "killed-pointer": "before the pointer",
}
KILLED_BY_SIGKILL = -9
SAME = ("loss", "learning_rate", "grad_norm", "tokens", "run_tokens", "step")


def start(module: str, *arguments: str) -> subprocess.Popen:
    environment = {"PATH": "/usr/bin:/bin", "PYTHONPATH": str(HERE), "OMP_NUM_THREADS": "1"}
    return subprocess.Popen([sys.executable, "-m", module, *arguments], env=environment, stderr=subprocess.PIPE)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Runs everything: three killed processes, one job of four ranks, and one process for the rest."""
    folder = tmp_path_factory.mktemp("resume")
    run = write_run(folder)
    killed = [start("killed_worker", point, str(run), f"out={folder / name}") for name, point in POINTS.items()]
    for process in killed:
        process.communicate(timeout=100)
        assert process.returncode == KILLED_BY_SIGKILL
    (folder / "left.json").write_text(json.dumps({name: left_behind(folder / name) for name in POINTS}))
    there = {"PYTHONPATH": str(HERE)}
    launch("resume_worker", ["four", str(run), str(folder / "four.json")], 4, folder / "logs", 1, environment=there)
    launch("resume_worker", ["single", str(run), str(folder / "notes.json")], 1, folder / "logs", 1, environment=there)
    return folder


def left_behind(run_dir: Path) -> dict:
    """What a killed process left: names under checkpoints/, and what `latest` says."""
    names = sorted(path.name for path in (run_dir / "checkpoints").iterdir())
    return {"names": names, "latest": latest_checkpoint(run_dir).name}


@pytest.fixture(scope="module")
def notes(folder):
    return json.loads((folder / "notes.0.json").read_text())


def shards(run_dir: Path) -> dict[str, str]:
    """Hashes of the files that hold every weight and moment of the last checkpoint."""
    files = json.loads((latest_checkpoint(run_dir) / "seal.json").read_text())["files"]
    return {name: entry["blake3"] for name, entry in files.items() if name.endswith(".distcp")}


def same(run_dir: Path, reference: Path) -> list[tuple]:
    return [
        (mine["step"], field, mine[field], theirs[field])
        for mine, theirs in zip(metrics(run_dir), metrics(reference), strict=True)
        for field in SAME
        if mine[field] != theirs[field]
    ]


def test_the_reference_learns_and_ends(folder, notes):
    assert notes["reference"] == {"error": None}
    lines = metrics(folder / "reference")
    assert [line["step"] for line in lines] == list(range(1, STEPS + 1))
    assert lines[-1]["loss"] < lines[0]["loss"] - 0.3
    assert lines[-1]["tokens"] == STEPS * STEP_TOKENS


@pytest.mark.parametrize("name", POINTS)
def test_a_killed_run_ends_bitwise_like_an_uninterrupted_one(folder, notes, name):
    assert notes[name] == {"error": None}
    assert same(folder / name, folder / "reference") == []
    assert shards(folder / name) == shards(folder / "reference")


def test_a_kill_leaves_the_last_good_checkpoint_in_charge(folder):
    left = json.loads((folder / "left.json").read_text())
    assert left["killed-step"] == {"names": ["step_00000004"], "latest": "step_00000004"}
    assert left["killed-seal"] == {"names": [".tmp-step_00000008", "step_00000004"], "latest": "step_00000004"}
    assert left["killed-pointer"] == {"names": ["step_00000004", "step_00000008"], "latest": "step_00000004"}
    names = [path.name for path in (folder / "killed-seal" / "checkpoints").iterdir()]
    assert not [name for name in names if name.startswith(".")]


def test_sigterm_saves_at_the_step_boundary_and_the_run_goes_on(folder, notes):
    assert notes["signalled first"]["error"] == "Stopped"
    assert notes["signalled first"]["code"] == 75
    assert "step_00000006" in {path.name for path in sealed_checkpoints(folder / "signalled")}
    assert same(folder / "signalled", folder / "reference") == []
    assert shards(folder / "signalled") == shards(folder / "reference")


def test_until_stops_and_a_constant_schedule_may_grow(folder, notes):
    assert notes["halted first"] == {"error": None} == notes["halted"]
    lines = metrics(folder / "halted")
    assert len(lines) == 20
    assert [line["loss"] for line in lines[:STEPS]] == [line["loss"] for line in metrics(folder / "reference")]


def test_four_processes_in_two_layouts_then_one(folder, notes):
    for rank in range(4):
        seen = json.loads((folder / f"four.{rank}.json").read_text())
        assert seen["first leg"] == seen["second leg"] == {"error": None}
        assert seen["full on rank 1"]["error"] == "EnvironmentProblem"
        assert "bytes) free" in seen["full on rank 1"]["text"]
        assert seen["signalled rank 2"]["error"] == "Stopped"
        assert "after step 11 " in seen["signalled rank 2"]["text"]
    assert notes["four"] == {"error": None}
    lines = metrics(folder / "four")
    assert [line["layout"] for line in lines] == (
        ["TP2 PP2 SP"] * 5 + ["PP2 DP2"] * (11 - 5) + ["single process"] * (STEPS - 11)
    )
    away = [
        abs(mine["loss"] - theirs["loss"]) for mine, theirs in zip(lines, metrics(folder / "reference"), strict=True)
    ]
    assert max(away) <= 1e-6, away


@pytest.mark.parametrize("name", [*LAYOUTS, "bf16", "plain"])
def test_two_legs_are_bitwise_one_in_any_layout(folder, notes, name):
    seen = notes if name in notes else json.loads((folder / "four.0.json").read_text())
    assert seen[f"{name} first"] == seen[name] == seen[f"{name}-whole"] == {"error": None}
    assert len(metrics(folder / name)) == 6
    assert same(folder / name, folder / f"{name}-whole") == []
    assert shards(folder / name) == shards(folder / f"{name}-whole")


def test_a_full_disk_keeps_the_last_checkpoint(folder, notes):
    for note in ("full first", "full again"):
        assert notes[note]["error"] == "EnvironmentProblem"
        assert "no space for a checkpoint" in notes[note]["text"]
    assert notes["full"] == {"error": None}
    assert [path.name for path in sealed_checkpoints(folder / "full")] == ["step_00000001"]
    assert latest_checkpoint(folder / "full").name == "step_00000001"
    assert [path.name for path in (folder / "full" / "checkpoints").iterdir()] == ["step_00000001"]
    verify_seal(latest_checkpoint(folder / "full"))


@pytest.mark.parametrize("rank", range(4))
def test_an_unexpected_error_of_rank_0_reaches_all(folder, rank):
    notes = json.loads((folder / f"four.{rank}.json").read_text())
    assert notes["unexpected"] == "RuntimeError: rank 0: KeyError: 'absent'"
    assert notes["after it"] == "all are here"


def test_given_weights_are_the_start(folder, notes):
    given, converted = metrics(folder / "full")[0], metrics(folder / "converted-run")[0]
    assert given["step"] == given["tokens"] // STEP_TOKENS == 1
    assert given["loss"] < metrics(folder / "reference")[0]["loss"] - 0.3
    assert notes["converted-run"] == {"error": None}
    assert converted["loss"] == given["loss"]


def test_converted_weights_start_a_run_in_another_layout(folder):
    given, converted = metrics(folder / "given-cut")[0], metrics(folder / "converted-cut-run")[0]
    assert given["loss"] < metrics(folder / "reference")[0]["loss"] - 0.3
    assert [converted[key] for key in ("loss", "grad_norm")] == [given[key] for key in ("loss", "grad_norm")]


@pytest.mark.parametrize(("name", "said"), [("wider", "mismatch"), ("deeper", "decoder.layers.2")])
def test_weights_of_another_shape_are_refused(notes, name, said):
    assert notes[name]["error"] == "CheckpointError"
    assert said in notes[name]["text"]
    assert "converted: does not fit this model" in notes[name]["text"]


def test_a_senseless_loss_stops_the_run(folder, notes):
    assert notes["nan"]["error"] == "StageFailed"
    assert "not a finite number" in notes["nan"]["text"]
    assert not (folder / "nan" / "latest").exists()


def test_the_first_resumed_step_has_the_right_rate_and_weight_decay(notes):
    for rate, decay, factor in notes["resumed"]["rates"]:
        assert rate == RATE
        assert decay == 0.1 * factor
    assert {factor for _, _, factor in notes["resumed"]["rates"]} == {0.0, 1.0}
    assert notes["resumed"]["steps"] == [STEPS]


def test_a_branch_carries_weights_and_moments(folder, notes):
    assert notes["branch"] == {"error": None}
    lineage = json.loads((folder / "branch" / "lineage.json").read_text())
    assert pinned_checkpoints(folder / "reference") == {"step_00000008"}
    assert lineage["position"] == 8 * STEP_TOKENS
    assert lineage["checkpoint"] == "step_00000008"
    assert lineage["carried"]["moments"] is True
    assert notes["moments with"]["moments"] == pytest.approx(notes["moments stored"], rel=1e-6)
    assert notes["moments with"]["moments"] > 0
    assert notes["moments with"]["steps"] == [8]
    assert notes["moments without"]["moments"] == 0
    assert notes["moments without"]["steps"] in ([], [0])


def test_the_learning_rate_is_continuous_at_the_fork(folder):
    lines = metrics(folder / "branch")
    assert lines[0]["learning_rate"] == metrics(folder / "reference")[7]["learning_rate"] == RATE
    assert lines[0]["tokens"] == 9 * STEP_TOKENS
    assert lines[0]["run_tokens"] == STEP_TOKENS
    rates = [line["learning_rate"] for line in lines]
    assert rates == sorted(rates, reverse=True)


def test_the_tree_knows_its_ancestors(folder, notes):
    assert notes["leaf"] == {"error": None}
    facts = read_facts(latest_checkpoint(folder / "leaf"))
    assert facts["tokens"] == (8 + 6 + 2) * STEP_TOKENS
    assert facts["lineage"]["ancestors"] == [
        {"run": "branch", "position": 14 * STEP_TOKENS, "path": str(folder / "branch")},
        {"run": "tiny", "position": 8 * STEP_TOKENS, "path": str(folder / "reference")},
    ]
    [root] = families(folder / "leaf")
    branch = next(child for child in root.children if child.directory == str(folder / "branch"))
    assert (root.run, [leaf.run for leaf in branch.children]) == ("tiny", ["leaf"])
    assert (branch.state, branch.tokens, branch.children[0].position) == ("finished", 6 * STEP_TOKENS, 14 * STEP_TOKENS)
