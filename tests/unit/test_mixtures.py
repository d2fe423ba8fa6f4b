"""Mixtures over a run's life: what replaces a missing source, may change, is forecast, and tells a dataset."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
import yaml
from mixture_tools import BATCH, LENGTH, STEP, STEPS, data_of, mixture, run_of, trained, values, write_sources
from typer.testing import CliRunner

from megatron_octo.cli.root import app
from megatron_octo.config.blends import blends_of
from megatron_octo.config.load import parse_config, read_yaml
from megatron_octo.config.mixture import DataConfig
from megatron_octo.config.run import RunConfig
from megatron_octo.data.index.digest import spot_digest
from megatron_octo.data.index.pairs import bin_path, idx_path, read_index
from megatron_octo.data.index.table import TableWriter, docs_path
from megatron_octo.data.index.writer import write_indexed
from megatron_octo.data.mix.identity import content_digest
from megatron_octo.data.mix.order import order
from megatron_octo.data.mix.reader import build_train_dataset
from megatron_octo.data.mix.replace import decide
from megatron_octo.errors import ConfigError, DataError, OctoError
from megatron_octo.files import hash_file
from megatron_octo.train.api import load_run
from megatron_octo.train.describe import describe_run
from megatron_octo.train.forecast import forecast_file
from megatron_octo.train.start import CONFIG, plan_start


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_sources(tmp_path_factory.mktemp("sources"))


HERE = Path("here")


@pytest.mark.parametrize(
    ("more", "said"),
    [
        ({"mixture": mixture(HERE, web=0.7, math=0.2)}, "these to 0.9; scaled to 1 they are web: 0.777777778"),
        ({"mixture": mixture(HERE, web=0.7, math=0.299998)}, "these to 0.999998"),
        ({"phases": [{"at": 0, "mixture": mixture(HERE, web=1)}]}, "greater than 0"),
        ({"phases": [{"at": 99, "mixture": mixture(HERE, web=0.5)}]}, "data: phases.0.mixture; weights are shares"),
        ({"phases": [{"at": at, "mixture": mixture(HERE, web=1)} for at in (33, 34)]}, "each at least a window after"),
        ({"phases": [{"at": 64, "mixture": mixture(Path("there"), web=1)}]}, "is here/web in one mixture and"),
        ({"phases": [{"at": 64, "mixture": {"x": {"path": "here/../here/web", "weight": 1}}}]}, "are the same dataset"),
        ({"replace": {"mth": "web"}}, "replace names 'mth', which no mixture holds"),
        ({"replace": {"math": "code"}}, "math -> code: a mixture with math does not hold code"),
        ({"replace": {"math": "web", "web": "math"}}, "goes round in a circle"),
        ({"replaced": {"math": "web"}}, "replaced names 'math', which a mixture holds"),
    ],
)  # fmt: skip
def test_a_mixture_that_cannot_be_is_refused(more: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError) as refused:
        data_of(HERE, **more)
    assert said in str(refused.value)


def test_weights_a_hair_from_one_are_taken() -> None:
    assert sum(blends_of(data_of(HERE, mixture=mixture(HERE, web=0.7, math=0.2999995)))[0].weights.values()) == 1


def test_a_phase_after_the_end_is_refused(sources: Path, tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    phases = [{"at": STEPS * STEP, "mixture": mixture(sources, web=1)}]
    path.write_text(yaml.safe_dump(values(tmp_path / "run", sources, data={"phases": phases})))
    with pytest.raises(ConfigError, match=r"data.phases.0.at = 1280 is not before the end, schedule.tokens = 1280"):
        load_run(path)


# -- what replaces a missing source


def replacing(folder: Path, **more: Any) -> dict[str, Any]:
    later = [{"at": 320, "mixture": mixture(folder, math=0.4, gone=0.6)}]
    rules = {"gone": "math"}
    return {"mixture": mixture(folder, web=0.5, math=0.3, gone=0.2), "phases": later, "replace": rules} | more


def weights_of(data: DataConfig) -> list[dict[str, float]]:
    return [{name: round(source.weight, 9) for name, source in mixed.items()} for _, mixed in data.mixtures]


def test_a_missing_source_is_replaced_in_every_mixture(sources: Path) -> None:
    data = decide(data_of(sources, **replacing(sources)))
    assert weights_of(data) == [{"web": 0.5, "math": 0.5}, {"math": 1.0}]
    assert (data.replace, data.replaced) == (None, {"gone": "math"})
    assert decide(data) == data, "once for all"


def test_replacements_follow_one_another_and_only_the_missing_ones_count(sources: Path) -> None:
    mixed = mixture(sources, web=0.5, math=0.2, gone=0.2, away=0.1)
    data = decide(data_of(sources, mixture=mixed, replace={"away": "gone", "gone": "math", "math": "web"}))
    assert weights_of(data) == [{"web": 0.5, "math": 0.5}]
    assert (data.replace, data.replaced) == ({"math": "web"}, {"away": "math", "gone": "math"})


def test_where_no_source_is_there_none_is_missing() -> None:
    data = data_of(HERE, **replacing(HERE))
    assert decide(data) == data


def test_what_was_decided_at_the_start_holds(sources: Path, tmp_path: Path) -> None:
    for name in ("web", "math"):
        for path in (bin_path, idx_path):
            os.link(path(sources / name), path(tmp_path / name))
    run = run_of(tmp_path / "run", sources, data=replacing(tmp_path))
    trained(run, 3)
    stored = parse_config(RunConfig, read_yaml(run.out / CONFIG), "config.yaml")
    assert (stored.data.replaced, set(stored.data.paths)) == ({"gone": "math"}, {"web", "math"})
    header = describe_run(stored, 3, 20)
    assert "gone was missing when the run began: math has its weight" in header
    assert "from 320 tokens on: math 1" in header
    for path in (bin_path, idx_path):  # what was missing turns up: this run does not begin to read it
        os.link(path(sources / "code"), path(tmp_path / "gone"))
    assert plan_start(run).run == stored
    assert plan_start(stored).run == stored, "the resolved file goes on as well"
    with pytest.raises(ConfigError, match="data.mixture.gone: None -> "):
        plan_start(run.model_copy(update={"data": run.data.model_copy(update={"replace": None})}))
    anew = plan_start(run.model_copy(update={"out": tmp_path / "anew"})).run
    assert "gone" in anew.data.mixture and anew.data.replaced is None


def test_what_is_missing_and_not_replaced_is_an_error(sources: Path, tmp_path: Path) -> None:
    data = decide(data_of(sources, mixture=mixture(sources, web=0.5, gone=0.5)))
    with pytest.raises(DataError, match=r"gone.bin does not exist"):
        build_train_dataset(data, 4, tmp_path)


# -- what may change once a run has taken steps


@pytest.mark.parametrize(("at", "refused"), [(5 * STEP, False), (5 * STEP - 1, False), (4 * STEP, True), (1, True)])
def test_a_mixture_may_change_only_where_the_run_stands_or_later(
    sources: Path, tmp_path: Path, at: int, refused: bool
) -> None:
    """A position is rounded up to a window, so one within the last window read begins with the next."""
    run = run_of(tmp_path / "run", sources)
    trained(run, 5)
    phases = [{"at": at, "mixture": mixture(sources, code=1)}]
    changed = run_of(tmp_path / "run", sources, data={"phases": phases})
    if refused:
        with pytest.raises(ConfigError, match=r"other mixtures: data.phases: None -> .*320 tokens of it are read"):
            plan_start(changed)
    else:
        assert plan_start(changed).blends[1:] == [(20, {"code": 1.0})]


def test_a_phase_that_has_begun_stays(sources: Path, tmp_path: Path) -> None:
    phases = [
        {"at": 2 * STEP, "mixture": mixture(sources, code=1)},
        {"at": 9 * STEP, "mixture": mixture(sources, web=1)},
    ]
    run = run_of(tmp_path / "run", sources, data={"phases": phases})
    trained(run, 5)
    plan_start(run_of(tmp_path / "run", sources, data={"phases": phases[:1]}))
    replaced = [{**phases[0], "mixture": {"code": {"path": str(sources / "other"), "weight": 1}}}]
    for other in (phases[1:], replaced):
        with pytest.raises(ConfigError, match="other mixtures"):
            plan_start(run_of(tmp_path / "run", sources, data={"phases": other}))


@pytest.mark.parametrize("copied", [False, True])
def test_a_dataset_that_was_read_does_not_come_again_under_another_name(
    sources: Path, tmp_path: Path, copied: bool
) -> None:
    """Neither in a branch nor in a later phase: by its path, or as a copy of it."""
    if copied:
        for path in (idx_path(sources / "web"), bin_path(sources / "web")):
            (tmp_path / path.name.replace("web", "copy")).write_bytes(path.read_bytes())
    again = {"web2": {"path": str(tmp_path / "copy" if copied else sources / "web"), "weight": 1}}
    parent = run_of(tmp_path / "stable", sources)
    trained(parent, 5, data={name: content_digest(read_index(sources / name)) for name in ("web", "math")})
    start = {"fork": {"parent": str(parent.out), "data": "continue"}}
    with pytest.raises(ConfigError, match=r"calls web2 \(.*\) what 'stable' has read as web.*call it web again"):
        plan_start(run_of(tmp_path / "on", sources, start=start, data={"mixture": again}))
    fresh = {"fork": {"parent": str(parent.out)}}
    plan_start(run_of(tmp_path / "fresh", sources, start=fresh, data={"mixture": again}))
    plan_start(run_of(tmp_path / "new", sources, start=start, data={"mixture": mixture(sources, code=1)}))
    if copied:
        with pytest.raises(ConfigError, match="has read as web"):
            plan_start(run_of(parent.out, sources, data={"phases": [{"at": 9 * STEP, "mixture": again}]}))


# -- the forecast


def test_a_forecast_says_what_is_dealt(sources: Path, tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    phases = [{"at": 12 * STEP, "mixture": mixture(sources, math=0.5, code=0.5)}]
    path.write_text(yaml.safe_dump(values(tmp_path / "run", sources, data={"phases": phases})))
    assert forecast_file(path)["windows"] == STEPS * BATCH
    found = forecast_file(path, 400 * LENGTH)
    assert (found["tokens"], found["windows"]) == (400 * LENGTH, 400)
    dealt = order(blends_of(load_run(path).data), 400)
    for row in found["sources"]:
        mine, tokens = dealt.windows_of(row["source"]), read_index(sources / row["source"]).tokens
        each = (tokens - 1) // LENGTH
        assert (row["size"], row["known"]) == (tokens, "index")
        assert abs(row["windows"] - len(mine)) <= 3 and row["tokens"] == row["windows"] * LENGTH
        assert row["passes"] == pytest.approx(len(mine) / each, abs=3 / each)
        if len(mine) < each:
            assert row["exhausted"] is None
        else:
            assert abs(row["exhausted"] - (mine[each - 1] + 1) * LENGTH) <= 4 * LENGTH
    assert any(row["exhausted"] for row in found["sources"]) and not all(row["exhausted"] for row in found["sources"])


def test_a_branch_that_reads_on_is_forecast_after_what_its_parent_read(sources: Path, tmp_path: Path) -> None:
    parent = trained(run_of(tmp_path / "stable", sources), 10)
    path, start = tmp_path / "branch.yaml", {"fork": {"parent": str(parent.out), "data": "continue"}}
    path.write_text(yaml.safe_dump(values(tmp_path / "branch", sources, start=start)))
    on, own = forecast_file(path), forecast_file(path, overrides=["start.fork.data=fresh"])
    for mine, alone in zip(on["sources"], own["sources"], strict=True):
        assert mine["windows"] == alone["windows"] and mine["passes"] > alone["passes"]
    lost = forecast_file(path, overrides=[f"start.fork.parent={tmp_path / 'lost'}"])
    assert lost["sources"] == own["sources"] and "cannot be seen" in lost["notes"][0]


def test_published_sizes_stand_in_for_data_that_is_not_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    found = forecast_file(Path("recipes/mixtures/stable.yaml"), 200 * 10**9)
    rows = {row["source"]: row for row in found["sources"]}
    passes = {name: round(row["passes"], 2) for name, row in rows.items() if name != "dclm_baseline"}
    assert passes == {
        "megamath_web_pro_max": 1.96, "megamath_text_code": 0.40, "megamath_qa": 1.68, "megamath_code": 0.09,
        "megamath_translated_code": 0.35,
    }  # fmt: skip
    assert {row["known"] for row in rows.values()} == {"published"}
    assert rows["megamath_web_pro_max"]["exhausted"] == pytest.approx(73.8e9 / 0.725, rel=1e-6)
    assert found["replaced"] == {} and any("megamath-code cannot be read" in note for note in found["notes"])
    (tmp_path / "data").mkdir()
    write_indexed(tmp_path / "data" / "megamath_qa", [[1] * 9000], 91)
    partly = forecast_file(Path("recipes/mixtures/stable.yaml"), 10**6)
    assert partly["replaced"] == {"megamath_code": "megamath_translated_code"}
    assert "megamath_code is missing: megamath_translated_code takes its weight" in partly["notes"]
    assert any("dclm_baseline is missing" in note and "would be refused" in note for note in partly["notes"])


def test_the_forecast_on_the_command_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    shown = CliRunner().invoke(app, ["data", "forecast", "recipes/mixtures/long.yaml", "--tokens", "20B"])
    assert shown.exit_code == 0, shown.output
    line = next(line for line in shown.output.splitlines() if line.startswith("openr1_math_220k"))
    assert line.split() == ["openr1_math_220k", "15.00%", "3B", "366,211", "1.05B", "published", "2.86", "7B", "tokens"]
    plain = CliRunner().invoke(app, ["data", "forecast", "recipes/mixtures/long.yaml", "--tokens", "20B", "--json"])
    assert json.loads(plain.output)["windows"] == 2_441_407
    for arguments, said in (
        (["recipes/mixtures/long.yaml"], "is a mixture and no run"),
        (["recipes/mixtures/long.yaml", "--tokens", "some"], "--tokens: 'some'"),
        (["nowhere.yaml", "--tokens", "1B"], "nowhere.yaml: no such file"),
    ):
        refused = CliRunner().invoke(app, ["data", "forecast", *arguments])
        assert isinstance(refused.exception, OctoError) and said in str(refused.exception)


# -- what tells a dataset


def test_the_manifests_hash_is_taken_while_its_files_are_as_it_says(tmp_path: Path) -> None:
    """Told by a hash that is wrong: where it may be believed it comes back, and the file is not read."""
    import numpy as np

    from megatron_octo.data.index.table import histogram_path, pair_files, save_histogram

    prefix = tmp_path / "web"
    write_indexed(prefix, [*[[1, 2, 3]] * 8, [1, 2, 3, 4]], 91)
    TableWriter().write(docs_path(prefix))
    save_histogram(histogram_path(prefix), np.zeros(91, np.int64))
    facts = {"documents": 9, "tokens": 28, "bytes": sum(path.stat().st_size for path in pair_files(prefix))}
    facts["spot"] = spot_digest(idx_path(prefix))
    manifest = tmp_path / "manifest.json"
    manifest.write_text(json.dumps({"sources": {"web": {**facts, "sha256": {"web.idx": "stated"}}}}))
    index, real = read_index(prefix), hash_file(idx_path(prefix))
    assert content_digest(index)["index"] == "stated"
    later = manifest.stat().st_mtime_ns + 10**9
    os.utime(idx_path(prefix), ns=(later, later))
    assert content_digest(index)["index"] == real, "written after the manifest"
    os.utime(manifest, ns=(later, later))
    assert content_digest(index)["index"] == "stated"
    write_indexed(tmp_path / "older", [[1, 2, 3, 4], *[[1, 2, 3]] * 8], 91)
    kept = idx_path(prefix).read_bytes()
    idx_path(prefix).write_bytes(idx_path(tmp_path / "older").read_bytes())
    os.utime(idx_path(prefix), ns=(1, 1))
    other = read_index(prefix)
    assert content_digest(other)["index"] == hash_file(idx_path(prefix)), "the same documents in another order"
    idx_path(prefix).write_bytes(kept)
    os.utime(idx_path(prefix), ns=(1, 1))
    docs_path(prefix).write_bytes(b"longer than it was when the manifest was written")
    assert content_digest(index)["index"] == real
    manifest.unlink()
    assert content_digest(index)["index"] == real


def test_what_one_process_has_checked_the_others_only_map(
    sources: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With its digests known a dataset is opened without a look at its documents, and is the same."""
    from megatron_octo.data.index import pairs
    from megatron_octo.data.mix import identity

    data = data_of(sources)
    first = build_train_dataset(data, 40, tmp_path)

    def refuse(*_: Any) -> None:
        raise AssertionError("read again")

    monkeypatch.setattr(pairs, "_check_documents", refuse)
    monkeypatch.setattr(identity, "hash_file", refuse)
    other = build_train_dataset(data, 40, tmp_path, known=first.digests)
    assert other.digests == first.digests and other.facts == first.facts
    assert all(other[n]["tokens"].equal(first[n]["tokens"]) for n in range(40))
    with pytest.raises(AssertionError, match="read again"):
        build_train_dataset(data, 40, tmp_path)
