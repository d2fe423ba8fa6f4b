"""The FP8 sentinel over real trainings: it changes nothing, finds a planted bad layer, and leaves good ones alone.

What needs no GPU is real: schedules, gradients, layouts, checkpoints. The rounding is a stand-in (sentinel_worker).
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from megatron_octo.checkpoint.store import latest_checkpoint, read_facts
from megatron_octo.runtime.launch import launch

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE))

from tiny_run import metrics, write_run  # noqa: E402

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]

LAYOUTS = ("cut", "interleaved", "overlapped")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sentinel")
    run = write_run(folder)
    there = {"PYTHONPATH": str(HERE)}
    for name, count in (("single", 1), ("four", 4)):
        launch("sentinel_worker", [name, str(run), str(folder / name)], count, folder / name, 1, environment=there)
    return folder


def notes(folder: Path, name: str, rank: int = 0) -> dict:
    return json.loads((folder / f"{name}.{rank}.json").read_text())


def record(run_dir: Path) -> list[dict]:
    return [json.loads(line) for line in (run_dir / "sentinel.jsonl").read_text().splitlines()]


def said(folder: Path, name: str) -> list[str]:
    logs = (path.read_text() for path in (folder / name).glob("log-rank*.txt"))
    return [line for log in logs for line in log.splitlines() if line.startswith("fp8 sentinel")]


def losses(run_dir: Path) -> list[tuple]:
    return [(line["loss"], line["grad_norm"]) for line in metrics(run_dir)]


def test_a_watched_run_is_bitwise_the_unwatched_one(folder):
    noted = notes(folder, "single")
    assert len(record(folder / "watched")) == 6
    assert noted["watched"]["off_calls"] == 6 * 4
    assert noted["watched"]["weights"] == noted["plain"]["weights"]
    assert losses(folder / "watched") == losses(folder / "plain")
    # What is replayed after step 2 belongs to no step: it is not counted into the statistics of step 3.
    told, bare = ((folder / name / "statistics.jsonl").read_text() for name in ("watched", "plain"))
    assert told == bare and told.count("\n") == 4
    # Two good runs compare equal; a bad one does not: weights are looked at.
    assert noted["bad-warned"]["weights"] == noted["bad-unwatched"]["weights"] != noted["plain"]["weights"]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_in_every_layout_and_on_every_rank(folder, layout):
    for rank in range(4):
        noted = notes(folder, "four", rank)
        assert noted[f"{layout}-watched"]["weights"] == noted[f"{layout}-plain"]["weights"]
        assert noted[f"{layout}-watched"]["memory"]["bf16"] == []
        assert noted[f"{layout}-bad"]["memory"]["bf16"] == [2]
        # Replayed gradients stay where they are: nothing is reduced that training would not reduce.
        reductions = [noted[f"{layout}-{kind}"]["reductions"] for kind in ("plain", "watched", "bad")]
        assert reductions == [4 if layout == "overlapped" else 0] * 3
    assert losses(folder / f"{layout}-watched") == losses(folder / f"{layout}-plain")
    assert record(folder / f"{layout}-bad")[0]["worst"] == "layer 2"


def test_good_layers_stay_and_the_envelope_is_recorded(folder):
    memory = notes(folder, "single")["watched"]["memory"]
    assert memory["bf16"] == []
    assert memory["strikes"] == 0
    assert memory["count"] == 2
    assert set(memory["mean"]) == {"loss", "layer 0", "layer 1", "layer 2", "layer 3"}
    assert all(line["excess"] < 1 and line["moved"] == [] for line in record(folder / "watched"))
    assert 0 < record(folder / "watched")[0]["layers"][0] < 0.1


def test_a_bad_layer_is_found_by_name_and_moved_and_the_run_is_good_again(folder):
    lines = record(folder / "bad")
    assert [line["strikes"] for line in lines] == [1, 2, 0, 0, 0, 0]
    assert [line["moved"] for line in lines] == [[], [2], [], [], [], []]
    assert lines[0]["worst"] == "layer 2"
    assert lines[0]["excess"] > 1
    assert lines[-1]["bf16"] == [2]
    assert lines[-1]["excess"] < 1
    assert [line.get("bf16_layers") for line in metrics(folder / "bad")] == [None] * 3 + [[2]] * 9
    (line,) = [line for line in said(folder, "single") if "layer 2 moves" in line][:1]
    assert "step 4" in line and "2 comparisons in a row" in line


def test_when_no_single_layer_explains_it_the_run_moves(folder):
    moved = [line["moved"] for line in record(folder / "bad-all")]
    assert moved == [[], [0, 1, 2, 3]]  # and then there is nothing left to compare
    assert any("all 4 layers" in line for line in said(folder, "single"))


def test_asked_only_to_warn_it_moves_nothing(folder):
    assert all(line["moved"] == [] for line in record(folder / "bad-warned"))
    assert any("nothing is moved" in line for line in said(folder, "single"))


def test_a_restart_goes_on_with_what_was_decided(folder):
    assert notes(folder, "single")["halted first"]["memory"]["bf16"] == [2]
    assert read_facts(latest_checkpoint(folder / "halted"))["memory"]["sentinel"]["bf16"] == [2]
    # The first step after the restart already computes layer 2 in BF16: losses go on bitwise.
    assert losses(folder / "halted") == losses(folder / "bad")
    assert notes(folder, "single")["halted"]["weights"] == notes(folder, "single")["bad"]["weights"]


def test_weights_kept_in_fp8_are_loaded_by_way_of_their_masters(folder):
    """Done here to weights in BF16: that the optimizer's own methods do what loading FP8 weights asks of them."""
    noted = notes(folder, "single")["masters"]
    assert noted["cast"]
    exact, taken = noted["unrounded"]
    assert taken == pytest.approx(exact, rel=1e-9)
    assert noted["rounded"] != pytest.approx(exact, rel=1e-9)
