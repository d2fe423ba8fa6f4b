"""Branches of branches, a stable run that goes on after its decays, and decays in place: rates and updates by hand."""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path

import pytest
import torch

from megatron_octo.checkpoint.dist import TorchDist
from megatron_octo.checkpoint.family import families
from megatron_octo.checkpoint.store import latest_checkpoint, sealed_checkpoints
from megatron_octo.checkpoint.tensors import read
from megatron_octo.runtime.launch import launch

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE))

from tiny_run import RATE, STEP_TOKENS, metrics, write_run  # noqa: E402

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]

WEIGHT = "decoder.layers.0.mlp.linear_fc1.weight"
DECAY, BETA1, BETA2, EPSILON = 0.1, 0.9, 0.95, 1e-6


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("forks")
    run, there = write_run(folder), {"PYTHONPATH": str(HERE)}
    launch("fork_worker", [str(run), str(folder / "notes.json")], 1, folder / "logs", 1, environment=there)
    return folder


@pytest.fixture(scope="module")
def notes(folder):
    return json.loads((folder / "notes.json").read_text())


def column(run_dir: Path, name: str) -> list:
    return [line[name] for line in metrics(run_dir)]


def decayed(peak: float, steps: int, left, final: float = 0.1) -> list[float]:
    return [peak * (final + (1 - final) * left(step / steps)) for step in range(steps)]


def root_shape(progress: float) -> float:
    return 1 - math.sqrt(progress)


def hashes(checkpoint: Path) -> dict[str, str]:
    files = json.loads((checkpoint / "seal.json").read_text())["files"]
    return {name: entry["blake3"] for name, entry in files.items() if name.endswith(".distcp")}


def test_all_of_it_trained(notes):
    refused = {"jump", "late", "nowhere", "mixed", "wsd stretched"}
    assert {name for name, ended in notes.items() if ended["error"]} == refused


def test_a_stable_run_goes_on_after_its_decay_as_if_nothing_had_been(folder):
    whole, stable = folder / "whole", folder / "stable"
    assert column(stable, "step") == list(range(1, 13))
    for name in ("loss", "grad_norm", "learning_rate", "run_tokens"):
        assert column(stable, name) == column(whole, name)
    assert hashes(latest_checkpoint(stable)) == hashes(latest_checkpoint(whole))


def test_the_places_its_decays_left_from_are_kept(folder):
    """The run keeps one checkpoint; the others stay for its branches alone."""
    assert [path.name for path in sealed_checkpoints(folder / "stable")] == ["step_00000008", "step_00000012"]
    assert [path.name for path in sealed_checkpoints(folder / "whole")] == ["step_00000012"]


def test_rates_are_those_one_would_work_out_by_hand(folder):
    first = decayed(RATE, 4, root_shape)
    cosine = decayed(first[2], 3, lambda progress: 0.5 * (1 + math.cos(math.pi * progress)))
    expected = {
        "first": first,
        "second": decayed(RATE, 4, lambda progress: 1 - progress),
        "twig": cosine,
        "leaf": [first[2] * 0.1] * 2,
        "wsd": [0, RATE / 2] + [RATE] * 6 + first,
        "moved": [0, RATE / 2] + [RATE] * 8 + first,
    }
    for name, rates in expected.items():
        assert column(folder / name, "learning_rate") == pytest.approx(rates, rel=1e-12), name


def test_rates_are_continuous_and_tokens_go_on_at_every_seam(folder):
    [root] = (root for root in families(folder / "leaf"))
    chain = [(root, child) for child in root.children]
    for parent, child in chain:
        chain += [(child, grandchild) for grandchild in child.children]
        line = metrics(Path(child.directory))[0]
        assert line["learning_rate"] == child.learning_rate, child.run
        assert (line["step"], line["run_tokens"]) == (1, STEP_TOKENS)
        assert line["tokens"] == child.position + STEP_TOKENS
        at = (child.position - parent.position) // STEP_TOKENS
        theirs = column(Path(parent.directory), "learning_rate")
        if at < len(theirs):
            assert theirs[at] == child.learning_rate, "the parent's next step has the rate the branch begins with"
    assert [(parent.run, child.run) for parent, child in chain] == [
        *(("stable", name) for name in ("apart", "bare", "first", "second")),
        ("first", "twig"),
        ("twig", "leaf"),
    ]


def test_a_fork_of_a_fork_of_a_fork_knows_everyone(folder):
    lineage = json.loads((folder / "leaf" / "lineage.json").read_text())
    assert [(above["run"], above["position"] // STEP_TOKENS) for above in lineage["ancestors"]] == [
        ("twig", 13),
        ("first", 10),
        ("stable", 8),
    ]
    assert lineage["first_window"] == 3 * 4


def test_a_decay_stopped_inside_itself_ends_bitwise_as_if_not(folder, notes):
    for steps in (9, 10, 12):
        name = f"step_{steps:08d}"
        assert hashes(folder / "wsd" / "checkpoints" / name) == hashes(folder / "wsd-whole" / "checkpoints" / name)
    assert column(folder / "wsd", "loss") == column(folder / "wsd-whole", "loss")
    assert "the rate would jump from 0.00165 to" in notes["wsd stretched"]["text"]


@pytest.mark.parametrize("step", [9, 10])
def test_the_first_update_after_a_resume_uses_exactly_this_rate_and_weight_decay(folder, step):
    """AdamW worked out from weights before and moments after; one resume is where the decay starts, one inside."""
    folder = folder / "wsd" / "checkpoints"
    before, after = (TorchDist(folder / f"step_{at:08d}", optimizer=True) for at in (step - 1, step))
    rate = RATE * (0.1 + 0.9 * root_shape((step - 9) / 4))
    for name in (name for name in after.shapes() if not name.startswith("optimizer.")):
        first, second = (read(after, f"optimizer.state.{kind}.{name}").double() for kind in ("exp_avg", "exp_avg_sq"))
        weights, found = (read(source, f"optimizer.state.param.{name}").double() for source in (before, after))
        change = first / (1 - BETA1**step) / ((second / (1 - BETA2**step)).sqrt() + EPSILON)
        decay = 0.0 if "norm" in name else DECAY
        torch.testing.assert_close(found, weights - rate * (change + decay * weights), rtol=0, atol=3e-7)
        for wrong_rate, wrong_decay in ((rate * 1.05, decay), (rate, decay + 0.05)):  # the comparison would notice
            other = weights - wrong_rate * (change + wrong_decay * weights)
            assert (other - found).abs().max() > 3e-6


def test_a_decay_in_place_is_a_stable_run_and_a_branch_that_reads_on(folder):
    """The same data, moments and rates on both ways: the losses are equal to the last bit."""
    for name in ("loss", "grad_norm", "learning_rate"):
        assert column(folder / "apart", name) == column(folder / "wsd-whole", name)[8:]
        assert column(folder / "stable", name)[:8] == column(folder / "wsd-whole", name)[:8]
    apart, whole = (read(TorchDist(latest_checkpoint(folder / name)), WEIGHT) for name in ("apart", "wsd-whole"))
    assert torch.equal(apart, whole)


def test_without_moments_the_same_branch_goes_another_way(folder):
    apart, bare = column(folder / "apart", "loss"), column(folder / "bare", "loss")
    assert bare[0] == apart[0] and bare[1] != apart[1]


@pytest.mark.parametrize(
    ("name", "kind", "said"),
    [
        ("jump", "ConfigError", "starts at learning rate 0.001, but its parent 'first' is at 0.001090811691"),
        ("late", "ConfigError", "starts at learning rate 0, but its parent 'first' is at"),
        ("nowhere", "CheckpointError", "no checkpoint at 1664 tokens; checkpoints exist at 2048 (step_00000004)"),
        ("mixed", "ConfigError", "cannot read on where its parent 'first' was: data.seed: 21 -> 1"),
    ],
)
def test_what_a_branch_cannot_be_is_one_line_and_leaves_nothing(folder, notes, name, kind, said):
    assert notes[name]["error"] == kind
    assert said in notes[name]["text"] and "\n" not in notes[name]["text"] and "fix: " in notes[name]["text"]
    assert not (folder / name / "checkpoints").exists() and not (folder / name / "config.yaml").exists()
