"""A run stopped before any step, or saved in the background, ends bitwise like one that was left alone."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import yaml

from megatron_octo.checkpoint.seal import verify_seal
from megatron_octo.checkpoint.store import latest_checkpoint, read_facts, sealed_checkpoints
from megatron_octo.runtime.launch import launch

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE))

from tiny_run import STEP_TOKENS, metrics, values, write_run  # noqa: E402

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]

STEPS, EVERY = 8, 3
SAME = ("step", "tokens", "run_tokens", "loss", "learning_rate", "grad_norm")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("exact")
    run = write_run(folder)
    plain = values(folder)
    plain["schedule"]["tokens"] = STEPS * STEP_TOKENS
    plain["checkpoint"] = {"every": EVERY * STEP_TOKENS, "keep": 9}
    run.write_text(yaml.safe_dump({**plain, "threads": 1}))
    there = {"PYTHONPATH": str(HERE)}
    launch("exact_worker", ["pair", str(run), str(folder / "pair.json")], 2, folder / "logs", 1, environment=there)
    launch("exact_worker", ["single", str(run), str(folder / "single.json")], 1, folder / "logs", 1, environment=there)
    return folder


@pytest.fixture(scope="module")
def single(folder):
    return json.loads((folder / "single.0.json").read_text())


@pytest.fixture(scope="module")
def pair(folder):
    return [json.loads((folder / f"pair.{rank}.json").read_text()) for rank in (0, 1)]


def lines(run_dir: Path) -> list[tuple]:
    return [tuple(line[name] for name in SAME) for line in metrics(run_dir)]


def shards(checkpoint: Path) -> dict[str, str]:
    files = json.loads((checkpoint / "seal.json").read_text())["files"]
    return {name: entry["blake3"] for name, entry in files.items() if name.endswith((".distcp", ".pt"))}


def windows(*legs: dict) -> list[tuple[int, int]]:
    """Windows by step in the order of reading, a step that was read again counted once, by its last reading."""
    by_step: dict[int, list[int]] = {}
    for leg in legs:
        fresh: dict[int, list[int]] = {}
        for step, window in leg["windows"]:
            fresh.setdefault(step, []).append(window)
        by_step.update(fresh)
    return [(step, window) for step in sorted(by_step) for window in by_step[step]]


@pytest.mark.parametrize("step", range(STEPS))
def test_a_kill_before_any_step_changes_nothing(folder, single, step):
    first, then, whole = single[f"killed-{step} first"], single[f"killed-{step}"], single["whole"]
    assert first["error"] == "Killed" and then["error"] is None
    assert lines(folder / f"killed-{step}") == lines(folder / "whole")
    assert shards(latest_checkpoint(folder / f"killed-{step}")) == shards(latest_checkpoint(folder / "whole"))
    assert then["weights"] == whole["weights"]
    assert then["random"] == whole["random"]
    assert windows(first, then) == windows(whole)
    assert min(s for s, _ in then["windows"]) == step // EVERY * EVERY  # from the last save, not from the start


def test_every_window_is_read_once_and_in_order(single):
    assert windows(single["whole"]) == [(window // 4, window) for window in range(STEPS * 4)]


@pytest.mark.parametrize(("name", "plain"), [("background", "whole"), ("bf16-background", "bf16")])
def test_what_is_written_beside_training_is_what_a_synchronous_save_writes(folder, single, name, plain):
    assert single[name]["error"] is None
    assert single[name]["weights"] == single[plain]["weights"]
    mine, theirs = sealed_checkpoints(folder / name), sealed_checkpoints(folder / plain)
    assert [path.name for path in mine] == [path.name for path in theirs]
    assert [path.name for path in mine] == ["step_00000003", "step_00000006", "step_00000008"]
    for one, other in zip(mine, theirs, strict=True):
        verify_seal(one)
        assert shards(one) == shards(other)
        assert read_facts(one)["step"] == read_facts(other)["step"]


def test_two_ranks_write_beside_training_what_they_write_synchronously(folder, pair):
    for name in ("pair-background", "pair-killed"):
        assert all(rank[name]["error"] is None for rank in pair)
        assert lines(folder / name) == lines(folder / "pair-whole")
        assert [rank[name]["weights"] for rank in pair] == [rank["pair-whole"]["weights"] for rank in pair]
        assert [rank[name]["random"] for rank in pair] == [rank["pair-whole"]["random"] for rank in pair]
        for one in sealed_checkpoints(folder / "pair-background"):
            assert shards(one) == shards(folder / "pair-whole" / "checkpoints" / one.name)


def test_a_disk_full_on_one_rank_in_the_background_stops_all_with_one_line(folder, pair):
    for rank in pair:
        assert rank["pair-full"]["error"] == "EnvironmentProblem"
        assert "no space for a checkpoint" in rank["pair-full"]["text"]
    assert list((folder / "pair-full" / "checkpoints").iterdir()) == []


def test_another_data_parallel_size_reads_the_same_windows(folder, single, pair):
    """Two ranks up to a kill, then one: the same global order, and losses within 1e-6."""
    legs = [{"windows": sorted((step, window) for rank in pair for step, window in rank["pair first"]["windows"])}]
    assert windows(*legs, single["pair"]) == windows(single["whole"])
    assert [line["layout"] for line in metrics(folder / "pair")] == ["DP2"] * 3 + ["single process"] * 5
    away = [
        abs(a["loss"] - b["loss"]) for a, b in zip(metrics(folder / "pair"), metrics(folder / "whole"), strict=True)
    ]
    assert max(away) <= 1e-6, away
