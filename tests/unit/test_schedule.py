"""Known values of the schedules, and what a lineage record says."""

from __future__ import annotations

import math
from types import SimpleNamespace

import pytest
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler

from megatron_octo.config.load import parse_config
from megatron_octo.config.run import RunConfig
from megatron_octo.config.schedule import ScheduleConfig
from megatron_octo.errors import ConfigError
from megatron_octo.schedule.fork import Origin, lineage_record, pinned_checkpoints, record_fork, with_parents_rate
from megatron_octo.schedule.learning_rate import learning_rate

MODEL = {"layers": 2, "hidden": 32, "heads": 4, "kv_groups": 2, "ffn": 64, "vocabulary": 91}


def run(name, schedule=None, **more):
    values = {
        "name": name,
        "out": f"runs/{name}",
        "model": MODEL,
        "data": {
            "tokenizer": "tok",
            "mixture": {"web": {"path": "web", "weight": 1}},
            "sequence_length": 32,
            "seed": 4,
        },
        "batch": {"global_batch": 4, "micro_batch": 2},
        "schedule": {"learning_rate": 2e-5, "tokens": "200B", **(schedule or {})},
        "checkpoint": {"every": "1B"},
        **more,
    }
    return RunConfig.model_validate(values)


def origin(parent, tokens, **more):
    facts = {"step": 10, "run_tokens": tokens, "tokens": tokens, **more}
    return Origin(str(parent.out), "step_00000010", "5ea1", facts, parent)


def branch(**more):
    schedule = {"kind": "cosine", "tokens": "20B", **more.pop("schedule", {})}
    fork = {"parent": "runs/stable", "at": "200B", **more.pop("fork", {})}
    return run("long", schedule, start={"fork": fork}, **more)


@pytest.mark.parametrize(
    ("kind", "position", "factor"),
    [
        ("constant", 0, 1.0),
        ("constant", 50, 1.0),
        ("cosine", 0, 1.0),
        ("cosine", 50, 0.55),
        ("cosine", 25, 0.1 + 0.9 * 0.5 * (1 + 2**-0.5)),
        ("cosine", 100, 0.1),
        ("linear", 50, 0.55),
        ("linear", 99, 0.109),
        ("1-sqrt", 25, 0.55),
        ("1-sqrt", 64, 0.1 + 0.9 * 0.2),
        ("1-sqrt", 100, 0.1),
    ],
)
def test_known_values(kind, position, factor):
    schedule = ScheduleConfig(kind=kind, learning_rate=2.0, tokens=100)
    assert learning_rate(schedule, position) == pytest.approx(2.0 * factor, rel=1e-12)


def test_the_warmup_is_a_line_from_zero():
    schedule = ScheduleConfig(learning_rate=4.0, warmup=8, tokens=100)
    assert [learning_rate(schedule, position) for position in (0, 2, 4, 8, 9)] == [0, 1, 2, 4, 4]


def test_the_decay_begins_after_the_warmup():
    schedule = ScheduleConfig(kind="linear", learning_rate=1.0, final_ratio=0, warmup=20, tokens=120)
    assert learning_rate(schedule, 70) == pytest.approx(0.5)


@pytest.mark.parametrize(
    ("shape", "factors"),
    [
        ("cosine", [1, 1, 0.5 + 0.5 * 2**-0.5, 0.5, 0]),
        ("linear", [1, 1, 0.75, 0.5, 0]),
        ("1-sqrt", [1, 1, 0.5, 1 - 0.5**0.5, 0]),
        (None, [1, 1, 0.5, 1 - 0.5**0.5, 0]),
    ],
)
def test_known_values_of_warmup_stable_decay(shape, factors):
    schedule = ScheduleConfig(
        kind="wsd", learning_rate=2.0, final_ratio=0, warmup=10, decay=40, shape=shape, tokens=100
    )
    rates = [learning_rate(schedule, position) for position in (10, 60, 70, 80, 100)]
    assert rates == pytest.approx([2.0 * factor for factor in factors], rel=1e-12)
    assert learning_rate(schedule, 5) == 1.0


def megatron_scheduler(style, decay=None, shape=None, **changes):
    group = {"wd_mult": 1.0}
    values = {
        "init_lr": 0.0, "max_lr": 2.0, "min_lr": 0.2, "lr_warmup_steps": 20, "lr_decay_steps": 1000,
        "lr_decay_style": style, "start_wd": 0.1, "end_wd": 0.1, "wd_incr_steps": 1000, "wd_incr_style": "constant",
        "wsd_decay_steps": decay, "lr_wsd_decay_style": shape, **changes,
    }  # fmt: skip
    return group, OptimizerParamScheduler(SimpleNamespace(param_groups=[group]), **values)


@pytest.mark.parametrize(
    ("kind", "style", "shape", "theirs"),
    [
        ("constant", "constant", None, None),
        ("cosine", "cosine", None, None),
        ("linear", "linear", None, None),
        ("wsd", "WSD", "cosine", "cosine"),
        ("wsd", "WSD", "linear", "linear"),
        ("wsd", "WSD", "1-sqrt", "minus_sqrt"),
    ],
)
def test_the_shapes_are_megatron_cores(kind, style, shape, theirs):
    decay = 300 if kind == "wsd" else None
    mine = ScheduleConfig(kind=kind, learning_rate=2.0, warmup=20, decay=decay, shape=shape, tokens=1000)
    group, scheduler = megatron_scheduler(style, decay, theirs)
    for position in range(1001):
        assert learning_rate(mine, position) == pytest.approx(group["lr"], rel=1e-12, abs=1e-12), position
        scheduler.step(1)


@pytest.mark.parametrize("own_limits", [False, True])
def test_megatron_cores_scheduler_resumes_with_a_stale_value_and_a_position_does_not(own_limits):
    """What a function of the position spares us (Megatron-LM pull request 7468).

    megatron-core's scheduler writes the parameter groups before it has taken over the stored weight decay, and prefers
    a group's own limits to stored ones: the first step after a resume uses what the constructor was given.
    """
    _, trained = megatron_scheduler("cosine")
    trained.step(500)
    group, resumed = megatron_scheduler("cosine", start_wd=0.03, end_wd=0.03, max_lr=1.0, min_lr=0.1)
    if own_limits:  # as get_megatron_optimizer gives them to its groups
        group |= {"max_lr": 1.0, "min_lr": 0.1}
    resumed.load_state_dict(trained.state_dict())
    assert (resumed.max_lr, resumed.get_wd()) == (2.0, 0.1)
    assert group["weight_decay"] == 0.03, "mended: this is no longer a reason to do without it"
    right = 0.2 + 1.8 * 0.5 * (math.cos(math.pi * 480 / 980) + 1)
    assert group["lr"] == pytest.approx(right / 2 if own_limits else right)
    mine = ScheduleConfig(kind="cosine", learning_rate=2.0, warmup=20, tokens=1000)
    assert learning_rate(mine, 500) == pytest.approx(right)


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"kind": "wsd"}, "wsd needs decay"),
        ({"kind": "wsd", "decay": 101}, "decay of 101 tokens is longer than the run's 100"),
        ({"kind": "wsd", "decay": 91, "warmup": 10}, "would start at 9, before the warm-up ends at 10"),
        ({"kind": "wsd", "decay": 0}, "greater than 0"),
        ({"kind": "wsd", "decay": 9, "shape": "exponential"}, "'cosine', 'linear' or '1-sqrt'"),
        ({"kind": "cosine", "decay": 9}, "decay is for kind: wsd; cosine has no decay of its own"),
        ({"kind": "constant", "shape": "linear"}, "shape is for kind: wsd; constant has no decay of its own"),
        ({"kind": "linear", "warmup": 100}, "warmup of 100 tokens does not end before the run's 100"),
        ({"kind": "inverse"}, "'constant', 'wsd', 'cosine', 'linear' or '1-sqrt'"),
        ({"learning_rate": 0}, "greater than 0"),
    ],
)
def test_a_schedule_that_cannot_be_is_refused(fields, said):
    with pytest.raises(ConfigError) as refused:
        parse_config(ScheduleConfig, {"learning_rate": 1.0, "tokens": 100, **fields}, "run.yaml")
    assert said in str(refused.value)


def test_only_a_branch_may_leave_its_rate_out():
    values = run("stable").model_dump(mode="json")
    del values["schedule"]["learning_rate"]
    with pytest.raises(ConfigError, match="learning_rate is missing; only a branch may leave it out"):
        parse_config(RunConfig, values, "run.yaml")


def test_a_branch_says_what_it_carries():
    record = lineage_record(branch(), origin(run("stable"), 200 * 10**9))
    assert record["run"] == "long"
    assert record["parent_run"] == "stable"
    assert record["position"] == 200 * 10**9
    assert record["learning_rate"] == 2e-5
    assert record["carried"] == {"weights": True, "moments": True, "rng": "none is drawn", "data": "fresh, seed 4"}
    assert record["first_window"] == 0
    assert record["ancestors"] == [{"run": "stable", "position": 200 * 10**9, "path": "runs/stable"}]


def test_a_branch_of_a_branch_knows_the_whole_chain():
    above = {"ancestors": [{"run": "stable", "position": 5}]}
    record = lineage_record(branch(), origin(run("middle"), 9, lineage=above))
    assert record["ancestors"] == [{"run": "middle", "position": 9, "path": "runs/middle"}, *above["ancestors"]]


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"schedule": {"learning_rate": 1e-5}}, "starts at learning rate 1e-05"),
        ({"schedule": {"warmup": "1M"}}, "starts at learning rate 0"),
        ({"model": {**MODEL, "layers": 4}}, "model.layers: 2 -> 4"),
        ({"dtype": "fp32"}, "dtype: 'bf16' -> 'fp32'"),
        ({"parallel": {"distributed_optimizer": False}}, "parallel.distributed_optimizer: True -> False"),
    ],
)
def test_a_branch_that_does_not_continue_its_parent_is_refused(change, said):
    with pytest.raises(ConfigError) as refused:
        lineage_record(branch(**change), origin(run("stable"), 200 * 10**9))
    assert said in str(refused.value)


def test_weights_alone_may_change_precision():
    record = lineage_record(branch(dtype="fp32", fork={"moments": False}), origin(run("stable"), 200 * 10**9))
    assert record["carried"]["moments"] is False


def test_moments_cannot_come_from_a_converted_checkpoint():
    with pytest.raises(ConfigError, match="weights only"):
        lineage_record(branch(), origin(run("stable"), 200 * 10**9, moments=False))


@pytest.mark.parametrize("kind", ["cosine", "linear", "1-sqrt", "constant"])
def test_a_branch_without_a_rate_takes_its_parents(kind):
    decayed = run("middle", {"kind": "cosine", "tokens": "20B"})
    start = origin(decayed, 10 * 10**9)
    asked = branch(schedule={"kind": kind, "learning_rate": None})
    found = with_parents_rate(asked, start)
    assert found.schedule.learning_rate == learning_rate(found.schedule, 0) == 2e-5 * 0.55
    assert lineage_record(found, start)["learning_rate"] == 2e-5 * 0.55
    stated = branch(schedule={"learning_rate": 1e-5})
    assert with_parents_rate(stated, start) is stated


def test_a_branch_without_a_rate_needs_a_parent_that_has_one():
    ended = run("middle", {"kind": "linear", "final_ratio": 0, "tokens": "20B"})
    with pytest.raises(ConfigError, match=r"which is 0 where it forks \(20000000000 tokens\)"):
        with_parents_rate(branch(schedule={"learning_rate": None}), origin(ended, 20 * 10**9))


def test_a_warmup_from_nothing_continues_a_parent_that_ended_there():
    ended = run("middle", {"kind": "linear", "final_ratio": 0, "tokens": "20B"})
    assert lineage_record(branch(schedule={"warmup": "1B"}), origin(ended, 20 * 10**9))["learning_rate"] == 0


def test_a_branch_may_read_on_where_its_parent_was():
    record = lineage_record(branch(fork={"data": "continue"}), origin(run("stable"), 1280))
    assert (record["first_window"], record["carried"]["data"]) == (40, "goes on at window 40")
    again = lineage_record(branch(fork={"data": "continue"}), origin(run("middle"), 1280, lineage=record))
    assert again["first_window"] == 80


@pytest.mark.parametrize(
    ("field", "value"), [("seed", 5), ("sequence_length", 16), ("mixture", {"web": {"path": "other", "weight": 1}})]
)
def test_another_order_cannot_be_read_on(field, value):
    data = {**run("x").data.model_dump(mode="json"), field: value}
    with pytest.raises(ConfigError, match=f"cannot read on where its parent 'stable' was: data.{field}"):
        lineage_record(branch(fork={"data": "continue"}, data=data), origin(run("stable"), 1280))


def test_a_parent_knows_which_checkpoints_its_branches_left_from(tmp_path):
    parent = tmp_path / "stable"
    assert pinned_checkpoints(parent) == set()
    facts = {"run": "long", "parent": str(parent), "checkpoint": "step_00000010", "position": 1280}
    assert record_fork(run("long", out=str(tmp_path / "a")), facts)
    assert record_fork(run("long", out=str(tmp_path / "b")), {**facts, "checkpoint": "step_00000020"})
    assert pinned_checkpoints(parent) == {"step_00000010", "step_00000020"}
    for path in (parent / "forks").iterdir():
        path.write_text("{")
    assert pinned_checkpoints(parent) == {"step_00000010", "step_00000020"}, "a damaged record still pins"
    assert record_fork(run("long", out=str(tmp_path / "b")), {**facts, "checkpoint": "step_00000030"})
    assert pinned_checkpoints(parent) == {"step_00000010", "step_00000030"}


def test_a_parent_that_cannot_be_written_is_said(tmp_path):
    (tmp_path / "forks").write_text("a file stands here")
    facts = {"run": "long", "parent": str(tmp_path), "checkpoint": "step_00000010", "position": 1280}
    assert not record_fork(run("long"), facts)
