"""A build on Slurm: what is rendered, and that the rendered jobs, run by a stand-in for the scheduler, build it."""

from __future__ import annotations

import json
import os
import re
import stat
from pathlib import Path

import pytest
from engine_tasks import opened_below

from megatron_octo.config.data import DataBuildConfig
from megatron_octo.config.load import dump_config, load_config, parse_config
from megatron_octo.data.corpora import shard
from megatron_octo.data.engine.build import build_data
from megatron_octo.data.engine.executors import InProcess
from megatron_octo.data.engine.jobs import _hashes, render_build, work_on_share
from megatron_octo.data.engine.plan import Plan
from megatron_octo.data.engine.publish import place
from megatron_octo.data.engine.stage import run_stages
from megatron_octo.errors import ConfigError, DataError, EnvironmentProblem

SBATCH = """\
#!/usr/bin/env python3
# Stands in for the scheduler: notes what it is given, and runs the tasks of an array one after the other at once.
import os, re, subprocess, sys
text = open(sys.argv[-1]).read()
with open(os.environ["SBATCH_LOG"], "a") as log:
    print(*sys.argv[1:-1], os.path.basename(sys.argv[-1]), file=log)
last = re.search(r"--array=0-(\\d+)", text)
for number in range(int(last[1]) + 1 if last else 1):
    subprocess.run(["bash", sys.argv[-1]], env={**os.environ, "SLURM_ARRAY_TASK_ID": str(number)}, check=True)
print(sum(1 for line in open(os.environ["SBATCH_LOG"])))
"""


def _config(path: Path) -> DataBuildConfig:
    path.mkdir(exist_ok=True)
    for name in ("one", "two"):
        rows = [{"text": f"{name} {number} and more"} for number in range(40)]
        (path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    corpora = {name: {"path": str(path / f"{name}.jsonl")} for name in ("one", "two")}
    values = {"tokenizer": {"train": {"vocabulary_size": 300}}, "corpora": corpora}
    config = parse_config(DataBuildConfig, values, "test")
    dump_config(config, path / "data.yaml")
    return config


def _jobs(out: Path) -> dict[str, str]:
    return {path.name: path.read_text() for path in sorted((out / ".work" / "slurm").glob("*.sbatch"))}


def test_jobs_of_a_build(tmp_path: Path) -> None:
    config, out = _config(tmp_path / "in puts"), tmp_path / "my out"
    script, said = render_build(config, out, workers=8)
    assert script is not None and said is None and script.read_text().count("\nsubmit ") == 5
    submit = script.read_text()
    assert submit.index('"${@:2}"') < submit.index("--dependency=afterok:$id"), "a user's own comes before, and loses"
    jobs = _jobs(out)
    assert list(jobs) == [
        "1-inputs.sbatch", "2-tokenizer.sbatch", "3-tokenise.sbatch", "4-join.sbatch", "5-publish.sbatch"
    ]  # fmt: skip
    assert "#SBATCH --array=0-1%8\n" in jobs["3-tokenise.sbatch"]
    assert f"--out '{out}' --stage tokenise --share \"$SLURM_ARRAY_TASK_ID/2\"" in jobs["3-tokenise.sbatch"]
    assert (
        "--array" not in jobs["5-publish.sbatch"] and f"data build '{out}/.work/build.yaml'" in jobs["5-publish.sbatch"]
    )
    for text in jobs.values():
        assert "#SBATCH --requeue\n" in text and re.search(rf"#SBATCH --output='{re.escape(str(out))}/.*'\n", text)


def test_jobs_build_what_was_submitted(tmp_path: Path) -> None:
    """Whatever becomes of its file while they wait; another build is refused there."""
    config, out = _config(tmp_path / "in"), tmp_path / "data"
    render_build(config, out, workers=None)
    assert load_config(DataBuildConfig, out / ".work" / "build.yaml") == config
    assert all(f"{out}/.work/build.yaml" in text and "data.yaml" not in text for text in _jobs(out).values())
    with pytest.raises(ConfigError, match="holds another build: settings.seed: 0 -> 1"):
        work_on_share(config.model_copy(update={"seed": 1}), out, "inputs", "0/1")


def test_a_job_looks_at_its_own_file_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Lines are counted by the first stage, in parts that follow from the size; a plan reads nothing of a corpus."""
    monkeypatch.setattr(shard, "PART", 500)
    config, out = _config(tmp_path / "in"), tmp_path / "data"
    with opened_below(tmp_path / "in") as paths:
        Plan(config, out)
        render_build(config, out, workers=None)
    assert paths == []
    with opened_below(tmp_path / "in") as paths:
        work_on_share(config, out, "inputs", "0/1")
    assert sorted(Path(path).name for path in paths) == ["one.jsonl", "two.jsonl"]
    work_on_share(config, out, "tokenizer", "0/1")
    (tmp_path / "in" / "two.jsonl").rename(tmp_path / "in" / "gone")
    with opened_below(tmp_path / "in") as paths:
        work_on_share(config, out, "tokenise", "1/6")
    assert [Path(path).name for path in paths] == ["one.jsonl"]
    (tmp_path / "in" / "gone").rename(tmp_path / "in" / "two.jsonl")
    monkeypatch.setattr(shard, "PART", 1 << 20)
    build_data(config, tmp_path / "whole")
    monkeypatch.setattr(shard, "PART", 500)
    build_data(config, out)
    for name in ("one.docs", "two.docs", "two.bin", "manifest.json"):
        assert (out / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


@pytest.mark.slow
@pytest.mark.timeout(180)
def test_the_rendered_jobs_build_the_same_data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config, out = _config(tmp_path / "inputs"), tmp_path / "data"
    (tmp_path / "bin").mkdir()
    sbatch = tmp_path / "bin" / "sbatch"
    sbatch.write_text(SBATCH)
    sbatch.chmod(sbatch.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:{os.environ['PATH']}")
    monkeypatch.setenv("SBATCH_LOG", str(tmp_path / "log"))
    script, said = render_build(config, out, workers=None)
    assert said is not None and len(said.splitlines()) == 5
    first, *others = (tmp_path / "log").read_text().splitlines()
    assert "dependency" not in first
    for before, line in enumerate(others, start=1):
        assert f"--dependency=afterok:{before} --kill-on-invalid-dep=yes" in line
    build_data(config, tmp_path / "here")
    for path in (tmp_path / "here").rglob("*"):
        if path.is_file() and path.name != ".lock":
            assert (out / path.relative_to(tmp_path / "here")).read_bytes() == path.read_bytes()


def test_only_what_is_left_gets_a_job(tmp_path: Path) -> None:
    config, out = _config(tmp_path / "inputs"), tmp_path / "data"
    with pytest.raises(DataError, match="the input files are not hashed"):
        work_on_share(config, out, "tokenise", "0/2")
    work_on_share(config, out, "inputs", "0/1")
    work_on_share(config, out, "tokenizer", "0/1")
    work_on_share(config, out, "tokenise", "1/2")
    render_build(config, out, workers=None)
    jobs = _jobs(out)
    assert list(jobs) == ["1-tokenise.sbatch", "2-join.sbatch", "3-publish.sbatch"]
    assert "#SBATCH --array=0-0\n" in jobs["1-tokenise.sbatch"]


def test_a_finished_build_gets_no_job(tmp_path: Path) -> None:
    config, out = _config(tmp_path / "inputs"), tmp_path / "data"
    build_data(config, out)
    assert render_build(config, out, workers=None) == (None, None) and _jobs(out) == {}
    (out / "one.bin").unlink()
    assert render_build(config, out, workers=None)[0] is not None, "a damaged one is mended"
    with (tmp_path / "inputs" / "one.jsonl").open("a") as lines:
        lines.write('{"text": "one more"}\n')
    with pytest.raises(ConfigError, match=r"holds another build: inputs.corpora.one.*one.jsonl"):
        render_build(config, out, workers=None)


def test_stages_in_another_order_are_refused(tmp_path: Path) -> None:
    """An absent file of removals is never taken for nothing to leave out, neither by a job nor by its task."""
    _config(tmp_path / "in")
    config = parse_config(DataBuildConfig, {
        "tokenizer": {"train": {"vocabulary_size": 300}}, "deduplicate": {"partitions": 1},
        "corpora": {name: {"path": str(tmp_path / "in" / "one.jsonl")} for name in ("one",)},
    }, "test")  # fmt: skip
    out = tmp_path / "data"
    for stage in ("inputs", "signatures", "duplicates"):
        work_on_share(config, out, stage, "0/1")
    with pytest.raises(DataError, match="1 of 1 tasks of the stage removals are not done"):
        work_on_share(config, out, "tokenizer", "0/1")
    plan = Plan(config, out)
    stages = {stage.name: stage for stage in plan.stages(_hashes(plan) or {})}
    run_stages([stages["tokenizer"]], plan.build.work, InProcess())
    with pytest.raises(DataError, match="nothing says yet what to leave out"):
        run_stages([stages["tokenise"]], plan.build.work, InProcess())
    run_stages([stages["removals"], stages["tokenise"]], plan.build.work, InProcess())


def test_a_job_believes_no_piece_of_what_was_mended(tmp_path: Path) -> None:
    """The second file is needed now that the first is shorter, whoever comes first."""
    _config(tmp_path / "in")
    values = {
        "tokenizer": {"train": {"vocabulary_size": 300}},
        "corpora": {"in": {"path": str(tmp_path / "in" / "*.jsonl"), "tokens": 200}},
    }
    config, out = parse_config(DataBuildConfig, values, "test"), tmp_path / "data"
    for stage in ("inputs", "tokenizer", "tokenise"):
        work_on_share(config, out, stage, "0/1")
    (tmp_path / "in" / "one.jsonl").write_text(json.dumps({"text": "one and no more"}) + "\n")
    for stage, share in (("inputs", "0/1"), ("tokenizer", "0/1"), ("tokenise", "1/2")):
        work_on_share(config, out, stage, share)
    assert build_data(config, out)["sources"]["in"]["accounts"]["read"] > 1


@pytest.mark.parametrize(("stage", "share"), [("tokenize", "0/2"), ("inputs", "2/2"), ("inputs", "x")])
def test_no_such_share(tmp_path: Path, stage: str, share: str) -> None:
    config, out = _config(tmp_path / "inputs"), tmp_path / "data"
    work_on_share(config, out, "inputs", "0/1")
    with pytest.raises(ConfigError, match="--stage tokenize" if stage == "tokenize" else f"--share {share}"):
        work_on_share(config, out, stage, share)


def test_a_refusal_of_the_scheduler_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "bin").mkdir()
    sbatch = tmp_path / "bin" / "sbatch"
    sbatch.write_text("#!/bin/sh\necho 'sbatch: error: invalid partition specified' >&2; exit 1\n")
    sbatch.chmod(sbatch.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:{os.environ['PATH']}")
    config = _config(tmp_path / "inputs")
    with pytest.raises(EnvironmentProblem, match="invalid partition specified.*fix: set SBATCH_PARTITION"):
        render_build(config, tmp_path / "data", workers=None)


def test_a_build_that_was_killed_while_it_published_gets_no_job(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """What is in its place already would be missing from the work, and all of it would be made again."""
    _config(tmp_path / "inputs")
    values = {"tokenizer": {"train": {"vocabulary_size": 300}}, "corpora": {"c": {"path": str(tmp_path / "inputs")}}}
    config, out = parse_config(DataBuildConfig, values, "test"), tmp_path / "data"
    placed: list[str] = []

    def killed(source: Path, target: Path) -> None:
        if len(placed) == 2:
            raise KeyboardInterrupt
        placed.append(target.name)
        place(source, target)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr("megatron_octo.data.engine.publish.place", killed)
        build_data(config, out)
    assert not (out / "manifest.json").exists()
    capsys.readouterr()
    assert render_build(config, out, workers=None) == (None, None)
    assert (out / "manifest.json").exists() and not (out / ".work").exists()
    assert "files of jsonl, jsonl.gz, jsonl.zst or parquet: data.yaml" in capsys.readouterr().err
