"""Files that are cut, empty, there twice, or in the way of a result: refused, or told before the work."""

from __future__ import annotations

import gzip
import json
import os
from pathlib import Path
from typing import Any

import pytest
from corpora_tools import config_of, read, write_rows

from megatron_octo.config.curate import CurateConfig
from megatron_octo.config.load import parse_config
from megatron_octo.data.clean import files
from megatron_octo.data.clean.files import clean_files
from megatron_octo.data.corpora import shard
from megatron_octo.data.curate import run
from megatron_octo.data.curate.run import curate
from megatron_octo.data.engine import plan
from megatron_octo.data.engine.build import build_data
from megatron_octo.data.engine.jobs import render_build
from megatron_octo.errors import ConfigError, DataError, OctoError


@pytest.mark.parametrize("policy", ["strict", "skip"])
@pytest.mark.parametrize("name", ["c.jsonl.gz", "c.jsonl.zst", "c.parquet"])
def test_a_compressed_file_of_0_bytes_is_a_broken_download(tmp_path: Path, name: str, policy: str) -> None:
    write_rows(tmp_path / "a.jsonl", [{"text": "x"}])
    (tmp_path / name).touch()
    with pytest.raises(DataError, match=rf"{name} cannot be read beyond (line|row) 0 .*fix: fetch the file again"):
        read(tmp_path, policy)


@pytest.mark.parametrize("name", ["c.jsonl.gz", "c.jsonl.zst"])
def test_a_cut_file_tells_how_many_lines_were_whole(tmp_path: Path, name: str) -> None:
    path = write_rows(tmp_path / name, [{"text": os.urandom(400).hex()} for _ in range(600)])
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    with pytest.raises(DataError, match=r"beyond line [1-3]\d\d \(its last frame is cut short\)"):
        read(path)


def test_gzip_of_several_members_with_padding(tmp_path: Path) -> None:
    lines = [json.dumps({"text": text}).encode() + b"\n" for text in ("a" * 50_000, "b", "c")]
    path, padding = tmp_path / "c.jsonl.gz", bytes(40_000)
    path.write_bytes(b"".join(map(gzip.compress, lines[:2])) + padding + gzip.compress(lines[2]) + padding)
    assert [text[0] for _, text in read(path)[0]] == ["a", "b", "c"]
    damaged = bytearray(gzip.compress(lines[0]))
    damaged[-6] ^= 1  # of its checksum
    for wrong in (bytes(damaged), padding + gzip.compress(lines[1]), gzip.compress(lines[1]) + b"rest"):
        path.write_bytes(wrong)
        with pytest.raises(DataError, match="cannot be read beyond line"):
            read(path, "skip")


@pytest.mark.timeout(60)
@pytest.mark.parametrize("deduplicate", [None, {}, {"exact": False, "near": {}}])
def test_empty_files_and_copies_are_told(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], deduplicate: dict[str, object] | None
) -> None:
    folder = tmp_path / "in"
    for name in ("a.jsonl", "copy.jsonl"):
        write_rows(folder / name, [{"text": f"text {number} of some words"} for number in range(40)])
    write_rows(folder / "other.jsonl", [{"text": "something else"}])
    for name in ("d.jsonl", "e.jsonl"):
        (folder / name).touch()
    config = config_of({"c": {"path": str(folder)}}, deduplicate=deduplicate)
    accounts, exact = build_data(config, tmp_path / "out")["sources"]["c"]["accounts"], deduplicate == {}
    assert accounts["documents"] == (41 if deduplicate is not None else 81)
    said = capsys.readouterr().err
    assert f"octo: note: corpora.c: 2 files are empty: {folder / 'd.jsonl'}, {folder / 'e.jsonl'}\n" in said
    what = "the copies are left out" if exact else "read as often; deduplicate: {} leaves copies out"
    assert f"octo: note: corpora.c: files of equal content, {what}" in said
    assert said.count("a.jsonl = copy.jsonl") == 1 and "other.jsonl" not in said
    if deduplicate is not None:
        clean_files(config, tmp_path / "cleaned")
        said = capsys.readouterr().err
        assert (
            "2 files are empty" in said
            and f"files of equal content, {what}" in said
            and f"{folder / 'a.jsonl'} = {folder / 'copy.jsonl'}" in said
        )


def _contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize(
    ("work", "name"),
    [
        *(("build", name) for name in ("c.bin", "c.idx", "c.docs", "tokenizer/vocab.json", "problems/notes.txt")),
        ("slurm", "c.bin"),
        ("dedup", "c/mine.txt"),
        ("dedup", "removals.jsonl"),
        *(("curate", f"{name}/mine.txt") for name in ("corpus", "judged", "classifier")),
    ],
)
def test_what_is_in_the_way_of_a_result_is_not_replaced(tmp_path: Path, work: str, name: str) -> None:
    path = write_rows(tmp_path / "in" / "a.jsonl", [{"text": "one of its texts"}])
    out = tmp_path / "out"
    (out / name).parent.mkdir(parents=True)
    (out / name).write_text("somebody's")
    config = config_of({"c": {"path": str(path)}}, deduplicate={} if work == "dedup" else None)
    values = {"corpora": {"c": {"path": str(path)}}, "classify": {"threshold": 0.5, "model": str(path)}}
    with pytest.raises(ConfigError, match=rf"out has {name.partition('/')[0]}, and no manifest.json"):
        if work == "curate":
            curate(parse_config(CurateConfig, values, "test"), out)
        elif work == "dedup":
            clean_files(config, out)
        elif work == "slurm":
            render_build(config, out, None)
        else:
            build_data(config, out)
    assert _contents(out) == {name: b"somebody's"}


@pytest.mark.timeout(60)
def test_what_is_not_in_the_way_stays_and_an_own_result_may_be_made_again(tmp_path: Path) -> None:
    path, out = write_rows(tmp_path / "a.jsonl", [{"text": "one of its texts"}] * 5), tmp_path / "out"
    out.mkdir()
    (out / "d.bin").write_text("somebody's")
    config = config_of({"c": {"path": str(path)}})
    build_data(config, out)
    assert (out / "d.bin").read_text() == "somebody's"
    pair = (out / "c.bin").read_bytes()
    (out / "manifest.json").unlink()
    build_data(config, out)
    assert (out / "c.bin").read_bytes() == pair


def test_a_curation_tells_what_it_does_not_read(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Said before the work: here before the refusal of a model that is none."""
    for name in ("train_sft-0.parquet", "test_sft-0.parquet"):
        write_rows(tmp_path / "data" / name, [{"messages": "none"}])
    (tmp_path / "model.bin").write_text("no model")
    corpora = {"c": {"path": str(tmp_path), "adapter": "ultrachat-200k"}}
    values = {"corpora": corpora, "classify": {"threshold": 0.5, "model": str(tmp_path / "model.bin")}}
    with pytest.raises(OctoError):
        curate(parse_config(CurateConfig, values, "test"), tmp_path / "out", workers=1)
    said = "corpora.c: 1 files not read, for adapter ultrachat-200k reads data/train_sft-*.parquet"
    assert said in capsys.readouterr().err


@pytest.mark.parametrize("name", ["c.jsonl", "c.parquet"])
@pytest.mark.parametrize("room", [plan, run, files])
def test_a_file_that_grows_between_its_cut_and_the_look_at_it_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, room: Any
) -> None:
    """Its parts would end where it ended when it was cut, and its hash would be of all of it."""
    monkeypatch.setattr(shard, "PART", 1000)
    rows = [{"text": f"{number} of many documents in this file"} for number in range(100)]
    path = write_rows(tmp_path / name, rows, group=10)

    def cut(*values: Any) -> list[shard.Shard]:
        found = shard.list_shards(*values)
        write_rows(path, [*rows, *rows], group=10)
        return found

    monkeypatch.setattr(room, "list_shards", cut)
    with pytest.raises(DataError, match=f"{name} changed while the build read it"):
        if room is plan:
            plan.Plan(config_of({"c": {"path": str(path)}}), tmp_path / "out")
        elif room is files:
            clean_files(config_of({"c": {"path": str(path)}}, deduplicate={}), tmp_path / "out", workers=1)
        else:
            values = {"corpora": {"c": {"path": str(path)}}, "classify": {"threshold": 0.5, "model": "model.bin"}}
            run._look(parse_config(CurateConfig, values, "test"), {})
