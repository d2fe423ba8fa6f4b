"""Known values of the schedules, and what a lineage record says."""

from __future__ import annotations

import json

import pytest

from megatron_octo.config.run import RunConfig
from megatron_octo.config.schedule import ScheduleConfig
from megatron_octo.errors import CheckpointError, ConfigError
from megatron_octo.schedule.fork import Origin, describe_lineage, lineage_record, read_lineage
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
    facts = {"step": 10, "run_tokens": tokens, "tokens": tokens, "config": parent.model_dump(mode="json"), **more}
    return Origin(str(parent.out), "step_00000010", facts)


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


def test_a_branch_says_what_it_carries():
    record = lineage_record(branch(), origin(run("stable"), 200 * 10**9))
    assert record["run"] == "long"
    assert record["parent_run"] == "stable"
    assert record["position"] == 200 * 10**9
    assert record["learning_rate"] == 2e-5
    assert record["carried"] == {"weights": True, "moments": True, "rng": "fresh, seed 0", "data": "fresh, seed 4"}
    assert record["ancestors"] == [{"run": "stable", "position": 200 * 10**9}]


def test_a_branch_of_a_branch_knows_the_whole_chain():
    above = {"ancestors": [{"run": "stable", "position": 5}]}
    record = lineage_record(branch(), origin(run("middle"), 9, lineage=above))
    assert record["ancestors"] == [{"run": "middle", "position": 9}, {"run": "stable", "position": 5}]
    assert describe_lineage(record).splitlines()[:3] == [
        "stable",
        "  - middle: forked from stable at 5 tokens",
        "    - long: forked from middle at 9 tokens",
    ]


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


def test_lineage_of_a_run_without_a_parent(tmp_path):
    (tmp_path / "config.yaml").touch()
    assert read_lineage(tmp_path)["parent"] is None
    assert describe_lineage(read_lineage(tmp_path)) == tmp_path.name
    (tmp_path / "lineage.json").write_text(json.dumps({"run": "x", "ancestors": []})[:-3])
    with pytest.raises(CheckpointError, match=r"lineage\.json: cannot be read"):
        read_lineage(tmp_path)
    with pytest.raises(CheckpointError, match="not a run directory"):
        read_lineage(tmp_path / "nowhere")
