"""Bad numbers follow the policy and poison nothing: NaN, infinity, spikes, flipped bits; on all ranks or on one."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import pytest

from megatron_octo.checkpoint.seal import verify_seal
from megatron_octo.checkpoint.store import latest_checkpoint, read_facts, sealed_checkpoints
from megatron_octo.runtime.launch import launch

HERE = Path(__file__).parent
DISTRIBUTED = HERE.parent / "distributed"
sys.path.insert(0, str(DISTRIBUTED))

from tiny_run import metrics, write_run  # noqa: E402

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]

FAULTY, LAST = 7, 12
KILLS = ("before the list", "before the load", "before the cut", "after the cut")
FINE = {"error": None}
SAME = ("loss", "learning_rate", "grad_norm", "tokens", "run_tokens", "step")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Runs everything: one process, then two."""
    folder = tmp_path_factory.mktemp("numbers")
    run = write_run(folder)
    there = {"PYTHONPATH": os.pathsep.join([str(HERE), str(DISTRIBUTED)])}
    for name, processes in (("single", 1), ("two", 2)):
        (folder / name).mkdir()
        own = folder / name / "run.yaml"
        own.write_text(run.read_text())
        arguments = [name, str(own), str(folder / f"{name}.json")]
        launch("numbers_worker", arguments, processes, folder / f"logs-{name}", 1, environment=there)
    return folder


@pytest.fixture(scope="module")
def single(folder):
    return Ended(folder / "single", json.loads((folder / "single.0.json").read_text()))


@pytest.fixture(scope="module")
def two(folder):
    notes = [json.loads((folder / f"two.{rank}.json").read_text()) for rank in range(2)]
    kept = {name for name in notes[0] if name.endswith(" kept")}
    assert {k: v for k, v in notes[0].items() if k not in kept} == {k: v for k, v in notes[1].items() if k not in kept}
    for name in kept:
        notes[0][name] = {step: same and notes[1][name][step] for step, same in notes[0][name].items()}
    return Ended(folder / "two", notes[0])


class Ended:
    """The runs of one worker: how they ended and what they left."""

    def __init__(self, folder: Path, notes: dict) -> None:
        self._folder, self._notes = folder, notes

    def note(self, name: str) -> dict:
        return self._notes[name]

    def lines(self, name: str) -> dict[int, dict]:
        lines = metrics(self._folder / name)
        assert [line["step"] for line in lines] == list(range(1, len(lines) + 1))
        return {line["step"]: line for line in lines}

    def skipped(self, name: str) -> dict[int, str]:
        return {step: line["why"] for step, line in self.lines(name).items() if line.get("skipped")}

    def unchanged(self, name: str) -> list[int]:
        """Steps that left every bit of weights, moments and step counters as it was."""
        return [int(step) for step, same in self._notes[f"{name} kept"].items() if same]

    def end(self, name: str) -> tuple[dict, dict]:
        """Hashes of every weight and moment at the end, and what hooks remember."""
        last = latest_checkpoint(self._folder / name)
        verify_seal(last)
        files = json.loads((last / "seal.json").read_text())["files"]
        shards = {file: entry["blake3"] for file, entry in files.items() if file.endswith(".distcp")}
        return shards, read_facts(last)["memory"]["numbers"]

    def rewinds(self, name: str) -> list[tuple]:
        told = json.loads((self._folder / name / "rewinds.json").read_text())
        return [(one["step"], one["to"], one["passed_over"]) for one in told]

    def checkpoints(self, name: str) -> list[str]:
        return [path.name for path in sealed_checkpoints(self._folder / name)]


def test_watching_changes_nothing_of_a_good_run(single):
    assert single.note("clean") == single.note("all watches") == FINE
    assert single.end("all watches")[0] == single.end("clean")[0]
    assert single.skipped("clean") == single.skipped("all watches") == {}
    assert len(single.lines("clean")) == LAST


def test_a_nan_is_skipped_and_leaves_every_bit(single):
    assert single.note("skip") == FINE
    assert single.unchanged("skip") == [FAULTY]
    assert single.skipped("skip").keys() == {FAULTY}
    assert "loss is nan" in single.skipped("skip")[FAULTY]
    lines, clean = single.lines("skip"), single.lines("clean")
    assert lines[FAULTY]["loss"] is None
    assert [line["tokens"] for line in lines.values()] == [line["tokens"] for line in clean.values()]
    assert [lines[step]["loss"] for step in range(1, FAULTY)] == [clean[step]["loss"] for step in range(1, FAULTY)]


def test_what_was_skipped_never_enters_the_statistics(single):
    memory, lines = single.end("skip")[1], single.lines("skip")
    assert memory["losses"] == [line["loss"] for step, line in lines.items() if step != FAULTY]
    assert memory["norms"] == [line["grad_norm"] for step, line in lines.items() if step != FAULTY]
    assert memory["bad_in_a_row"] == 0


def test_an_infinite_gradient_is_skipped(single):
    assert single.note("infinite") == FINE
    assert "gradient norm is inf" in single.skipped("infinite")[FAULTY]
    assert single.end("infinite")[0] == single.end("skip")[0]


def test_a_rewind_ends_as_if_the_steps_had_been_skipped_from_the_start(single):
    assert single.note("rewind") == single.note("skipped from the start") == FINE
    assert single.rewinds("rewind") == [(7, 4, [6, 7])]
    assert single.skipped("rewind").keys() == {6, 7} == single.skipped("skipped from the start").keys()
    assert single.end("rewind") == single.end("skipped from the start")
    assert single.end("rewind")[0] != single.end("clean")[0]


def test_two_bad_steps_are_two_rewinds(single):
    assert single.rewinds("rewind twice") == [(6, 4, [6]), (7, 4, [7])]
    assert single.end("rewind twice") == single.end("skipped from the start")


@pytest.mark.parametrize("point", KILLS)
def test_a_kill_anywhere_in_a_rewind_leads_to_the_same_end(single, point):
    assert single.note(f"killed {point} first") == {"signal": 9, "listed": point != "before the list"}
    assert single.note(f"killed {point}") == FINE
    assert single.rewinds(f"killed {point}") == [(7, 4, [6, 7])]
    assert single.end(f"killed {point}") == single.end("rewind")
    mine, theirs = single.lines(f"killed {point}"), single.lines("rewind")
    assert [[line[key] for key in SAME] for line in mine.values()] == [
        [line[key] for key in SAME] for line in theirs.values()
    ]


def test_without_a_checkpoint_there_is_nothing_to_go_back_to(single):
    note = single.note("too early")
    assert (note["error"], note["code"]) == ("StageFailed", 7)
    assert "step 3: loss is nan" in note["text"]
    assert "no checkpoint to go back to yet" in note["text"]
    assert "fix: " in note["text"]


@pytest.mark.parametrize("policy", ["rewinds", "skips"])
def test_numbers_that_stay_bad_stop_the_run_and_the_checkpoint_stays(single, policy):
    note = single.note(f"patience with {policy}")
    assert (note["error"], note["code"]) == ("StageFailed", 7)
    assert "step 8 (" in note["text"]
    assert "the last of 3 bad steps in a row (watch.patience)" in note["text"]
    assert single.checkpoints(f"patience with {policy}") == ["step_00000004"]
    single.end(f"patience with {policy}")


def test_patience_counts_bad_steps_in_a_row_only(single):
    assert single.note("with good ones between") == FINE
    assert single.skipped("with good ones between").keys() == {5, 6, 8, 9, 11}


def test_by_default_a_nan_stops_the_run(single):
    note = single.note("stop")
    assert (note["error"], note["code"]) == ("StageFailed", 7)
    assert "step 7 (768 tokens): loss is nan" in note["text"]
    assert single.checkpoints("stop") == ["step_00000004"]


def test_a_tenfold_spike_is_skipped_or_stops(single):
    assert single.note("spike") == FINE
    assert single.unchanged("spike") == [10]
    assert "is a spike, above" in single.skipped("spike")[10]
    assert single.lines("spike")[10]["loss"] > 30
    assert single.lines("spike")[10]["loss"] not in single.end("spike")[1]["losses"]
    assert "step 10 (1152 tokens): loss" in single.note("spike stops")["text"]


def test_bf16_weights_and_their_master_copies_are_left_alone(single):
    assert single.note("bf16") == FINE
    assert single.unchanged("bf16") == [FAULTY]


@pytest.mark.parametrize(("name", "clean", "to"), [
    ("flip", "clean", 8), ("flip saved", "clean", 4), ("flip that shows", "clean", 4),
    ("flip of a copy", "bf16 clean", 8), ("flip of a master copy", "bf16 clean", 8),
])  # fmt: skip
def test_a_flipped_bit_is_found_and_undone(single, name, clean, to):
    assert single.note(name) == FINE
    ((step, back, over),) = single.rewinds(name)
    assert (step, back, over) == (9 if to == 4 else 10, to, [])
    assert single.end(name)[0] == single.end(clean)[0]
    assert single.skipped(name) == {}


def test_a_flipped_bit_names_rank_and_parameter_and_withdraws_the_checkpoint_taken_since(single):
    note = single.note("flip stops")
    assert (note["error"], note["code"]) == ("StageFailed", 7)
    assert "step 9: rank 0: decoder.layers.0.input_layernorm.weight changed without an update" in note["text"]
    assert single.checkpoints("flip stops") == ["step_00000004"]
    single.end("flip stops")


def test_bits_that_flip_time_and_again_stop_the_run(single):
    assert "the last of 3 rewinds to step 8 (watch.patience)" in single.note("flip time and again")["text"]


LAYOUTS = ("data", "data without distributed optimizer", "data in bf16", "data with overlap", "pipeline")


@pytest.mark.parametrize("name", LAYOUTS)
def test_a_gradient_that_is_nan_on_one_rank_only_is_skipped_by_all(two, name):
    assert two.note(name) == FINE
    assert two.unchanged(name) == [FAULTY]
    assert two.skipped(name).keys() == {FAULTY}
    assert "gradient norm is nan" in two.skipped(name)[FAULTY]


def test_whatever_is_nan_and_wherever_the_end_is_the_same(two):
    ends = [two.end(name)[0] for name in ("data", "loss on 1", "share on 1", "rewind on 1")]
    assert ends[1:] == ends[:1] * 3
    assert ends[0] != two.end("clean")[0]
    assert two.rewinds("rewind on 1") == [(7, 4, [7])]


def test_a_bit_flipped_on_one_rank_is_found_and_undone(two):
    assert two.note("flip on 1") == FINE
    assert two.rewinds("flip on 1") == [(7, 4, [])]
    assert two.end("flip on 1")[0] == two.end("clean")[0]


def test_replicas_that_differ_are_found_and_made_equal(two):
    assert two.note("drift on 1") == FINE
    assert two.rewinds("drift on 1") == [(7, 4, [])]
    assert two.end("drift on 1")[0] == two.end("clean")[0]


def test_weights_that_arrive_with_the_next_forward_pass_are_no_fault(two):
    assert two.note("clean overlap") == FINE
