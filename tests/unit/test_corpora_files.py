"""Files of a corpus that are cut, empty, or there twice: refused, or told before the work."""

from __future__ import annotations

import gzip
import json
import os
from pathlib import Path

import pytest
from corpora_tools import config_of, read, write_rows

from megatron_octo.data.clean.files import clean_files
from megatron_octo.data.engine.build import build_data
from megatron_octo.errors import DataError


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
@pytest.mark.parametrize("deduplicate", [None, {}])
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
    accounts = build_data(config, tmp_path / "out")["sources"]["c"]["accounts"]
    assert accounts["documents"] == (41 if deduplicate is not None else 81)
    said = capsys.readouterr().err
    assert f"octo: note: corpora.c: 2 files are empty: {folder / 'd.jsonl'}, {folder / 'e.jsonl'}\n" in said
    what = "the copies are left out" if deduplicate is not None else "read as often; deduplicate: {} leaves copies out"
    assert f"octo: note: corpora.c: files of equal content, {what}" in said
    assert said.count("a.jsonl = copy.jsonl") == 1 and "other.jsonl" not in said
    if deduplicate is not None:
        clean_files(config, tmp_path / "cleaned")
        said = capsys.readouterr().err
        assert "2 files are empty" in said and f"{folder / 'a.jsonl'} = {folder / 'copy.jsonl'}" in said
