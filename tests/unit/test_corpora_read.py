"""Files -> documents: every form, every way a file or a record can be broken, and the account of it."""

from __future__ import annotations

import gzip
import io
import json
import os
import tracemalloc
from pathlib import Path

import pyarrow
import pyarrow.parquet as parquet
import pytest
import zstandard
from corpora_tools import config_of, read, shards_of, write_rows

from megatron_octo.data.corpora import shard as shard_module
from megatron_octo.data.corpora.files import unread_files
from megatron_octo.data.corpora.read import ShardReader
from megatron_octo.data.corpora.shard import list_shards, refuse_shared_files
from megatron_octo.errors import DataError

FORMS = ["c.jsonl", "c.jsonl.gz", "c.jsonl.zst", "c.parquet"]
ROWS = [{"text": f"text {number} \u00e9\n", "other": {"text": "not this"}} for number in range(7)]

BROKEN = {
    b'{"text": "cut o': "not JSON",
    b'{"text": "\xff"}': "not UTF-8 at byte 11 of the line",
    b'\xef\xbb\xbf{"text": "x"}': "BOM",
    b"": "the line is empty",
    b" \t": "the line is empty",
    b'["text"]': "a JSON list and not an object",
    b"null": "a JSON NoneType and not an object",
    b'{"body": "x"}': "no field 'text' (it has 'body')",
    b"{}": "no field 'text' (it has none)",
    b'{"text": null}': "field 'text' is null and not text",
    b'{"text": 3}': "field 'text' is int and not text",
    b'{"text": ["x"]}': "field 'text' is list and not text",
    b'{"text": ""}': "field 'text' is empty",
    b'{"text": " \\n"}': "field 'text' is empty",
    b'{"text": "a\\u0000b"}': "field 'text' holds a NUL character",
    b'{"text": "a\0b"}': "it holds a NUL byte, byte 12 of the line",
    b'{"text": "\\ud800"}': "it holds half of a surrogate pair",
    b'{"text": "one", "n": {"text": 1}, "text": "two"}': "field 'text' stands twice",
    b'{"text": "x", "score": NaN}': "not JSON (NaN is not JSON)",
    b'{"text": "x", "score": -1e999}': "not JSON (-1e999 is too large)",
    b"[" * 100_000: "not JSON",
}  # fmt: skip


def ids_and_texts() -> list[tuple[str, str]]:
    return [(number + 1, row["text"]) for number, row in enumerate(ROWS)]


@pytest.mark.parametrize("name", FORMS)
def test_every_form_gives_the_same_documents(tmp_path: Path, name: str) -> None:
    documents, accounts = read(write_rows(tmp_path / name, ROWS))
    assert documents == [(f"c/{name}:{number}", text) for number, text in ids_and_texts()]
    assert (accounts.read, accounts.documents, accounts.skipped, accounts.removed) == (7, 7, {}, {})


@pytest.mark.parametrize("line", BROKEN, ids=lambda line: line[:24].decode("latin-1"))
@pytest.mark.parametrize("suffix", ["", ".gz"])
def test_a_damaged_line_is_named_or_counted(tmp_path: Path, line: bytes, suffix: str) -> None:
    path = tmp_path / f"bad.jsonl{suffix}"
    content = b'{"text": "good"}\n' + line + b'\n{"text": "last"}'
    path.write_bytes(gzip.compress(content) if suffix else content)
    with pytest.raises(DataError) as caught:
        read(path)
    assert str(caught.value).startswith(f"{path}, line 2: ") and BROKEN[line] in str(caught.value)
    assert "on_bad_line: skip" in caught.value.fix and caught.value.exit_code == 3
    documents, accounts = read(path, "skip")
    assert [name for name, _ in documents] == [f"c/{path.name}:1", f"c/{path.name}:3"]
    assert accounts.read == 3 and sum(accounts.skipped.values()) == 1
    assert accounts.first[0].startswith(f"{path.name}:2: ") and BROKEN[line] in accounts.first[0]


def test_reasons_stay_few_and_lines_named_twenty(tmp_path: Path) -> None:
    path = tmp_path / "c.jsonl"
    path.write_bytes(b"".join(b'{"text": "' + b"x" * number + b'\xff"}\n' for number in range(50)) + b'{"text": "x"}\n')
    documents, accounts = read(path, "skip")
    assert accounts.skipped == {"not UTF-8": 50} and len(documents) == 1
    config = config_of({"c": {"path": str(path)}}, on_bad_line="skip")
    reader = ShardReader(config, *list_shards(config, "c"))
    assert len(list(reader)) == 1 and len(reader.accounts.first) == 20
    assert len(accounts.first) == 20 and accounts.first[19] == "c.jsonl:20: not UTF-8 at byte 30 of the line"


def test_what_is_harmless_is_read(tmp_path: Path) -> None:
    """A byte order mark at the start, ends of lines of another system, no end of the last line, keys within values."""
    path = tmp_path / "c.jsonl"
    path.write_bytes(
        b'\xef\xbb\xbf{"text": "a"}\r\n{"x": {"text": 1, "text": 2}, "text": "b"}\r\n'
        b'{"te\\u0078t": "c", "n": 123456789012345678901}\n{"text": "\\ud83d\\ude00 \\"text\\": \\"d\\""}'
    )
    assert [text for _, text in read(path)[0]] == ["a", "b", "c", '\U0001f600 "text": "d"']


def test_a_line_of_100_mb(tmp_path: Path) -> None:
    path = tmp_path / "c.jsonl"
    with path.open("wb") as file:
        for text in (b"a", b"b" * 100_000_000, b"c"):
            file.write(b'{"text": "' + text + b'"}\n')
    assert [len(text) for _, text in read(path)[0]] == [1, 100_000_000, 1]


@pytest.mark.parametrize("name", FORMS)
@pytest.mark.parametrize("policy", ["strict", "skip"])
def test_a_file_cut_short_is_refused_under_both_policies(tmp_path: Path, name: str, policy: str) -> None:
    rows = [{"text": os.urandom(400).hex()} for _ in range(600)]
    path = write_rows(tmp_path / name, rows, group=100)
    content = path.read_bytes()
    path.write_bytes(content[: len(content) // 2 + 3])
    if name == "c.jsonl":  # its last line is cut
        with pytest.raises(DataError, match=r"c.jsonl, line 301: not JSON"):
            read(path)
        assert read(path, "skip")[1].skipped == {"not JSON": 1}
        return
    with pytest.raises(DataError, match=rf"{name} cannot be read beyond (line|row) \d+ .*; fix: fetch the file again"):
        read(path, policy)


def test_zstandard_cut_between_and_within_frames(tmp_path: Path) -> None:
    frames = [zstandard.compress(json.dumps({"text": str(number) * 100}).encode() + b"\n") for number in range(3)]
    path = tmp_path / "c.jsonl.zst"
    path.write_bytes(b"".join(frames))
    assert [text[0] for _, text in read(path)[0]] == ["0", "1", "2"]
    path.write_bytes(b"".join(frames)[:-1])
    with pytest.raises(DataError, match="beyond line 2 .*cut short"):
        read(path, "skip")
    path.write_bytes(b"".join(frames) + b"rest")
    with pytest.raises(DataError, match="cannot be read beyond line"):
        read(path, "skip")


@pytest.mark.parametrize("name", [*FORMS, "wrong.jsonl.gz", "wrong.jsonl.zst", "wrong.parquet"])
def test_empty_and_mistaken_files(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    if name.startswith("wrong"):
        path.write_bytes(b'{"text": "plain"}\n')
        with pytest.raises(DataError, match=f"{name} cannot be read beyond"):
            read(path, "skip")
        return
    path.write_bytes(b"")
    if name != "c.jsonl":  # not even the frame of an empty file
        write_rows(path, [], pyarrow.schema([("text", pyarrow.string())]))
    assert read(path) == read(path, "skip")
    assert read(path)[0] == [] and read(path)[1].read == 0


# -- parquet


def test_rows_of_parquet_that_are_broken(tmp_path: Path) -> None:
    raw = pyarrow.array([b"good", b"bad \xff", None, b"", b"a\0b", b"\xed\xa0\x80", b"last"], pyarrow.binary())
    path = tmp_path / "c.parquet"
    parquet.write_table(pyarrow.table({"text": raw.view(pyarrow.string())}), path)
    with pytest.raises(DataError, match=r"c.parquet, row 2: not UTF-8 at byte 5 of 'text'"):
        read(path)
    documents, accounts = read(path, "skip")
    assert documents == [("c/c.parquet:1", "good"), ("c/c.parquet:7", "last")]
    assert accounts.skipped == {
        "not UTF-8": 2, "field 'text' is null and not text": 1, "field 'text' is empty": 1,
        "field 'text' holds a NUL character": 1,
    }  # fmt: skip


@pytest.mark.parametrize("policy", ["strict", "skip"])
def test_parquet_without_the_column_is_refused(tmp_path: Path, policy: str) -> None:
    path = write_rows(tmp_path / "c.parquet", [{"body": "x", "n": 1}])
    with pytest.raises(DataError, match=r"c.parquet has no column 'text' \(it has body, n\)"):
        read(path, policy)
    assert read(path, fields={"text": "body"})[0] == [("c/c.parquet:1", "x")]
    with pytest.raises(DataError, match="row 1: field 'n' is int and not text"):
        read(path, fields={"text": "n"})


def test_only_the_needed_columns_are_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_rows(tmp_path / "c.parquet", [{"text": "x", "big": "y" * 1000}] * 4)
    asked = []
    plain = parquet.ParquetFile.iter_batches
    monkeypatch.setattr(
        parquet.ParquetFile, "iter_batches", lambda *items, **named: (asked.append(items[3]), plain(*items, **named))[1]
    )
    assert len(read(path)[0]) == 4 and asked == [["text"]]


# -- parts and files


@pytest.mark.parametrize("name", ["c.jsonl", "c.parquet"])
def test_a_large_file_is_cut_into_parts_that_give_the_same(
    tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = [{"text": "\u00e9x"[: 1 + number % 2] * (1 + number * 7 % 90)} for number in range(200)]
    path = write_rows(tmp_path / name, rows, group=7)
    whole = read(path)
    assert len(shards_of(path)) == 1
    for part in (1, 50, 333, path.stat().st_size // 2, path.stat().st_size):
        monkeypatch.setattr(shard_module, "PART", part)
        shards = shards_of(path)
        assert [shard.number for shard in shards] == list(range(len(shards)))
        assert (len(shards) > 1) == (part < path.stat().st_size)
        assert read(path) == whole, part
    monkeypatch.setattr(shard_module, "PART", 333)
    last = shards_of(path)[-1]
    assert last.part is not None and last.first > 100 and last.name == name


def test_a_folder_a_glob_and_a_file(tmp_path: Path) -> None:
    for name in ("b/2.jsonl", "a/1.parquet", "3.jsonl.zst"):
        write_rows(tmp_path / "data" / name, [{"text": name}])
    for name in ("README.md", "dataset_info.json", ".hidden.jsonl"):
        (tmp_path / "data" / name).write_text("not of the corpus")
    found = {name: f"c/{name}:1" for name in ("3.jsonl.zst", "a/1.parquet", "b/2.jsonl")}
    for path in (tmp_path / "data", f"{tmp_path}/data/**/[1-3].[jp]*", f"{tmp_path}/data/**/[1-3]*[lt]*"):
        assert read(path)[0] == [(name, text) for text, name in found.items()]
    assert read(f"{tmp_path}/data/b/2*")[0] == [("c/2.jsonl:1", "b/2.jsonl")]


def test_compressed_json_in_a_folder_is_lines_as_c4_and_dolma_have_it(tmp_path: Path) -> None:
    write_rows(tmp_path / "c4-train.00000.json.gz", [{"text": "x"}])
    assert read(tmp_path)[0] == [("c/c4-train.00000.json.gz:1", "x")]


MIRRORS = {
    "ultrachat-200k": ("data/train_sft-0.parquet", "data/test_sft-0.parquet", "data/test_gen-0.parquet"),
    "openmathinstruct-2": ("data/train-0.parquet", "data/train_1M-0.parquet"),
    "finemath-4plus": ("finemath-4plus/train-0.parquet", "finemath-3plus/train-0.parquet"),
    "am-deepseek-distilled-40m": ("deepseek/math_1.jsonl", "deepseek/code_1.jsonl"),
}


@pytest.mark.parametrize("afar", [False, True], ids=["here", "afar"])
@pytest.mark.parametrize("name", MIRRORS)
def test_of_a_copy_of_its_repository_an_adapter_reads_its_own_files(
    tmp_path: Path, name: str, afar: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    """Other splits and subsets lie beside them; a glob is taken as written, and so is a folder of other names."""
    import fsspec

    own, *others = MIRRORS[name]
    root = f"memory://{name}-copy" if afar else str(tmp_path)
    for file in (own, *others):
        with fsspec.open(f"{root}/{file}", "wb", **({} if afar else {"auto_mkdir": True})) as target:
            target.write(b"x")

    def names(path: str) -> set[str]:
        return {shard.path.rpartition("/")[2] for shard in shards_of(path, adapter=name)}

    config = config_of({"c": {"path": root, "adapter": name}})
    (shard,) = list_shards(config, "c")
    assert shard.path.endswith(f"/{own}")
    assert unread_files(config) == {"c": {"files": len(others), "first": sorted(others)}}
    said = capsys.readouterr().err
    assert f"corpora.c: {len(others)} files not read, for adapter {name} reads" in said and others[0] in said
    every = {file.rpartition("/")[2] for file in (own, *others)}
    suffix = own.rpartition(".")[2]
    assert names(f"{root}/**/*.{suffix}") == every
    assert unread_files(config_of({"c": {"path": f"{root}/**/*.{suffix}", "adapter": name}})) == {}
    folder = others[0].rpartition("/")[0]
    same = folder == own.rpartition("/")[0]
    assert names(f"{root}/{folder}") == {own.rpartition("/")[2] if same else others[0].rpartition("/")[2]}


def test_a_folder_that_is_no_copy_is_read_whole(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("x/1.parquet", "2.parquet"):
        write_rows(tmp_path / name, [{"text": name}])
    (tmp_path / "info.json").write_text("{}")
    config = config_of({"c": {"path": str(tmp_path), "adapter": "finemath-4plus"}})
    assert [shard.name for shard in list_shards(config, "c")] == ["2.parquet", "x/1.parquet"]
    assert unread_files(config) == {"c": {"files": 1, "first": ["info.json"]}}
    assert "1 files not read, for a corpus is files of jsonl" in capsys.readouterr().err


def test_relative_paths_and_variables(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_rows(tmp_path / "c.jsonl", [{"text": "x"}])
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("OCTO_TEST", str(tmp_path))
    for path in ("c.jsonl", "*.jsonl", ".", "${OCTO_TEST}/c.jsonl", "${OCTO_TEST}", "file://${OCTO_TEST}/c.jsonl"):
        assert read(path)[0] == [("c/c.jsonl:1", "x")], path


@pytest.mark.parametrize(
    ("path", "said"),
    [
        ("gone.jsonl", "gone.jsonl does not exist; get it from there; fix: put it at "),
        ("empty", "empty holds no file of jsonl, jsonl.gz, jsonl.zst or parquet; get it from there; fix: "),
        ("described", r"described holds no file of .* \(a .json is read where a glob or its own path names it\)"),
        ("*.nothing", r"\*.nothing holds no file of"),
        ("notes.txt", "notes.txt is no file of jsonl, jsonl.gz, jsonl.zst or parquet"),
        ("*.txt", "notes.txt is no file of"),
        ("twice", "1.jsonl are one file; its documents would count twice"),
        ("${OCTO_GONE:-gone}/c.jsonl", "or set OCTO_GONE to where it is"),
        ("nosuch://c.jsonl", "cannot be listed .*Protocol not known.*set corpora.c.path to a copy"),
        ("memory://nowhere", "memory://nowhere holds no file of"),
        ("memory://nowhere/c.jsonl", "memory://nowhere/c.jsonl holds no file of"),
    ],
)
def test_files_that_are_not_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, path: str, said: str) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "notes.txt").write_text("x")
    (tmp_path / "described").mkdir()
    (tmp_path / "described" / "c.json").write_text("{}")
    write_rows(tmp_path / "twice" / "1.jsonl", [{"text": "x"}])
    (tmp_path / "twice" / "2.jsonl").symlink_to("1.jsonl")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(DataError, match=f"corpora.c: .*{said}"):
        shards_of(path, hint="get it from there")


def test_one_file_in_two_corpora_is_refused_if_it_is_read_in_the_same_way(tmp_path: Path) -> None:
    path = write_rows(tmp_path / "real" / "c.jsonl", [{"question": "1+1?", "answer": "2"}])
    (tmp_path / "link").symlink_to(tmp_path / "real")

    def check(**second: object) -> None:
        config = config_of({"a": {"path": str(path), "adapter": "qa"}, "b": {"path": str(tmp_path / "link"), **second}})
        refuse_shared_files(config, {name: list_shards(config, name) for name in ("a", "b")})

    check(adapter="text", fields={"text": "answer"})
    with pytest.raises(DataError, match="corpora.b and corpora.a both read .*c.jsonl; its documents would count twice"):
        check(adapter="qa")


def test_urls_of_fsspec(tmp_path: Path) -> None:
    import fsspec

    for name in ("b.jsonl.gz", "a.jsonl", "sub/c.parquet"):
        local = write_rows(tmp_path / name, [{"text": name}] * 3)
        with fsspec.open(f"memory://bucket/{name}", "wb") as file:
            file.write(local.read_bytes())
    ids = [f"c/{name}:{number}" for name in ("a.jsonl", "b.jsonl.gz", "sub/c.parquet") for number in (1, 2, 3)]
    assert [name for name, _ in read("memory://bucket")[0]] == ids
    assert [name for name, _ in read("memory://bucket/*.jsonl*")[0]] == ids[:6]
    assert [name for name, _ in read("memory://bucket/sub/c.parquet")[0]] == [f"c/c.parquet:{row}" for row in (1, 2, 3)]
    (shard,) = shards_of("memory://bucket/a.jsonl")
    fsspec.filesystem("memory").rm("bucket", recursive=True)
    with pytest.raises(DataError, match="memory:///?bucket/a.jsonl cannot be read beyond line 0"):
        list(ShardReader(config_of({"c": {"path": "memory://bucket/a.jsonl"}}), shard))


def test_errors_that_only_a_remote_file_system_has(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import fsspec

    with fsspec.open("memory://flaky/a.jsonl", "wb") as file:
        file.write(b'{"text": "x"}\n' * 3)

    class Flaky(io.BytesIO):
        def __next__(self) -> bytes:
            if self.tell():
                raise RuntimeError("the far end hung up")
            return super().__next__()

    (shard,) = shards_of("memory://flaky/a.jsonl")
    monkeypatch.setattr(
        "fsspec.implementations.memory.MemoryFileSystem._open", lambda *items, **named: Flaky(b'{"text": "x"}\n' * 3)
    )
    with pytest.raises(DataError, match=r"beyond line 1 \(RuntimeError: the far end hung up\)"):
        list(ShardReader(config_of({"c": {"path": "memory://flaky/a.jsonl"}}), shard))


@pytest.mark.parametrize("name", ["c.jsonl", "c.jsonl.gz", "c.jsonl.zst", "c.parquet"])
def test_memory_does_not_grow_with_the_file(tmp_path: Path, name: str) -> None:
    def peak(rows: int) -> int:
        rows_of_text = [{"text": os.urandom(300).hex() * 2} for _ in range(rows)]
        path = write_rows(tmp_path / str(rows) / name, rows_of_text, group=rows)
        config = config_of({"c": {"path": str(path)}})
        (shard,) = list_shards(config, "c")
        reader = ShardReader(config, shard)
        for _ in reader:  # what is loaded once
            break
        tracemalloc.start()
        before = pyarrow.total_allocated_bytes()
        held = most = 0
        for number, document in enumerate(reader):
            held += len(document.text)
            if number % 100 == 0:
                most = max(most, pyarrow.total_allocated_bytes() - before)
        found = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert held > rows * 1000
        return found + most

    assert peak(12_000) < 1.5 * peak(4_000) + 1_000_000


def test_reading_again_gives_the_same(tmp_path: Path) -> None:
    config = config_of({"c": {"path": str(write_rows(tmp_path / "c.jsonl", ROWS))}})
    reader = ShardReader(config, *list_shards(config, "c"))
    assert [document.text for document in reader] == [document.text for document in reader]
    assert reader.accounts.read == reader.accounts.documents == 7


def test_generated_text_is_read_alike() -> None:
    config = config_of({}, world={"tokens": {"web": 100}})
    (shard,) = list_shards(config, "web")
    reader = ShardReader(config, shard)
    first = [document for _, document in zip(range(3), reader, strict=False)]
    assert [document.id for document in first] == ["web:1", "web:2", "web:3"] and all(doc.text for doc in first)
