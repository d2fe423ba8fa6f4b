"""Where a run starts, what may change when it goes on, and who may write its directory. No torch needed."""

from __future__ import annotations

import json
import os
from pathlib import Path
from unittest import mock

import pytest
import yaml

from megatron_octo.checkpoint import store
from megatron_octo.checkpoint.retain import Policy, prune
from megatron_octo.checkpoint.seal import seal, seal_digest
from megatron_octo.checkpoint.store import read_facts
from megatron_octo.config.run import RunConfig
from megatron_octo.data.index.digest import tokenizer_digest
from megatron_octo.data.index.pairs import read_index
from megatron_octo.data.index.writer import write_indexed
from megatron_octo.data.mix.identity import content_digest
from megatron_octo.errors import CheckpointError, ConfigError, DataError, EnvironmentProblem
from megatron_octo.schedule.fork import pinned_checkpoints
from megatron_octo.train import start
from megatron_octo.train.api import load_run, train_run
from megatron_octo.train.change import check_data
from megatron_octo.train.start import cut_metrics, make_place, only_trainer, open_run, plan_start


def values(out, **more):
    return {
        "name": "stable",
        "out": str(out),
        "dtype": "fp32",
        "model": {"layers": 2, "hidden": 32, "heads": 4, "kv_groups": 2, "ffn": 64, "vocabulary": 91},
        "data": {
            "tokenizer": str(Path(__file__).parent),  # any directory
            "mixture": {"web": {"path": "web", "weight": 0.7}, "math": {"path": "math", "weight": 0.3}},
            "sequence_length": 32,
        },
        "batch": {"global_batch": 4, "micro_batch": 2},
        "schedule": {"learning_rate": 1e-3, "tokens": 10_000},
        "checkpoint": {"every": 1000},
        **more,
    }


def save(config: RunConfig, step: int, **more) -> None:
    temporary = store.begin(config.out, step)
    tokens = step * config.tokens_per_step
    facts = {"step": step, "run_tokens": tokens, "tokens": tokens, "config": config.model_dump(mode="json")}
    store.write_facts(temporary, {**facts, **more})
    store.publish(temporary, config.out, step)


@pytest.fixture
def config(tmp_path):
    config = RunConfig.model_validate(values(tmp_path / "stable"))
    save(config, 8)
    return config


def changed(config: RunConfig, path: str, value) -> RunConfig:
    plain = config.model_dump(mode="json")
    *folders, name = path.split(".")
    place = plain
    for folder in folders:
        place = place[folder]
    place[name] = value
    return RunConfig.model_validate(plain)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("parallel.tensor", 2),
        ("parallel.data", 2),
        ("batch.micro_batch", 1),
        ("checkpoint.every", 500),
        ("checkpoint.keep", 7),
        ("threads", 1),
        ("timeout_minutes", 3),
        ("schedule.tokens", 20_000),
        ("schedule.tokens", 1000),
        ("schedule", {"kind": "wsd", "learning_rate": 1e-3, "tokens": 5000, "decay": "3K"}),
        ("watch.nonfinite", "skip"),
    ],
)
def test_what_may_change(config, field, value):
    begin = plan_start(changed(config, field, value))
    assert (begin.step, begin.moments, begin.root_tokens) == (8, True, 0)
    assert begin.checkpoint == config.out / "checkpoints" / "step_00000008"


@pytest.mark.parametrize(
    ("field", "value", "said"),
    [
        (
            "data.mixture",
            {"web": {"path": "web", "weight": 0.6}, "math": {"path": "math", "weight": 0.4}},
            "data.mixture.math.weight: 0.3 -> 0.4; data.mixture.web.weight: 0.7 -> 0.6",
        ),
        ("data.mixture.math.path", "other", "data.mixture.math.path: 'math' -> 'other'"),
        ("data.seed", 9, "data.seed: 0 -> 9"),
        ("data.sequence_length", 64, "data.sequence_length: 32 -> 64"),
        ("batch.global_batch", 8, "batch.global_batch: 4 -> 8"),
        ("model.layers", 4, "model.layers: 2 -> 4"),
        ("seed", 1, "seed: 0 -> 1"),
        ("schedule.learning_rate", 2e-3, "schedule.learning_rate: 0.001 -> 0.002"),
        ("schedule.tokens", 500, "it would end at 500 tokens, and 1024 are trained"),
        ("schedule.kind", "linear", "the step at 128 tokens was taken at 0.001, and would have been at 0.00098848"),
        ("schedule.warmup", 5000, "the step at 0 tokens was taken at 0.001, and would have been at 0"),
        ("optimizer.weight_decay", 0.2, "optimizer.weight_decay: 0.1 -> 0.2"),
        ("parallel.distributed_optimizer", False, "parallel.distributed_optimizer: True -> False"),
        ("dtype", "bf16", "dtype: 'fp32' -> 'bf16'"),
    ],
)
def test_what_may_not_change_is_named(config, field, value, said):
    with pytest.raises(ConfigError) as refused:
        plan_start(changed(config, field, value))
    assert said in str(refused.value)


@pytest.fixture
def moved(tmp_path):
    """A run that has read two sources, and a copy of them, tokenizer included, elsewhere."""
    for folder in (tmp_path / "data", tmp_path / "elsewhere"):
        (folder / "tokenizer").mkdir(parents=True)
        (folder / "tokenizer" / "tokenizer.json").write_text("{}")
        for name in ("web", "math"):
            write_indexed(folder / name, [[1, 2, 3], [4]], 91)
    plain = values(tmp_path / "stable", data=data_in(tmp_path / "data"))
    config = RunConfig.model_validate(plain)
    digests = {name: content_digest(read_index(source.path)) for name, source in config.data.mixture.items()}
    save(config, 8, data=digests, tokenizer=tokenizer_digest(config.data.tokenizer))
    return config


def data_in(folder: Path) -> dict:
    mixture = {name: {"path": str(folder / name), "weight": 0.5} for name in ("web", "math")}
    return {"tokenizer": str(folder / "tokenizer"), "mixture": mixture, "sequence_length": 2}


@pytest.mark.parametrize("how", ["resume", "branch that reads on"])
def test_data_that_was_moved_is_read_on(moved, tmp_path, how):
    there = {"data": data_in(tmp_path / "elsewhere")}
    if how != "resume":
        there |= {"out": str(tmp_path / "long"), "start": {"fork": {"parent": str(moved.out), "data": "continue"}}}
    asked = RunConfig.model_validate({**values(moved.out), **there})
    assert plan_start(asked).run.data == asked.data
    write_indexed(tmp_path / "elsewhere" / "web", [[1, 2, 3], [5]], 91)  # of the same lengths
    with pytest.raises(ConfigError, match=r"data\.mixture\.web\.path: "):
        plan_start(asked)


def test_a_moved_tokenizer_is_the_same_one(moved, tmp_path):
    asked = changed(moved, "data.tokenizer", str(tmp_path / "elsewhere" / "tokenizer"))
    assert plan_start(asked).step == 8
    (tmp_path / "elsewhere" / "tokenizer" / "tokenizer_config.json").write_text('{"eos_token": "other"}')
    with pytest.raises(ConfigError, match=r"data\.tokenizer: "):
        plan_start(asked)


def test_moved_data_of_a_checkpoint_that_knows_no_tokens_is_refused(moved, tmp_path):
    save(moved, 9, data={name: content_digest(read_index(s.path))["index"] for name, s in moved.data.mixture.items()})
    with pytest.raises(ConfigError, match=r"data\.mixture\.math\.path: .*data\.mixture\.web\.path: "):
        plan_start(changed(moved, "data", data_in(tmp_path / "elsewhere")))


def test_other_tokens_in_documents_of_the_same_lengths_are_refused(moved):
    known = read_facts(moved.out / "checkpoints" / "step_00000008")["data"]
    check_data(moved, known, known)
    check_data(moved, {name: digest["index"] for name, digest in known.items()}, known)  # of an earlier version
    with pytest.raises(DataError, match=r"data\.mixture\.web .* holds other tokens than those that 'stable' has read"):
        check_data(moved, known, {**known, "web": {**known["web"], "tokens": "other"}})
    with pytest.raises(DataError, match=r"data\.mixture\.web .* is not the dataset"):
        check_data(moved, known, {**known, "web": {**known["web"], "index": "other"}})


def test_a_decay_cannot_grow(tmp_path):
    decay = {"kind": "cosine", "learning_rate": 1e-3, "tokens": 10_000}
    config = RunConfig.model_validate(values(tmp_path / "long", schedule=decay))
    save(config, 8)
    with pytest.raises(ConfigError, match="schedule.tokens: 10000 -> 20000"):
        plan_start(changed(config, "schedule.tokens", 20_000))


def test_a_decay_may_move_until_it_begins(tmp_path):
    def stable(start: int) -> dict:
        return {"kind": "wsd", "learning_rate": 1e-3, "tokens": start + 512, "decay": 512, "shape": "linear"}

    for begins, message in ((1024, None), (1023, "the rate would jump from 0.00099"), (896, "the rate would jump")):
        config = RunConfig.model_validate(values(tmp_path / str(begins), schedule=stable(begins)))
        save(config, 8)
        later = config.model_copy(update={"schedule": config.schedule.model_copy(update={"tokens": 9000})})
        if message is None:
            assert plan_start(later).run.schedule.tokens == 9000
            continue
        with pytest.raises(ConfigError, match=message):
            plan_start(later)


def test_fields_that_are_newer_than_a_checkpoint_have_their_defaults(config):
    path = config.out / "checkpoints" / "step_00000008" / "run.json"
    facts = json.loads(path.read_text())
    for section, fields in (("schedule", ("decay", "shape")), ("checkpoint", ("keep_every",)), ("start", ("fork",))):
        for field in fields:
            del facts["config"][section][field]
    del facts["config"]["watch"], facts["config"]["optimizer"]["beta2"]
    path.write_text(json.dumps(facts))
    seal(path.parent)
    assert plan_start(config).run == config
    with pytest.raises(ConfigError, match="seed: 0 -> 1"):
        plan_start(changed(config, "seed", 1))


@pytest.mark.parametrize("how", ["resume", "fork"])
def test_a_checkpoint_of_another_version_is_refused_in_words(config, tmp_path, how):
    path = config.out / "checkpoints" / "step_00000008" / "run.json"
    facts = json.loads(path.read_text())
    facts["config"]["optimizer"]["amsgrad"] = True
    path.write_text(json.dumps({**facts, "versions": {"megatron_octo": "0.0.9"}}))
    seal(path.parent)
    fork = {"fork": {"parent": str(config.out)}}
    run = config if how == "resume" else RunConfig.model_validate(values(tmp_path / "long", start=fork))
    said = r"run\.json: config: unknown key 'optimizer\.amsgrad'; it was written by megatron_octo 0\.0\.9"
    with pytest.raises(CheckpointError, match=said):
        plan_start(run)


def test_opening_cuts_metrics_beyond_the_checkpoint(config):
    lines = [json.dumps({"step": step}) + "\n" for step in range(1, 12)]
    (config.out / "metrics.jsonl").write_text("".join(lines) + '{"step": 12, "lo')
    open_run(config)
    assert [json.loads(line)["step"] for line in (config.out / "metrics.jsonl").open()] == list(range(1, 9))
    assert load_run(config.out / "config.yaml") == config


@pytest.mark.parametrize("how", ["resume", "fork"])
def test_facts_that_were_altered_change_nothing(config, tmp_path, how):
    """The load would notice, but only after lines of metrics were cut by the wrong step."""
    lines = "".join(json.dumps({"step": step}) + "\n" for step in range(1, 9))
    (config.out / "metrics.jsonl").write_text(lines)
    path = config.out / "checkpoints" / "step_00000008" / "run.json"
    path.write_text(path.read_text().replace('"step": 8', '"step": 3'))
    fork = {"name": "long", "start": {"fork": {"parent": str(config.out)}}}
    run = config if how == "resume" else RunConfig.model_validate(values(tmp_path / "long", **fork))
    run.out.mkdir(exist_ok=True)
    with pytest.raises(CheckpointError, match=r"run\.json: has been altered"):
        open_run(run)
    assert (config.out / "metrics.jsonl").read_text() == lines
    assert pinned_checkpoints(config.out) == set()


def test_metrics_that_fit_are_left_alone(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\n')
    before = path.stat().st_ino
    cut_metrics(path, 1)
    assert path.stat().st_ino == before
    cut_metrics(tmp_path / "absent", 1)


def test_a_branch_names_missing_parents_and_positions(config, tmp_path):
    fork = {"parent": str(tmp_path / "nowhere")}
    branch = RunConfig.model_validate(values(tmp_path / "long", name="long", start={"fork": fork}))
    with pytest.raises(CheckpointError, match="nowhere: no such run directory"):
        plan_start(branch)
    fork = {"parent": str(config.out), "at": "5K"}
    branch = RunConfig.model_validate(values(tmp_path / "long", name="long", start={"fork": fork}))
    with pytest.raises(
        CheckpointError, match=r"no checkpoint at 5000 tokens; checkpoints exist at 1024 \(step_00000008\)"
    ):
        plan_start(branch)
    assert not (tmp_path / "long").exists()


def test_a_branch_writes_its_lineage_before_it_trains(config, tmp_path):
    fork = {"parent": str(config.out), "at": "1K"}
    branch = RunConfig.model_validate(values(tmp_path / "long", name="long", start={"fork": fork}))
    branch.out.mkdir()
    begin = open_run(branch)
    written = json.loads((branch.out / "lineage.json").read_text())
    assert (begin.step, begin.root_tokens, begin.moments) == (0, 1024, True)
    assert written == begin.lineage
    assert written["parent"] == str(config.out)
    assert written["seal"] == seal_digest(config.out / "checkpoints" / "step_00000008")
    assert pinned_checkpoints(config.out) == {"step_00000008"}
    for step in (16, 24, 32):
        save(config, step)
        assert prune(config.out, Policy(keep=1)) == ([] if step == 16 else [store.step_name(step - 8)])
    assert (config.out / "checkpoints" / "step_00000008").is_dir()


def test_a_branch_keeps_the_rate_it_took_from_its_parent(config, tmp_path):
    fork = {"parent": str(config.out), "at": "1K"}
    schedule = {"kind": "1-sqrt", "tokens": 2000}
    branch = RunConfig.model_validate(values(tmp_path / "long", name="long", start={"fork": fork}, schedule=schedule))
    branch.out.mkdir()
    begin = open_run(branch)
    assert begin.run.schedule.learning_rate == 1e-3
    assert load_run(branch.out / "config.yaml") == begin.run
    save(begin.run, 3)
    assert plan_start(branch).run == begin.run == plan_start(begin.run).run
    with pytest.raises(ConfigError, match="the step at 0 tokens was taken at 0.001"):
        plan_start(changed(branch, "schedule.learning_rate", 2e-3))


def test_a_branch_of_a_parent_that_trains_says_where_it_leaves(config, tmp_path):
    def branch(**at) -> RunConfig:
        fork = {"parent": str(config.out), **at}
        return RunConfig.model_validate(values(tmp_path / "long", name="long", start={"fork": fork}))

    with only_trainer(config.out):
        with pytest.raises(CheckpointError, match=r"still trains.*fix: set start\.fork\.at, e\.g\. to 1024"):
            plan_start(branch())
        assert plan_start(branch(at=1024)).root_tokens == 1024
    assert plan_start(branch()).root_tokens == 1024


def test_a_branch_of_a_parent_that_cannot_be_written_starts_and_says_so(config, tmp_path, capsys):
    (config.out / "forks").write_text("a file stands here")
    fork = {"parent": str(config.out)}
    branch = RunConfig.model_validate(values(tmp_path / "long", name="long", start={"fork": fork}))
    branch.out.mkdir()
    assert open_run(branch).root_tokens == 1024
    said = capsys.readouterr().err
    assert said.startswith("octo: note: ") and said.count("\n") == 1
    assert "cannot be written" in said and "may prune step_00000008" in said


def test_a_checkpoint_pruned_while_a_branch_starts_is_noticed(config, tmp_path):
    fork = {"parent": str(config.out)}
    branch = RunConfig.model_validate(values(tmp_path / "long", name="long", start={"fork": fork}))
    branch.out.mkdir()

    def prune_then_record(*_arguments):
        store.retire(config.out / "checkpoints" / "step_00000008")
        return True

    with (
        mock.patch.object(start, "record_fork", prune_then_record),
        pytest.raises(CheckpointError, match=r"step_00000008/run\.json: no such file"),
    ):
        open_run(branch)


def test_given_weights_must_exist(tmp_path):
    config = RunConfig.model_validate(values(tmp_path / "run", start={"checkpoint": str(tmp_path / "absent")}))
    with pytest.raises(CheckpointError, match="no checkpoint here"):
        plan_start(config)


@pytest.mark.parametrize(("field", "value"), [("rope_theta", 10_000.0), ("norm_epsilon", 1e-6), ("kv_groups", 4)])
def test_given_weights_must_be_of_the_same_model(config, tmp_path, field, value):
    start_from = {"checkpoint": str(config.out)}
    fits = RunConfig.model_validate(values(tmp_path / "run", start=start_from))
    assert plan_start(fits).checkpoint == config.out / "checkpoints" / "step_00000008"
    model = {**fits.model.model_dump(), "head_dim": fits.model.dim, "init_std": 0.5, "max_positions": 64}
    assert plan_start(fits.model_copy(update={"model": fits.model.model_validate(model)})).step == 0
    other = fits.model_copy(update={"model": fits.model.model_copy(update={field: value})})
    with pytest.raises(ConfigError, match=f"another model than this run's: model.{field}"):
        plan_start(other)


def test_a_run_directory_has_one_writer(tmp_path):
    said = f"another process trains here \\(process {os.getpid()}\\)"
    patience = mock.patch.object(start, "_LOCK_PATIENCE", 0.2)
    with only_trainer(tmp_path / "run"), patience, pytest.raises(EnvironmentProblem, match=said):
        only_trainer(tmp_path / "run")
    only_trainer(tmp_path / "run").close()


def test_the_command_refuses_before_any_process_starts(config, tmp_path):
    plain = config.model_dump(mode="json")
    plain["data"]["seed"] = 9
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(plain))
    there = mock.patch("megatron_octo.train.needs.needs", return_value=[])  # its data, that is
    with mock.patch("megatron_octo.runtime.launch.launch") as launch, there:
        with pytest.raises(ConfigError, match=r"data\.seed: 0 -> 9"):
            train_run(tmp_path / "run.yaml")
        train_run(tmp_path / "run.yaml", ["data.seed=0", "parallel.data=2"], 4000)
    (module, arguments, processes, logs, _), _ = launch.call_args
    assert (module, processes, logs) == ("megatron_octo.train", 2, config.out)
    assert arguments == [str(tmp_path / "run.yaml"), "data.seed=0", "parallel.data=2", "--until", "4000"]


@pytest.mark.parametrize("make", [make_place, lambda out: only_trainer(out).close()])
def test_a_new_run_directory_survives_a_power_cut_with_all_above_it(tmp_path, monkeypatch, make):
    flushed = []
    monkeypatch.setattr("megatron_octo.files.flush_to_disk", flushed.append)
    make(tmp_path / "above" / "run")
    assert {tmp_path, tmp_path / "above"} <= set(flushed)
    flushed.clear()
    make_place(tmp_path / "above" / "run")
    assert flushed == []
