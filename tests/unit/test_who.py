"""Who read a document: the steps of a whole family of runs, by its id or its number."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from mixture_tools import BATCH, STEP, mixture, run_of, trained, write_sources
from typer.testing import CliRunner

from megatron_octo.cli.root import app
from megatron_octo.config.run import RunConfig
from megatron_octo.data.index.pairs import bin_path, idx_path, read_index
from megatron_octo.data.index.table import docs_path
from megatron_octo.data.mix.reader import build_train_dataset
from megatron_octo.errors import DataError, OctoError
from megatron_octo.train.ledger import who
from megatron_octo.train.start import REWINDS, plan_start


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_sources(tmp_path_factory.mktemp("sources"))


@pytest.fixture
def family(sources: Path, tmp_path: Path) -> dict[str, RunConfig]:
    """A run with two mixtures; a branch that reads on in a third, one with an order of its own, one of that."""
    phases = [{"at": 6 * STEP, "mixture": mixture(sources, web=0.5, code=0.5)}]
    runs = {"stable": trained(run_of(tmp_path / "stable", sources, data={"phases": phases}), 10)}

    def branch(name: str, parent: str, changes: dict[str, Any], steps: int, **fork: Any) -> None:
        start = {"fork": {"parent": str(runs[parent].out), **fork}}
        runs[name] = trained(run_of(tmp_path / name, sources, start=start, data=changes), steps)

    branch("on", "stable", {"mixture": mixture(sources, web=0.2, math=0.8)}, 20, data="continue")
    branch("fresh", "stable", {"seed": 5}, 4)
    branch("further", "on", {"mixture": mixture(sources, web=0.2, math=0.8)}, 7, data="continue")
    return runs


def told_by_every_window(runs: dict[str, RunConfig], cache: Path, source: str, document: int) -> dict[str, list]:
    """(step, epoch) of each run that read a document: by looking at the windows of every step."""
    found = {}
    for name, run in runs.items():
        start = plan_start(run)
        last = start.first_window + run.steps * BATCH
        dataset = build_train_dataset(run.data, last, cache, start.blends)
        windows = [dataset.window(n) for n in range(start.first_window, last)]
        found[name] = [
            ((window.window - start.first_window) // BATCH + 1, window.epoch)
            for window in windows
            if window.source == source and document in window.documents
        ]
    return found


@pytest.mark.parametrize(("source", "document"), [("web", 7), ("web", 31), ("math", 3), ("math", 24)])
@pytest.mark.parametrize("asked", ["stable", "further"])
def test_who_names_the_steps_of_the_whole_family(family, sources, tmp_path, asked, source, document) -> None:
    truth = told_by_every_window(family, tmp_path / "cache", source, document)
    assert any(epoch for lines in truth.values() for _, epoch in lines) or source == "web"
    name = f"{source}/part-{document // 30}.jsonl:{document % 30 + 1}"
    found = who(family[asked].out, name)
    assert (found["source"], found["index"], found["document"]) == (source, document, name)
    assert {one["run"]: [(r["step"], r["epoch"]) for r in one["readings"]] for one in found["runs"]} == truth
    done = {"stable": 10, "on": 20, "fresh": 4, "further": 7}
    for one in found["runs"]:
        for reading in one["readings"]:
            assert reading["state"] == ("read" if reading["step"] <= done[one["run"]] else "planned")
            assert reading["tokens"] == (reading["step"] - 1) * STEP
    assert found == who(family[asked].out, number=document, source=source)


def test_a_branch_of_a_branch_knows_all_mixtures_before_it(family) -> None:
    assert [blend.first for blend in plan_start(family["on"]).blends] == [0, 24, 40]
    assert plan_start(family["further"]).blends == plan_start(family["on"]).blends, "it goes on within its parent's"
    assert [blend.first for blend in plan_start(family["fresh"]).blends] == [0]


def test_who_knows_steps_that_were_passed_over_and_sources_without_a_table(family, sources) -> None:
    out = family["stable"].out
    with pytest.raises(DataError, match="no source holds a document 'code/part-0.jsonl:1'; the tables of math, web"):
        who(out, "code/part-0.jsonl:1")
    found = next(one for one in who(out, number=4, source="code")["runs"] if one["run"] == "stable")
    step = found["readings"][0]["step"]
    (out / REWINDS).write_text(json.dumps([{"step": step, "why": "", "to": step - 1, "passed_over": [step]}]))
    found = who(out, number=4, source="code")
    assert found["document"] is None and found["tokens"] == read_index(sources / "code").lengths[4]
    mine = next(one for one in found["runs"] if one["run"] == "stable")
    assert {reading["state"] for reading in mine["readings"] if reading["step"] == step} == {"passed over"}
    assert next(one["note"] for one in found["runs"] if one["run"] == "on") == "does not read this source"
    assert all(not one["readings"] for one in who(out, number=0, source="web")["runs"]), "it has no tokens"


def test_who_looks_in_every_source_that_has_the_id(sources: Path, tmp_path: Path) -> None:
    """Two data directories may hold files of the same names, one read in the stable phase, one in the decay."""
    for name in ("web", "math"):
        (tmp_path / name).mkdir()
        for path in (bin_path, idx_path, docs_path):
            path(tmp_path / name / "text").write_bytes(path(sources / "web").read_bytes())
    both = {name: {"path": str(tmp_path / name / "text"), "weight": 0.5} for name in ("web", "math")}
    run = trained(run_of(tmp_path / "run", sources, data={"mixture": both}), 5)
    found = who(run.out, "web/part-0.jsonl:8")
    other = found["others"][0]
    assert [one["source"] for one in (found, *found["others"])] == ["math", "web"]
    windows = [{reading["window"] for reading in one["runs"][0]["readings"]} for one in (found, other)]
    assert all(windows) and not windows[0] & windows[1]
    assert who(run.out, "web/part-0.jsonl:8", source="web") == {**other, "others": []}
    shown = CliRunner().invoke(app, ["data", "who", "web/part-0.jsonl:8", "--run", str(run.out)]).output
    assert "document 7 of math\n" in shown and "document 7 of web\n" in shown


def test_who_reads_what_training_has_left_and_writes_nothing(family, tmp_path) -> None:
    run, before = family["stable"], who(family["stable"].out, "web/part-0.jsonl:8")
    build_train_dataset(run.data, run.steps * BATCH, run.out / "data-cache")
    tree = sorted(tmp_path.rglob("*"))
    assert who(run.out, "web/part-0.jsonl:8") == before
    assert sorted(tmp_path.rglob("*")) == tree


def test_who_on_the_command_line(family, sources, tmp_path) -> None:
    out = str(family["stable"].out)
    shown = CliRunner().invoke(app, ["data", "who", "web/part-0.jsonl:8", "--run", out])
    assert shown.exit_code == 0, shown.output
    lines = shown.output.splitlines()
    assert lines[0].startswith("web/part-0.jsonl:8: ") and "stable (stopped):" in lines
    assert any(line.startswith("  step ") and line.endswith(": read") for line in lines)
    for arguments, said in (
        ([], "name a document either by its id or by --index"),
        (["web/nowhere:1"], "no source holds a document 'web/nowhere:1'; the tables of math, web"),
        (["--index", "99", "--source", "web"], "document 99 of web"),
        (["--index", "9", "--source", "wbe"], "no source 'wbe' in 'stable'"),
        (["--index", "9"], "document 9 of which source?"),
        (["web/part-0.jsonl:8", "--source", "code"], "no table of documents"),
    ):
        refused = CliRunner().invoke(app, ["data", "who", *arguments, "--run", out])
        assert isinstance(refused.exception, OctoError) and said in str(refused.exception), refused.output
    refused = CliRunner().invoke(app, ["data", "who", "web/a:1", "--run", str(tmp_path / "none")])
    assert isinstance(refused.exception, OctoError)
