"""Files cleaned on their own: records as they are, accounts that add up, and what the command line says."""

from __future__ import annotations

import gzip
import json
import os
import re
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest
import zstandard
from clean_tools import config_of, questions, write_benchmark
from typer.testing import CliRunner, Result

from megatron_octo.cli.root import app
from megatron_octo.data.clean import files, stages
from megatron_octo.data.clean.files import clean_files
from megatron_octo.errors import ConfigError, DataError, OctoError

ASKED = questions(10, seed=9)


def _octo(*arguments: object) -> Result:
    found = CliRunner().invoke(app, ["data", *map(str, arguments)])
    if found.exception and not isinstance(found.exception, OctoError | SystemExit):
        raise found.exception
    return found


def _read(path: Path) -> list[dict[str, Any]]:
    with zstandard.open(path, "rt") as lines:
        return [json.loads(line) for line in lines]


def _inputs(folder: Path) -> list[str]:
    folder.mkdir()
    lines = ['{"text": "one",  "year": 1}', '{"text": "two \u00e9", "n": [1]}', '{"text": " ONE"}', "{"]
    (folder / "a.jsonl").write_text("\n".join(lines) + "\n")
    rows = [{"text": f"so: {ASKED[2]}"}, {"text": "three"}]
    with gzip.open(folder / "b.jsonl.gz", "wt") as file:
        file.write("".join(json.dumps(row) + "\r\n" for row in rows))
    table = pyarrow.table({"content": ["three", "four", "two e\u0301"], "score": [0.5, 1.5, 2.5]})
    pyarrow.parquet.write_table(table, folder / "c.parquet")
    return [str(folder / "a.jsonl"), str(folder / "b.jsonl.gz")]


@pytest.mark.timeout(60)
def test_dedup_over_files(tmp_path: Path) -> None:
    plain = _inputs(tmp_path / "in")
    against = f"made={tmp_path / 'made.jsonl'}"
    rows = [{"question": text, "answer": "1", "id": str(number)} for number, text in enumerate(ASKED)]
    (tmp_path / "made.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    refused = _octo("dedup", *plain, "--out", tmp_path / "out", "--against", against)
    assert isinstance(refused.exception, ConfigError) and "no known benchmark is named" in str(refused.exception)
    assert not (tmp_path / "out").exists()
    against = against.replace("made=", "gsm8k=")
    arguments = ("dedup", *plain, "--out", tmp_path / "out", "--against", against)
    refused = _octo(*arguments)
    assert isinstance(refused.exception, DataError) and "a.jsonl, line 4" in str(refused.exception)
    assert not (tmp_path / "out" / "manifest.json").exists()
    with pytest.raises(ConfigError, match="on_bad_line"):  # the directory is claimed for the strict rule
        raise _octo(*arguments, "--skip-bad").exception or AssertionError
    arguments = ("dedup", *plain, "--out", tmp_path / "lax", "--against", against, "--skip-bad")
    done = _octo(*arguments)
    assert done.exit_code == 0, done.exception
    assert not (tmp_path / "lax" / ".work").exists()
    assert done.output.splitlines()[0].startswith("a: 2 of 4 records kept; left out: ")
    assert done.output.splitlines()[1] == "b: 1 of 2 records kept; left out: 1 leak"
    assert _read(tmp_path / "lax/a/00000.jsonl.zst") == [{"text": "one", "year": 1}, {"text": "two \u00e9", "n": [1]}]
    assert _read(tmp_path / "lax/b/00000.jsonl.zst") == [{"text": "three"}]
    manifest = json.loads((tmp_path / "lax/manifest.json").read_text())
    for account in manifest["accounts"].values():
        left = sum(account["skipped"].values()) + sum(account["removed"].values())
        assert account["read"] == account["documents"] + left
    removals = [json.loads(line) for line in (tmp_path / "lax/removals.jsonl").read_text().splitlines()]
    assert [(r["document"], r["reason"], r["other"]) for r in removals] == [
        ("a/a.jsonl:3", "exact_duplicate", "a/a.jsonl:1"),
        ("b/b.jsonl.gz:1", "leak", "gsm8k/2"),
    ]
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "lax").rglob("*.zst")}
    assert _octo(*arguments).output == done.output
    assert {path: path.stat().st_mtime_ns for path in before} == before, "what is there is not made again"
    (tmp_path / "lax/removals.jsonl").write_text("")
    altered = _octo(*arguments).exception
    assert isinstance(altered, DataError) and "removals.jsonl is missing or was altered" in str(altered)


@pytest.mark.timeout(60)
def test_parquet_with_its_columns_and_a_kill(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _inputs(tmp_path / "in")
    folder = {"path": str(tmp_path / "in" / "b.jsonl.gz")}, {"path": str(tmp_path / "in" / "c.parquet")}
    corpora = {"b": folder[0], "c": {**folder[1], "fields": {"text": "content"}}}
    config = config_of(corpora=corpora, deduplicate={})
    whole = clean_files(config, tmp_path / "whole")
    assert _read(tmp_path / "whole/c/00000.jsonl.zst") == [
        {"content": "four", "score": 1.5},
        {"content": "two e\u0301", "score": 2.5},
    ]
    with monkeypatch.context() as patch:
        patch.setattr(files, "publish", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            clean_files(config, tmp_path / "again")
    assert not (tmp_path / "again/manifest.json").exists()
    assert clean_files(config, tmp_path / "again") == whole


@pytest.mark.timeout(60)
def test_what_was_read_of_another_file_counts_for_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A file is downloaded over itself while it is read: its hash is as before, what was read is not."""
    path, look = tmp_path / "a.jsonl", stages.look
    path.write_text("".join(json.dumps({"text": f"text {number}"}) + "\n" for number in range(60)))
    whole = path.read_bytes()

    def half(*given: Any) -> dict[str, Any]:
        path.write_bytes(b"".join(whole.splitlines(keepends=True)[:30]))
        try:
            return look(*given)
        finally:
            path.write_bytes(whole)

    config = config_of(corpora={"a": {"path": str(path)}}, deduplicate={})
    with monkeypatch.context() as patch:
        patch.setattr(stages, "look", half)
        with pytest.raises(DataError, match="changed while the build read it"):
            clean_files(config, tmp_path / "out")
    assert clean_files(config, tmp_path / "out")["accounts"]["a"]["read"] == 60


def test_what_the_manifest_vouches_for_is_on_the_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Files and the names of their directories, before there is a manifest; and nothing else stays."""
    path, flushed, fsync, out = tmp_path / "a.jsonl", set(), os.fsync, tmp_path / "out"
    path.write_text('{"text": "one"}\n{"text": "two"}\n{"text": "One"}\n')

    def noted(descriptor: int) -> None:
        fsync(descriptor)
        if not (out / "manifest.json").exists():
            whole = Path(f"/proc/self/fd/{descriptor}").readlink()
            flushed.add(re.sub(r"\.\w+\.(partial|tmp)$", "", "/".join(whole.parts[-2:])))

    monkeypatch.setattr(os, "fsync", noted)
    clean_files(config_of(corpora={"a": {"path": str(path)}}, deduplicate={}), out, workers=1)
    left = {str(path.relative_to(out)) for path in out.rglob("*")}
    assert left - {".lock"} == {"a", "a/00000.jsonl.zst", "manifest.json", "removals.jsonl"}
    assert {"a/00000.jsonl.zst", "result/a", "result/removals.jsonl", "result/.manifest.json"} <= flushed


def test_measure_prints_and_writes_the_table(tmp_path: Path) -> None:
    entry = write_benchmark(tmp_path / "test.jsonl", ASKED)
    mix = {"tokenizer": {"train": {"vocabulary_size": 300}}, "corpora": {"a": {"path": "a"}}}
    (tmp_path / "mix.yaml").write_text(json.dumps({**mix, "decontaminate": {"against": {"made": entry}}}))
    done = _octo("decontaminate", "--mix", tmp_path / "mix.yaml", "--measure", "--out", tmp_path / "out", "--sample", 4)
    assert done.exit_code == 0 and "recall: verbatim 1.0000, rewrapped 1.0000" in done.output
    facts = json.loads((tmp_path / "out/recall.json").read_text())
    assert facts["leaks"]["verbatim"]["made"] == {"planted": 4, "found": 4}
    (tmp_path / "none.yaml").write_text(json.dumps(mix))
    for arguments, message in (
        (("decontaminate",), "give --against or --mix"),
        (("decontaminate", "--against", "x=y"), "nothing to do"),
        (("decontaminate", "--against", "x", "--measure"), "'x'; it has the form NAME=VALUE"),
        (("decontaminate", "--against", "gsm8k=/no/such", "--measure"), "/no/such is not there"),
        (("decontaminate", "a.jsonl", "--against", "gsm8k=y"), "--out is missing"),
        (("decontaminate", "--mix", tmp_path / "none.yaml", "--measure"), "says nothing of decontaminate"),
    ):
        refused = _octo(*arguments).exception
        assert isinstance(refused, OctoError) and message in str(refused), (arguments, refused)


@pytest.mark.timeout(60)
def test_paths_of_the_command_line_get_names_and_count_once(tmp_path: Path) -> None:
    names = ["web", "part_0002_\u00fcn\u00ef", "\u6587\u66f8", "\u6587", "_", "a b"]
    paths = [tmp_path / f"{name}.jsonl" for name in names]
    for number, path in enumerate(paths):
        path.write_text(f'{{"text": "text number {number}"}}\n')
    (tmp_path / "x").mkdir()
    (tmp_path / "x" / "web.jsonl").write_text('{"text": "another"}\n')
    done = _octo("dedup", *paths, f"web={tmp_path}/x", "--out", tmp_path / "out", "--json")
    assert done.exit_code == 0, done.exception
    made = ["web-2", "part_0002_n", "files", "files-2", "files-3", "a_b", "web"]
    assert list(json.loads(done.stdout)["accounts"]) == made
    for twice in ([f"a={paths[0]}", f"b={paths[0]}"], [paths[0], paths[0]], [paths[0], f"{tmp_path}/./web.jsonl"]):
        found = _octo("dedup", *twice, "--out", tmp_path / "twice")
        assert isinstance(found.exception, DataError) and "both read" in found.exception.what
    found = _octo("dedup", f"a={paths[0]}", f"a={paths[1]}", "--out", tmp_path / "twice")
    assert isinstance(found.exception, ConfigError) and "a= names two of the paths" in found.exception.what
    assert not (tmp_path / "twice").exists()


@pytest.mark.timeout(60)
def test_a_file_of_another_name_is_named_by_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Renamed between two starts, as old as it was: what others are copies of has its new name in all files."""
    (tmp_path / "in").mkdir()
    for name in ("a", "z"):
        (tmp_path / "in" / f"{name}.jsonl").write_text('{"text": "one"}\n')
    config = config_of(corpora={"c": {"path": str(tmp_path / "in")}}, deduplicate={})
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(files, "publish", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        clean_files(config, tmp_path / "out")
    (tmp_path / "in" / "a.jsonl").rename(tmp_path / "in" / "b.jsonl")
    clean_files(config, tmp_path / "out")
    (removal,) = map(json.loads, (tmp_path / "out/removals.jsonl").read_text().splitlines())
    assert (removal["document"], removal["other"]) == ("c/z.jsonl:1", "c/b.jsonl:1")


@pytest.mark.timeout(60)
@pytest.mark.parametrize("bad_line", ["strict", "skip"])
def test_a_row_that_cannot_be_written_is_refused(tmp_path: Path, bad_line: str) -> None:
    """Its text is sound, so that it is kept; another column is not UTF-8, and no line of JSON holds it."""
    broken = pyarrow.array([b"fine", b"\xff", b"fine"]).view(pyarrow.string())
    table = pyarrow.table({"text": ["one", "two", "One"], "url": broken})
    pyarrow.parquet.write_table(table, tmp_path / "a.parquet")
    config = config_of(corpora={"a": {"path": str(tmp_path / "a.parquet")}}, deduplicate={}, on_bad_line=bad_line)
    with pytest.raises(DataError, match="a.parquet, row 2: not UTF-8 at byte 1 of 'url'"):
        clean_files(config, tmp_path / "out")
    assert not list((tmp_path / "out").rglob("*.jsonl.zst"))


def test_records_that_are_not_there_are_missed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": "one"}\n{"text": "two"}\n')
    config, records = config_of(corpora={"a": {"path": str(tmp_path / "a.jsonl")}}, deduplicate={}), files._records
    monkeypatch.setattr(files, "_records", lambda shard: list(records(shard))[:1])
    with pytest.raises(DataError, match="a.jsonl: 1 records are there of 2 that are to be written"):
        clean_files(config, tmp_path / "out", workers=1)
