"""The tree of runs, found from any of its members and drawn; runs that were moved or removed have their place."""

from __future__ import annotations

import json
import os
import shutil

import pytest
from typer.testing import CliRunner

from megatron_octo.checkpoint import store
from megatron_octo.checkpoint.family import families
from megatron_octo.cli.root import app
from megatron_octo.config.run import RunConfig
from megatron_octo.errors import CheckpointError
from megatron_octo.train.start import only_trainer, open_run

STEP = 128


def make(out, steps, tokens=2048, **more):
    values = {
        "name": out.name,
        "out": str(out),
        "dtype": "fp32",
        "model": {"layers": 2, "hidden": 32, "heads": 4, "kv_groups": 2, "ffn": 64, "vocabulary": 91},
        "data": {"tokenizer": str(out.parent), "mixture": {"web": {"path": "web", "weight": 1}}, "sequence_length": 32},
        "batch": {"global_batch": 4, "micro_batch": 2},
        "schedule": {"kind": "cosine", "tokens": tokens},
        "checkpoint": {"every": 1000},
        **more,
    }
    run = RunConfig.model_validate(values)
    with only_trainer(run.out):
        start = open_run(run)
    for step in steps:
        facts = {"step": step, "run_tokens": step * STEP, "tokens": start.root_tokens + step * STEP}
        temporary = store.begin(run.out, step)
        store.write_facts(temporary, {**facts, "config": start.run.model_dump(mode="json"), "lineage": start.lineage})
        store.publish(temporary, run.out, step)


def fork(parent, at, **more):
    return {"fork": {"parent": str(parent), "at": at, **more}}


@pytest.fixture
def runs(tmp_path):
    """stable (10K tokens) -> hybrid at 1280, long and short at 5120; long -> again at 6144."""
    runs = tmp_path / "runs"
    constant = {"kind": "constant", "learning_rate": 1e-3, "tokens": 10_000}
    make(runs / "stable", [10, 40, 79], schedule=constant)
    make(runs / "long", [8], start=fork(runs / "stable", 5120))
    make(runs / "short", [16], start=fork(runs / "stable", 5120))
    make(runs / "hybrid", [], start=fork(runs / "stable", 1280, moments=False))
    make(runs / "again", [3], start=fork(runs / "long", 6144, data="continue"))
    return runs


def outline(member, depth=0):
    mine = (depth, member.run, member.position, member.tokens, member.planned, member.state, member.pinned)
    return [mine, *(line for child in member.children for line in outline(child, depth + 1))]


WHOLE = [
    (0, "stable", 0, 10112, 10112, "finished", None),
    (1, "hybrid", 1280, 0, 2048, "stopped", True),
    (1, "long", 5120, 1024, 2048, "stopped", True),
    (2, "again", 6144, 384, 2048, "stopped", True),
    (1, "short", 5120, 2048, 2048, "finished", True),
]


@pytest.mark.parametrize("asked", ["stable", "hybrid", "long", "again", "short", "."])
def test_any_member_shows_the_whole_family(runs, asked):
    [root] = families(runs / asked)
    assert outline(root) == WHOLE
    everyone = [root, *root.children, *root.children[1].children]
    assert [member.run for member in everyone if member.asked] == ([] if asked == "." else [asked])


def test_each_branch_says_what_it_took_along(runs):
    [root] = families(runs / "again")
    hybrid, long, _ = root.children
    [again] = long.children
    assert (hybrid.carried["moments"], hybrid.learning_rate, hybrid.checkpoint) == (False, 1e-3, "step_00000010")
    assert long.carried == {"weights": True, "moments": True, "rng": "none is drawn", "data": "fresh, seed 0"}
    assert again.carried["data"] == "goes on at window 32"
    assert again.learning_rate == pytest.approx(1e-3 * 0.55)


def test_strangers_beside_it_are_other_families(runs):
    make(runs / "stranger", [], schedule={"learning_rate": 1.0, "tokens": 1000})
    (runs / "notes").mkdir()
    assert [root.run for root in families(runs / "long")] == ["stable"]
    assert [root.run for root in families(runs)] == ["stable", "stranger"]
    assert [root.run for root in families(runs.parent)] == ["stable", "stranger"]


def test_a_moved_family_is_still_one(runs):
    runs.rename(runs.with_name("elsewhere"))
    [root] = families(runs.with_name("elsewhere") / "long")
    assert outline(root) == WHOLE


def test_a_moved_parent_is_known_by_the_records_of_its_branches(runs):
    (runs / "long").rename(runs / "longer")
    [root] = families(runs / "again")
    assert outline(root) == WHOLE


def test_a_missing_parent_is_shown_as_missing(runs):
    shutil.rmtree(runs / "long")
    [root] = families(runs / "again")
    assert outline(root)[2] == (1, "long", 5120, None, None, "missing", True)
    assert outline(root)[3] == (2, "again", 6144, 384, 2048, "stopped", None)
    shutil.rmtree(runs / "stable")
    roots = families(runs)
    assert [line[:3] + line[5:6] for root in roots for line in outline(root)] == [
        (0, "stable", 0, "missing"),
        (1, "hybrid", 1280, "stopped"),
        (1, "long", 5120, "missing"),
        (2, "again", 6144, "stopped"),
        (1, "short", 5120, "finished"),
    ]


def test_another_run_at_the_parents_place_is_not_the_parent(runs):
    shutil.rmtree(runs / "stable")
    make(runs / "stable", [], name="another", schedule={"learning_rate": 1.0, "tokens": 1000})
    states = {root.run: root.state for root in families(runs)}
    assert states == {"another": "stopped", "stable": "missing"}


def test_a_parent_that_does_not_know_its_branch_is_told_apart(runs):
    shutil.rmtree(runs / "stable" / "forks")
    [root] = families(runs / "long")
    assert [child.pinned for child in root.children] == [False, False, False]


def test_a_run_that_trains_counts_its_steps(runs):
    lines = [json.dumps({"step": step, "run_tokens": step * STEP}) + "\n" for step in range(1, 12)]
    (runs / "long" / "metrics.jsonl").write_text("".join(lines) + '{"step": 12, "run_to')
    with only_trainer(runs / "long"):
        [root] = families(runs / "long")
        assert outline(root)[2] == (1, "long", 5120, 11 * STEP, 2048, "training", True)
    assert outline(families(runs / "long")[0])[2][3:6] == (8 * STEP, 2048, "stopped")


def test_damaged_files_are_shown_and_hide_nothing(runs):
    (runs / "short" / "lineage.json").write_text("{")
    (runs / "hybrid" / "config.yaml").write_text("a: [")
    config = (runs / "again" / "config.yaml").read_text()
    (runs / "again" / "config.yaml").write_text(config + "unknown: 1\n")
    (runs / "stable" / "forks" / "step_00000010--x-1.json").write_text("[]")
    roots = {root.run: root for root in families(runs)}
    assert roots["short"].problem.endswith("lineage.json cannot be read")
    hybrid = next(child for child in roots["stable"].children if child.run == "hybrid")
    assert "not valid YAML" in hybrid.problem
    again = next(child for child in roots["stable"].children if child.run == "long").children[0]
    assert (again.tokens, again.planned) == (384, None)


@pytest.mark.parametrize(
    "content",
    [
        [], {"ancestors": 5}, {"ancestors": [5]}, {"ancestors": [{"position": 51}]}, {"ancestors": [{"run": "stable"}]},
        {"ancestors": [{"run": "stable", "position": None}]}, {"parent": 5, "ancestors": []}, {"carried": "all"},
        {"ancestors": [{"run": "stable", "position": 1, "path": 7}]},
    ],
)  # fmt: skip
def test_a_lineage_of_another_form_is_a_problem_and_no_end(runs, content):
    (runs / "long" / "lineage.json").write_text(json.dumps(content))
    (runs / "stable" / "forks" / "step_00000010--y-1.json").write_text(json.dumps(content))
    (runs / "stable" / "forks" / "step_00000010--z-1.json").write_text('{"run": "z", "position": 1, "out": 3}')
    roots = {root.run: root for root in families(runs)}
    assert roots["long"].problem.endswith("lineage.json cannot be read")
    assert "z" not in [child.run for child in roots["stable"].children]
    assert CliRunner().invoke(app, ["branch", "show", str(runs)]).exit_code == 0


def test_circles_and_empty_places_are_refused(runs, tmp_path):
    lineage = json.loads((runs / "again" / "lineage.json").read_text())
    lineage |= {"parent": str(runs / "again"), "ancestors": [{"run": "again", "position": 5}]}
    (runs / "long" / "lineage.json").write_text(json.dumps(lineage))
    with pytest.raises(CheckpointError, match="its ancestors go round in a circle"):
        families(runs / "long")
    (tmp_path / "empty").mkdir()
    with pytest.raises(CheckpointError, match="not a run directory, and holds none"):
        families(tmp_path / "empty")
    with pytest.raises(CheckpointError, match="no such directory"):
        families(tmp_path / "nowhere")


def test_the_tree_is_drawn(runs):
    shutil.rmtree(runs / "short")
    found = CliRunner().invoke(app, ["branch", "show", str(runs / "long")])
    lines = [line.rstrip() for line in found.output.splitlines()]
    none = "random numbers: none is drawn; learning rate at the seam"
    assert lines == [
        "stable  10.1K own tokens  finished",
        f"{runs}/stable",
        "├── hybrid  from 1.28K tokens  0 of 2.05K own tokens  stopped",
        f"│   carried: weights, no moments; data fresh, seed 0; {none} 0.001",
        "│   left from step_00000010",
        f"│   {runs}/hybrid",
        "├── long  from 5.12K tokens  1.02K of 2.05K own tokens  stopped",
        f"│   carried: weights, Adam's moments; data fresh, seed 0; {none} 0.001",
        "│   left from step_00000040",
        f"│   {runs}/long",
        "│   └── again  from 6.14K tokens  384 of 2.05K own tokens  stopped",
        f"│       carried: weights, Adam's moments; data goes on at window 32; {none} 0.00055",
        "│       left from step_00000008",
        f"│       {runs}/again",
        "└── short  from 5.12K tokens  missing",
        "    left from step_00000040",
        f"    not at {runs}/short",
    ]


def test_machines_get_exact_numbers(runs):
    found = CliRunner().invoke(app, ["branch", "show", str(runs), "--json"])
    [root] = json.loads(found.output)
    assert [(child["run"], child["position"], child["tokens"]) for child in root["children"]] == [
        ("hybrid", 1280, 0),
        ("long", 5120, 1024),
        ("short", 5120, 2048),
    ]
    assert root["children"][0]["directory"] == os.fspath(runs / "hybrid")
