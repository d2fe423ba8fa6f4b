"""What a run tells about itself: the same in every layout, and training does not notice."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from megatron_octo.checkpoint.store import latest_checkpoint
from megatron_octo.runtime.launch import launch

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE))

from seeing_worker import LAYOUTS, LENGTH  # noqa: E402
from tiny_run import STEP_TOKENS, metrics, write_run  # noqa: E402

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]

CUT = [*LAYOUTS[2], *LAYOUTS[4]]
SAME = ("loss", "learning_rate", "grad_norm", "tokens", "run_tokens", "step")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """One job each of one, two and four ranks."""
    folder = tmp_path_factory.mktemp("seeing")
    run = write_run(folder)
    for nproc in (1, 2, 4):
        arguments = [str(nproc), str(run), str(folder / f"notes{nproc}.json")]
        launch("seeing_worker", arguments, nproc, folder / "logs", 1, environment={"PYTHONPATH": str(HERE)})
    return folder


def notes(folder: Path, nproc: int) -> dict:
    return json.loads((folder / f"notes{nproc}.0.json").read_text())


def lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def weights(run_dir: Path) -> dict[str, str]:
    files = json.loads((latest_checkpoint(run_dir) / "seal.json").read_text())["files"]
    return {name: entry["blake3"] for name, entry in files.items() if name.endswith(".distcp")}


def test_the_watchdog_knows_a_validation_and_a_rewind_from_a_step(folder):
    batches = [f"a validation ({name}, batch {number} of 2)" for name in ("even", "odd") for number in (1, 2)]
    assert notes(folder, 1)["stages"]["validation"] == [f"{one} after step {n}" for n in (2, 4, 6) for one in batches]
    assert notes(folder, 2)["stages"]["rewind"] == ["a rewind after step 4"]


@pytest.mark.parametrize(
    ("seen", "blind"),
    [
        ("one", "blind"),
        ("bf16", "bf16 blind"),
        ("PP2 VPP2 DP2", "blind four"),
        ("stopped", "blind"),
        ("DP2 overlapped", "overlapped blind"),
    ],
)
def test_training_does_not_notice_that_it_is_watched(folder, seen, blind):
    for mine, theirs in zip(metrics(folder / seen), metrics(folder / blind), strict=True):
        assert [mine[name] for name in SAME] == [theirs[name] for name in SAME]
    assert weights(folder / seen) == weights(folder / blind)
    assert not (folder / blind / "validation.jsonl").exists()


def test_a_blind_run_writes_no_events(folder):
    assert not (folder / "blind" / "tensorboard").exists()
    assert list((folder / "one" / "tensorboard").glob("events.*"))


def test_validation_comes_every_so_many_tokens_and_at_the_end(folder):
    for name in ("one", "stopped"):  # the latter was stopped in the step of its second validation
        found = lines(folder / name / "validation.jsonl")
        assert [line["step"] for line in found] == [2, 4, LENGTH]
        assert [line["tokens"] for line in found] == [step * STEP_TOKENS for step in (2, 4, LENGTH)]
    assert notes(folder, 1)["stopped first"]["error"] == "Stopped"
    assert notes(folder, 1)["stopped again"]["text"] == "killed"
    for line in found:
        losses = [source["loss"] for source in line["sources"].values()]
        assert line["loss"] == pytest.approx(sum(losses) / 2)
        assert {source["tokens"] for source in line["sources"].values()} == {7 * 32}
        assert 3 < losses[0] != losses[1] < 5


@pytest.mark.parametrize("name", CUT)
def test_validation_is_that_of_one_process(folder, name):
    mine, theirs = (lines(folder / run / "validation.jsonl") for run in (name, "one"))
    for here, there in zip(mine, theirs, strict=True):
        assert here["sources"].keys() == there["sources"].keys()
        for source, values in here["sources"].items():
            assert values["tokens"] == there["sources"][source]["tokens"]
            assert abs(values["loss"] - there["sources"][source]["loss"]) < 1e-6


def test_statistics_come_every_so_many_steps_and_their_norms_add_up(folder):
    found = lines(folder / "one" / "statistics.jsonl")
    assert [line["step"] for line in found] == [3, 6]
    for line in found:
        step = metrics(folder / "one")[line["step"] - 1]
        assert line["tokens"] == step["tokens"]
        assert list(line["gradients"]) == [
            "embedding",
            *(f"layers.{number}" for number in range(4)),
            "final_norm",
            "output",
        ]
        assert sum(norm**2 for norm in line["gradients"].values()) ** 0.5 == pytest.approx(step["grad_norm"], rel=1e-5)
        assert min(norm for name, norm in line["gradients"].items() if name != "output") > 0
        assert min(values["rms"] for values in line["activations"].values()) > 0
        assert all(values["rms"] < values["max"] for values in line["activations"].values())
        assert {values["nonfinite"] for values in line["activations"].values()} == {0.0}
    # A normed vector has a mean square of one, and the norm's weights have hardly moved.
    assert found[0]["activations"]["final_norm"]["rms"] == pytest.approx(1.0, abs=0.05)


@pytest.mark.parametrize("name", CUT)
def test_statistics_are_those_of_one_process(folder, name):
    mine, theirs = (lines(folder / run / "statistics.jsonl") for run in (name, "one"))
    for here, there in zip(mine, theirs, strict=True):
        assert here["gradients"] == pytest.approx(there["gradients"], rel=1e-4, abs=1e-7)
        assert here["activations"].keys() == there["activations"].keys()
        for part, values in here["activations"].items():
            assert values == pytest.approx(there["activations"][part], rel=1e-4)


def test_a_rewind_takes_back_what_was_told_and_tells_it_again(folder):
    """From step 5 to the checkpoint of step 3: the validation and the statistics of step 4 lie between."""
    rewound, skipped = folder / "rewind", folder / "skip"
    (back,) = json.loads((rewound / "rewinds.json").read_text())
    assert (back["step"], back["to"], back["passed_over"]) == (5, 3, [5])
    assert [line["step"] for line in metrics(rewound)] == list(range(1, LENGTH + 1))
    assert weights(rewound) == weights(skipped)
    for name in ("validation.jsonl", "statistics.jsonl"):
        mine, theirs = (lines(run / name) for run in (rewound, skipped))
        assert [line["step"] for line in mine] == [2, 4, 6]
        for line in (*mine, *theirs):
            line.pop("seconds", None)
        assert mine == theirs


def test_a_step_with_bad_numbers_leaves_its_statistics(folder):
    assert notes(folder, 1)["nan"]["error"] == "StageFailed"
    bad = lines(folder / "nan" / "statistics.jsonl")[-1]
    assert bad["step"] == len(metrics(folder / "nan")) + 1
    assert None in bad["gradients"].values()
