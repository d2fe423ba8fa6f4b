"""What records follow from, what is believed of them, and who may write a directory at the same time."""

from __future__ import annotations

import json
import os
import stat
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from clean_tools import questions, write_benchmark
from engine_tasks import Task, work

from megatron_octo.config.data import DataBuildConfig
from megatron_octo.config.load import parse_config
from megatron_octo.data.corpora.shard import Shard
from megatron_octo.data.engine import code, plan, tasks
from megatron_octo.data.engine.build import build_data, only_writer
from megatron_octo.data.engine.executors import InProcess
from megatron_octo.data.engine.jobs import render_build, work_on_share
from megatron_octo.data.engine.manifest import verify_data
from megatron_octo.data.engine.on_ray import _attempt
from megatron_octo.data.engine.on_slurm import SUBMITTED
from megatron_octo.data.engine.plan import Plan
from megatron_octo.data.engine.stage import AT_WORK, Stage, calls_of, record_path, run_stages
from megatron_octo.errors import DataError, EnvironmentProblem
from megatron_octo.files import LOCK, hold, read_json, write_json


def _config(folder: Path, **changes: Any) -> DataBuildConfig:
    """Two corpora with questions, some of them twice and one that a benchmark asks."""
    asked = questions(12, seed=3)
    for name, some in (("one", asked[:8]), ("two", asked[5:])):
        rows = [{"question": text, "answer": f"It is #### {number}"} for number, text in enumerate(some)]
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    values = {
        "tokenizer": {"train": {"vocabulary_size": 300, "corpora": ["one"]}},
        "corpora": {name: {"path": str(folder / f"{name}.jsonl"), "adapter": "qa"} for name in ("one", "two")},
        "deduplicate": {"near": {"buckets": 2}, "partitions": 2},
        "decontaminate": {"against": {"made": write_benchmark(folder / "made.jsonl", asked[11:])}, "measure": 0},
        **changes,
    }
    return parse_config(DataBuildConfig, values, "test")


def _bytes(out: Path) -> dict[str, bytes]:
    found = [path for path in sorted(out.rglob("*")) if path.is_file() and path.name != LOCK]
    return {str(path.relative_to(out)): path.read_bytes() for path in found}


def _planned(config: DataBuildConfig, out: Path) -> list[Stage]:
    """All stages of a build after the hashing of its inputs, which is done."""
    planned = Plan(config, out)
    stage = planned.inputs()
    return planned.stages(planned.know(run_stages([stage], planned.build.work, InProcess())[stage.name]))


@pytest.fixture
def upgraded(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Stands in for `pip install -U`: another version of a library, or of this package."""

    def upgrade(name: str) -> None:
        known = code._version
        monkeypatch.setattr(code, "_version", lambda one: "99.9" if one == name else known(one))
        if name == "megatron-octo":
            monkeypatch.setattr(code, "__version__", "99.9")
        code.code_of.cache_clear()

    yield upgrade
    monkeypatch.undo()
    code.code_of.cache_clear()


# -- versions


CLEANING = {"signatures", "duplicates", "buckets", "clusters", "removals"}


@pytest.mark.parametrize(
    ("name", "again"),
    [
        ("tokenizers", {"tokenizer", "tokenise", "join"}),
        ("sentencepiece", {"tokenizer", "tokenise", "join"}),
        ("datatrove", CLEANING | {"tokenise", "join"}),
        ("numpy", CLEANING | {"tokenizer", "tokenise", "join"}),
        ("megatron-octo", CLEANING | {"tokenizer", "tokenise", "join"}),
    ],
)
def test_what_another_version_makes_again(tmp_path: Path, upgraded: Any, name: str, again: set[str]) -> None:
    def keys() -> dict[str, list[str]]:
        return {stage.name: [call.key for call in calls_of(stage, tmp_path)] for stage in _planned(config, tmp_path)}

    config = _config(tmp_path)
    before = keys()
    assert set(before) == CLEANING | {"tokenizer", "tokenise", "join"}
    upgraded(name)
    after = keys()
    assert {stage for stage in before if not set(before[stage]) & set(after[stage])} == again
    assert {stage for stage in before if before[stage] != after[stage]} == again


def test_mended_data_is_of_one_code(tmp_path: Path, upgraded: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """A source that is whole stays where one is mended by what made it; else all is made again, or nothing is."""
    config, made = _config(tmp_path), []
    plain = tasks.join
    monkeypatch.setattr(plan, "join", lambda build, corpus: (made.append(corpus.name), plain(build, corpus))[1])
    build_data(config, tmp_path / "out")
    (tmp_path / "out" / "two.bin").write_bytes(b"damaged")
    before = _bytes(tmp_path / "out")
    make = tasks.make_tokenizer
    with monkeypatch.context() as patch, pytest.raises(DataError, match="the tokenizer is another one now than in its"):
        patch.setattr(plan, "make_tokenizer", lambda build, task: {**make(build, task), "sha256": "another"})
        build_data(config, tmp_path / "out")
    kept = {name: content for name, content in _bytes(tmp_path / "out").items() if not name.startswith(".work/")}
    assert kept == before, "nothing of it is published"
    (tmp_path / "out" / ".work" / "records" / "tokenizer" / "00000.json").unlink()
    made.clear()
    build_data(config, tmp_path / "out")
    assert "one" not in made and verify_data(tmp_path / "out")
    (tmp_path / "out" / "two.bin").write_bytes(b"damaged")
    upgraded("tokenizers")
    made.clear()
    assert build_data(config, tmp_path / "out")["versions"]["tokenizers"] == "99.9" and made == ["one", "two"]


def test_a_node_with_other_packages_does_no_work(tmp_path: Path) -> None:
    (call,) = calls_of(Stage("squares", [Task(3, tmp_path)], work, 1), tmp_path)
    kind, error = _attempt(call, str(tmp_path), {**code.code_of(), "numpy": "0.1"})
    assert kind == "error" and isinstance(error, EnvironmentProblem) and "instead of 0.1" in str(error)
    assert not call.record.exists() and _attempt(call, str(tmp_path), code.code_of())[0] == "facts"


# -- token budgets


def test_tokens_of_earlier_shards_are_read_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not all of them for every shard: there may be many thousands."""
    build, read, count = tasks.Build(_config(tmp_path), tmp_path / "out"), [], 30
    pieces = [tasks.Piece(Shard("one", number, "one"), None, None, 5, "after", None) for number in range(count)]
    monkeypatch.setattr(tasks, "read_json", lambda path: (read.append(path), read_json(path))[1])

    def done(number: int, after: str = "after") -> None:
        record = {"made_from": "key", "facts": {"after": after, "tokens": number + 1}}
        write_json(record_path(build.work, tasks.TOKENISE, 5 + number), record)

    for number, piece in enumerate(pieces):
        assert tasks._tokens_before(build, piece, 1000) == number * (number + 1) // 2
        done(number)
    assert len(read) <= 2 * count
    assert [tasks._tokens_before(build, pieces[number], 1000) for number in (3, 0, 29)] == [6, 0, 435]
    other = [replace(piece, after="other") for piece in pieces]
    done(0, "other"), done(2, "other")
    assert tasks._tokens_before(build, other[9], 1000) == 1, "up to the first that is not known"
    done(1, "other")
    assert tasks._tokens_before(build, other[9], 1000) == 6 and tasks._tokens_before(build, other[9], 6) >= 6


# -- what was left out


def test_a_piece_that_left_nothing_out_is_not_published(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = _config(tmp_path)
    with monkeypatch.context() as patch, pytest.raises(DataError, match="a piece left out nothing, and .* was to be"):
        patch.setattr(tasks, "_removals", lambda build, piece: {})
        build_data(config, tmp_path / "out")
    assert {name for name in _bytes(tmp_path / "out") if not name.startswith(".work/")} == set()


# -- other machines


def test_tasks_read_the_files_that_the_build_was_started_with(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A worker elsewhere has other variables and another directory; its files must be the same all the same."""
    here, there = tmp_path / "here", tmp_path / "there"
    here.mkdir(), there.mkdir()
    build_data(_config(tmp_path), tmp_path / "given")
    (tmp_path / "given" / "tokenizer").rename(here / "tokenizer")
    asked = questions(12, seed=3)
    row = json.dumps({"question": asked[0], "answer": "7"}) + "\n"
    (here / "held.jsonl").write_text(row)
    (there / "held.jsonl").write_text(row.replace(asked[0], "Another question?"))
    held = {"count": "all", "file": {"path": "${OCTO_TEST_HELD:-" + str(there) + "}/held.jsonl"}}
    config = _config(
        tmp_path, problems={"heldout": held}, tokenizer={"path": "${OCTO_TEST_HERE}/tokenizer"}, decontaminate=None
    )
    monkeypatch.setenv("OCTO_TEST_HELD", "here")
    monkeypatch.setenv("OCTO_TEST_HERE", "here")
    monkeypatch.chdir(tmp_path)
    stages = _planned(config, tmp_path / "out")
    monkeypatch.delenv("OCTO_TEST_HELD")
    monkeypatch.delenv("OCTO_TEST_HERE")
    monkeypatch.chdir(there)
    (here / "tokenizer" / "added_tokens.json").write_text("{}")  # which the one it was started with does not have
    facts = run_stages(stages, tmp_path / "out" / ".work", InProcess())
    assert facts["join"][0]["accounts"]["removed"] == {"heldout": 1}
    found = {path.name for path in (tmp_path / "out" / ".work" / "result" / "tokenizer").iterdir()}
    assert found == {"tokenizer.json", "tokenizer_config.json"}
    (here / "held.jsonl").write_text(row.replace('"7"', '"8"'))
    (tmp_path / "out" / ".work" / "records" / "tokenise" / "00001.json").unlink()
    with pytest.raises(DataError, match="held.jsonl is another file here than where the build was started"):
        run_stages(stages, tmp_path / "out" / ".work", InProcess())
    (here / "held.jsonl").unlink()
    with pytest.raises(DataError, match=r"held.jsonl cannot be read here \(No such file"):
        run_stages(stages, tmp_path / "out" / ".work", InProcess())


# -- files of records


def test_what_the_cleaning_left_is_known_by_its_content(tmp_path: Path) -> None:
    """A power cut may leave a file of the right size that holds zeros: its task is done again."""
    config, out = _config(tmp_path), tmp_path / "out"
    stages = [stage for stage in _planned(config, out) if stage.name in CLEANING]
    run_stages(stages, out / ".work", InProcess())
    before = _bytes(out / ".work" / "clean")
    assert {"signatures/bucket_000/00000.minhash.sig", "candidates/00000_00.dups", "near/00000"} <= set(before)
    for name, content in before.items():
        (out / ".work" / "clean" / name).write_bytes(bytes(len(content)))
    run_stages(stages, out / ".work", InProcess())
    assert _bytes(out / ".work" / "clean") == before
    (call, _) = calls_of(stages[0], out / ".work")
    (out / ".work" / "clean" / "ids" / "00000").write_bytes(bytes(len(before["ids/00000"])))
    assert call.done(out / ".work") is None and call.done(out / ".work", read=False) is not None


# -- several at once


def test_a_task_that_outlived_its_driver_is_waited_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a cluster a task may go on when whoever started it is gone, lock and all."""
    monkeypatch.setattr("megatron_octo.data.engine.build._PATIENCE", 0.1)
    held = []

    def look(task: Any) -> dict[str, Any]:
        with pytest.raises(DataError, match=rf"written by another process \(process {os.getpid()} on "):
            only_writer(tmp_path)
        held.append(task)
        return {}

    (call, other) = calls_of(Stage("looks", [1, 2], look, 1), tmp_path / ".work")
    call.perform()
    with hold(tmp_path / ".work" / AT_WORK, shared=True):  # others of the same build do not mind
        other.perform()
        with pytest.raises(BlockingIOError, match="the last of those that share it"):
            hold(tmp_path / ".work" / AT_WORK)
    assert held == [1, 2]
    only_writer(tmp_path).close()


def test_jobs_and_other_starts_keep_out_of_each_others_way(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config, out = _config(tmp_path), tmp_path / "out"
    for room in ("build", "jobs"):
        monkeypatch.setattr(f"megatron_octo.data.engine.{room}._PATIENCE", 0.1)
    with only_writer(out), pytest.raises(DataError, match="written by another process"):
        work_on_share(config, out, "inputs", "0/1")
    plain = plan.inputs_stage

    def meddle(files: Any) -> Any:
        patch.setattr(plan, "inputs_stage", plain)
        work_on_share(config, out, "inputs", "1/2")  # of the same submission
        for start in (lambda: build_data(config, out), lambda: render_build(config, out, None)):
            with pytest.raises(DataError, match="written by another process"):
                start()
        return plain(files)

    with monkeypatch.context() as patch:
        patch.setattr(plan, "inputs_stage", meddle)
        work_on_share(config, out, "inputs", "0/2")
    assert read_json(out / ".work" / "records" / "inputs" / "00000.json")


def test_what_is_still_queued_is_not_submitted_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config, out, tools = _config(tmp_path), tmp_path / "out", tmp_path / "bin"
    tools.mkdir()
    for name, script in (("sbatch", "echo $((7000 + $$ % 1000))"), ("squeue", 'echo "${@: -1}" | tr , "\\n"')):
        (tools / name).write_text(f"#!/bin/bash\n{script}\n")
        (tools / name).chmod(stat.S_IRWXU)
    monkeypatch.setenv("PATH", f"{tools}:{os.environ['PATH']}")
    _, said = render_build(config, out, None)
    ids = [line.split()[0] for line in str(said).splitlines()]
    assert len(ids) > 3 and (out / ".work" / SUBMITTED).read_text().split() == ids
    with pytest.raises(DataError, match=f"earlier submission are still in the queue: .*{ids[0]}.*scancel"):
        render_build(config, out, None)
    (tools / "squeue").write_text("#!/bin/bash\necho 'slurm_load_jobs error: Invalid job id specified' >&2; exit 1\n")
    assert render_build(config, out, None)[1]
