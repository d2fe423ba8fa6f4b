"""Whole curations against a server with known answers: what comes out, accounts, and a kill in the middle."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "unit"))
from curate_tools import Reply, Request, either, good, judged, refined, serving, settings, text_of, write_corpus
from typer.testing import CliRunner

from megatron_octo.cli.root import app
from megatron_octo.config.curate import CurateConfig
from megatron_octo.config.data import Inputs
from megatron_octo.config.load import parse_config
from megatron_octo.data.corpora.read import ShardReader
from megatron_octo.data.corpora.shard import list_shards
from megatron_octo.data.curate.parts import read_documents
from megatron_octo.data.curate.run import curate
from megatron_octo.errors import ConfigError, DataError
from megatron_octo.files import hash_file, hold, write_json

DOCUMENTS = 800
TREE = ("answers", "classifier", "corpus", "judged", "manifest.json")


def answer(request: Request, times: int) -> Reply:
    """Mostly as it should be; some documents have answers of other kinds, every time."""
    number = request.document
    if "Final score" in request.message:
        if number % 100 == 7:
            return Reply("I would rather not say.")
        if number % 200 == 11:
            return Reply(status=400, body={"error": {"message": f"context of document {number}"}})
        return judged(request)
    cut = Reply("x", finish="length")
    kinds = {3: Reply("Too short."), 4: Reply("I'm sorry, I cannot do that."), 5: Reply(""), 6: cut}
    return kinds.get(number % 50) or refined(request)


def config(folder: Path, server: Any = None, **changes: Any) -> CurateConfig:
    return parse_config(CurateConfig, settings(folder, server, **changes), "file.yaml")


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """One whole curation: its directory, its corpora, its manifest, and what was asked."""
    folder = tmp_path_factory.mktemp("curation")
    write_corpus(folder / "in", DOCUMENTS)
    with serving(answer) as server:
        manifest = curate(config(folder / "in", server), folder / "out", workers=2)
        assert curate(config(folder / "in", server), folder / "out") == manifest
    return folder, manifest, server


@pytest.mark.timeout(280)
def test_every_document_is_accounted_for(whole: Any) -> None:
    _, manifest, server = whole
    steps = manifest["steps"]
    judge, train, classify, refine = (steps[name] for name in ("judge", "train", "classify", "refine"))
    assert steps["sample"]["documents"] == judge["documents"] == DOCUMENTS
    assert judge["unscored"] == {"no final score line": 8} and judge["rejected"] == {"HTTP 400": 4}
    assert sum(judge["scores"].values()) + 8 + 4 == DOCUMENTS
    used = sum(sum(train[name].values()) for name in ("trained", "held_out"))
    assert used + train["left_out_to_balance"] + train["without_words"] == DOCUMENTS - 8 - 4
    assert train["trained"]["positive"] == train["trained"]["negative"] and train["failed_tries"] == 0
    assert train["threshold"] == 0.4 and train["f1"] > 0.85 and len(train["curve"]) == 19
    assert classify["kept"] + classify["below_threshold"] == classify["accounts"]["documents"] == DOCUMENTS
    assert sum(classify["histogram"]) == DOCUMENTS and classify["accounts"]["read"] == DOCUMENTS + 1
    assert refine["documents"] == classify["kept"] == refine["kept"] + sum(refine["rejected"].values())
    assert set(refine["rejected"]) == {"too short", "refusal", "empty answer", "cut off at max_tokens"}
    assert len(server.requests) == DOCUMENTS + classify["kept"]
    assert judge["tokens_in"] == sum(
        len(request.message) // 4 for request in server.requests if "Final score" in request.message
        and request.document % 200 != 11
    )  # fmt: skip


def test_the_result_is_a_corpus_that_leads_back_to_its_sources(whole: Any) -> None:
    folder, manifest, _ = whole
    records = [record for path in sorted((folder / "out" / "corpus").iterdir()) for record in read_documents(path)]
    assert len(records) == manifest["steps"]["refine"]["kept"]
    sources = {}
    inputs = Inputs.model_validate({"corpora": {"web": {"path": str(folder / "in")}}, "on_bad_line": "skip"})
    for shard in list_shards(inputs, "web"):
        sources |= {document.id: document.text for document in ShardReader(inputs, shard)}
    assert all(record["text"] == sources[record["id"]].upper() and record["score"] >= 0.4 for record in records)
    kept = {int(record["text"].split()[1]) for record in records}
    assert sum(good(number) for number in kept) / len(kept) > 0.8
    again = Inputs.model_validate({"corpora": {"max": {"path": str(folder / "out" / "corpus")}}})
    found = [document for shard in list_shards(again, "max") for document in ShardReader(again, shard)]
    assert [document.text for document in found] == [record["text"] for record in records]


def test_the_directory_holds_what_the_manifest_says(whole: Any) -> None:
    folder, manifest, _ = whole
    assert sorted(path.name for path in (folder / "out").iterdir() if not path.name.startswith(".")) == sorted(TREE)
    files = {path.relative_to(folder / "out").as_posix() for name in ("classifier", "corpus", "judged")
             for path in (folder / "out" / name).rglob("*") if path.is_file()}  # fmt: skip
    assert files == set(manifest["files"])
    assert all(hash_file(folder / "out" / name) == facts["sha256"] for name, facts in manifest["files"].items())
    report = json.loads((folder / "out" / "classifier" / "report.json").read_text())
    assert report["f1"] == manifest["steps"]["train"]["f1"]


def test_a_finished_directory_is_kept_from_other_settings_and_inputs(whole: Any, tmp_path: Path) -> None:
    folder, manifest, server = whole
    out, asked = folder / "out", len(server.requests)
    with pytest.raises(ConfigError, match="holds another curation: settings.classify.threshold: 0.4 -> 0.5"):
        curate(config(folder / "in", server, classify={"threshold": 0.5}), out)
    press = {"concurrency": 3, "url": "http://elsewhere/v1", "model": "judge-70b"}
    assert curate(config(folder / "in", None, endpoint=press), out) == manifest
    with pytest.raises(ConfigError, match="asked.judge.model: 'judge-70b' -> 'other'"):
        curate(config(folder / "in", None, endpoint={**press, "model": "other"}), out)
    copy = tmp_path / "out"
    shutil.copytree(out, copy)
    (path,) = list((copy / "corpus").glob("00000*"))
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(DataError, match="00000.jsonl.zst is not what the manifest says.*answers are kept"):
        curate(config(folder / "in", server), copy)
    (copy / "manifest.json").unlink()
    with serving(answer) as other:
        assert curate(config(folder / "in", other), copy) == manifest and not other.requests
    assert len(server.requests) == asked


RUN = """
import sys
from pathlib import Path
from typer.testing import CliRunner

from megatron_octo.cli.root import app
from megatron_octo.config.curate import CurateConfig
from megatron_octo.config.load import load_config
from megatron_octo.data.curate.run import curate
curate(load_config(CurateConfig, Path(sys.argv[1])), Path(sys.argv[2]))
"""


@pytest.mark.slow
@pytest.mark.timeout(280)
def test_a_killed_curation_asks_no_question_twice(whole: Any, tmp_path: Path) -> None:
    """Killed while it judges and while it refines; what is asked twice was under way, and the bytes are the same."""
    folder, manifest, _ = whole
    slow = 0.004
    with serving(lambda request, times: _slower(answer(request, times), slow)) as server:
        file = tmp_path / "curation.yaml"
        write_json(file, settings(folder / "in", server))  # JSON is YAML
        command = [sys.executable, "-c", RUN, str(file), str(tmp_path / "out")]
        under_way = 0
        for limit in (200, DOCUMENTS + 80, 10**9):
            process = subprocess.Popen(command, stderr=subprocess.PIPE, env={**os.environ, "COLUMNS": "100"})
            while process.poll() is None and len(server.requests) < limit:
                time.sleep(0.01)
            if limit < 10**9:
                assert process.poll() is None
                process.send_signal(signal.SIGKILL)
                under_way += 8
            process.communicate(timeout=60)
        assert process.returncode == 0
    made = json.loads((tmp_path / "out" / "manifest.json").read_text())
    assert made["files"] == manifest["files"] and made["steps"] == manifest["steps"]
    kinds = [("Final score" in request.message, request.document) for request in server.requests]
    twice = [key for key, count in Counter(kinds).items() if count > 1]
    assert len(twice) <= under_way and len(kinds) <= len(set(kinds)) + under_way


def _slower(reply: Reply, seconds: float) -> Reply:
    reply.seconds = seconds
    return reply


@pytest.mark.timeout(280)
def test_steps_one_by_one_and_a_changed_threshold(whole: Any, tmp_path: Path) -> None:
    """Each step goes on from the one before; another threshold asks nothing again but what it adds."""
    folder, manifest, _ = whole
    shutil.copytree(folder / "out" / "answers", tmp_path / "out" / "answers")
    with serving(either) as server:
        for step in ("sample", "judge", "train"):
            found = curate(config(folder / "in", server), tmp_path / "out", until=step)
            assert list(found)[-1] == step and not (tmp_path / "out" / "manifest.json").exists()
        assert found["train"] == manifest["steps"]["train"]
        assert not server.requests
        (tmp_path / "out" / ".work" / "result" / "corpus").mkdir()
        (tmp_path / "out" / ".work" / "result" / "corpus" / "00009.jsonl.zst").write_text("of other settings")
        lower = curate(config(folder / "in", server, classify={"threshold": 0.05}), tmp_path / "out")
    assert not (tmp_path / "out" / "corpus" / "00009.jsonl.zst").exists() and not (tmp_path / "out" / ".work").exists()
    classify = lower["steps"]["classify"]
    assert classify["kept"] > manifest["steps"]["classify"]["kept"]
    assert len(server.requests) == classify["kept"] - manifest["steps"]["classify"]["kept"]


def test_without_refinement_the_kept_documents_are_the_corpus_and_a_named_classifier_does(
    whole: Any, tmp_path: Path
) -> None:
    folder, manifest, _ = whole
    model = folder / "out" / "classifier" / "model.bin"
    only = dict.fromkeys(("sample", "judge", "train", "refine", "endpoint"))
    changes = {**only, "classify": {"model": str(model)}}
    made = curate(config(folder / "in", None, **changes), tmp_path / "out")
    assert made["steps"]["keep"]["documents"] == manifest["steps"]["classify"]["kept"]
    records = [record for path in sorted((tmp_path / "out" / "corpus").iterdir()) for record in read_documents(path)]
    assert all(record["text"] == text_of(int(record["text"].split()[1])) for record in records)
    (tmp_path / "bad.jsonl").write_text('{"text": "cart shipping discount login cart football"}\n')
    with pytest.raises(DataError, match="nothing is kept.*classify: 1"):
        curate(config(tmp_path / "bad.jsonl", None, **changes), tmp_path / "none")
    with pytest.raises(DataError, match="classify.model: .*nowhere.bin is no file"):
        curate(config(folder / "in", None, **only, classify={"model": "nowhere.bin"}), tmp_path / "none")


def test_a_judge_that_likes_everything(whole: Any, tmp_path: Path) -> None:
    folder, _, _ = whole
    few = {"documents_per_year": 20, "year_field": "timestamp"}
    words = "has 5[0-9] positive and 0 negative documents to learn from"
    with serving(lambda *_: Reply("Final score: 5")) as server, pytest.raises(DataError, match=words):
        curate(config(folder / "in", server, sample=few), tmp_path / "out")
    assert len(server.requests) == 62


def test_the_command(whole: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Steps, facts for people and machines, one line for a mistake; a sample needs no key."""
    folder, _, _ = whole
    file, out = tmp_path / "curation.yaml", tmp_path / "out"
    monkeypatch.delenv("SOME_KEY", raising=False)
    only = dict.fromkeys(("train", "classify", "refine"))
    few = {"documents_per_year": 20, "year_field": "timestamp"}
    with serving(either) as server:
        values = settings(folder / "in", server, **only, sample=few)
        values["endpoint"]["key_variable"] = "SOME_KEY"
        write_json(file, values)
        said = _octo(file, out, "--step", "sample")
        assert said.output.startswith("sample: read 801, documents 62, skipped (field 'text' is empty 1), years (")
        assert isinstance(_octo(file, out).exception, ConfigError) and not server.requests
        monkeypatch.setenv("SOME_KEY", "sk-abc123")
        facts = json.loads(_octo(file, out, "--json").stdout)
        assert facts["judge"]["documents"] == 62 == len(server.requests)
    assert all(b"abc123" not in path.read_bytes() for path in out.rglob("*") if path.is_file())
    assert str(_octo(tmp_path / "none.yaml", out).exception).startswith(f"{tmp_path / 'none.yaml'}: no such file")


def test_a_key_of_the_last_step_is_missed_before_the_first(
    whole: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, _, _ = whole
    monkeypatch.delenv("OTHER_KEY", raising=False)
    with serving(either) as server:
        other = {"endpoint": {"url": server.url, "model": "m", "key_variable": "OTHER_KEY"}}
        with pytest.raises(ConfigError, match="variable OTHER_KEY is not set"):
            curate(config(folder / "in", server, refine=other), tmp_path / "out")
    assert not server.requests


def _octo(file: Path, out: Path, *options: str) -> Any:
    return CliRunner().invoke(app, ["data", "curate", str(file), "--out", str(out), *options])


def test_an_input_that_changes(tmp_path: Path) -> None:
    """Between two runs: what followed from the old file is made anew. During one: refused. Two at a time: refused."""
    write_corpus(tmp_path / "in", 60)
    only = dict.fromkeys(("train", "classify", "refine"))
    lines, out = tmp_path / "in" / "a.jsonl.gz", tmp_path / "out"
    with serving(judged) as server:
        curate(config(tmp_path / "in", server, **only), out, until="sample")
        before = lines.read_bytes()
        write_corpus(tmp_path / "in", 40)
        shorter = curate(config(tmp_path / "in", server, **only), out, until="sample")
        assert shorter["sample"]["documents"] == 40

    def change(request: Request, times: int) -> Reply:
        lines.write_bytes(before)
        return judged(request)

    with serving(change) as server, pytest.raises(DataError, match="a.jsonl.gz changed while the build read it"):
        curate(config(tmp_path / "in", server, **only), out)
    assert not (out / "manifest.json").exists()
    with hold(out), pytest.raises(DataError, match="is being written by another process"):
        curate(config(tmp_path / "in", None, **only), out)
