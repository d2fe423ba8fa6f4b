"""Corpora behind a URL: a server that fails is told in words, and a branch of the hub is read at one commit."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import fsspec
import pytest
from corpora_tools import config_of
from fsspec import AbstractFileSystem
from fsspec.implementations.memory import MemoryFileSystem

from megatron_octo.data.clean.files import clean_files
from megatron_octo.data.corpora.files import unread_files
from megatron_octo.data.corpora.shard import list_shards
from megatron_octo.data.engine.build import build_data
from megatron_octo.data.engine.inputs import InputFile, hash_input, look_at, refuse_change, tell_remote
from megatron_octo.errors import DataError

ROWS = "".join(json.dumps({"text": f"row {number} of a file far away"}) + "\n" for number in range(40)).encode()
COMMITS = {"a" * 40: ROWS, "b" * 40: ROWS.upper().replace(b"TEXT", b"text")}


class _Server(ThreadingHTTPServer):
    """One file at `/c.jsonl`, and the dataset `org/rows` of a hub: what a test says of it may change meanwhile."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Answers)
        self.fails, self.head, self.written = "", "a" * 40, ""

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"


class _Answers(BaseHTTPRequestHandler):
    server: _Server

    def log_message(self, *values: Any) -> None:
        """Nothing."""

    def do_HEAD(self) -> None:
        self._answer(b"")

    def do_GET(self) -> None:
        self._answer(ROWS)

    def do_POST(self) -> None:
        self.rfile.read(int(self.headers["Content-Length"]))
        self._answer(b"")

    def _answer(self, body: bytes) -> None:
        fails, size = self.server.fails, len(ROWS)
        found = self._of_the_hub()
        if found is not None:
            body = found if self.command != "HEAD" else b""
            size = len(found)
        if fails == "refuses" and body:
            self.send_error(503)
            return
        if fails == "is gone":
            self.send_error(500)
            return
        self.send_response(200)
        if fails != "tells no size":
            self.send_header("Content-Length", str(size))
        if self.server.written:
            self.send_header("Last-Modified", self.server.written)
        self.end_headers()
        self.wfile.write(body[: size // 2] if fails == "hangs up" else body)

    def _of_the_hub(self) -> bytes | None:
        """What the hub says of `org/rows`: branch -> commit, files of a commit, content."""
        path = self.path.partition("?")[0]
        if "org/rows" not in path:
            return None
        if "/resolve/" in path:
            return COMMITS[path.split("/resolve/")[1].partition("/")[0]]
        if path.endswith("/org/rows") or "/revision/" in path:
            name = path.rpartition("/")[2]
            commit = name if name in COMMITS else self.server.head
            return json.dumps({"id": "org/rows", "sha": commit}).encode()
        file = {"type": "file", "path": "data/c.jsonl", "size": len(ROWS), "oid": "1"}
        return json.dumps([file]).encode()


@pytest.fixture
def server() -> Iterator[_Server]:
    with _Server() as found:
        threading.Thread(target=found.serve_forever, daemon=True).start()
        yield found
        found.shutdown()


@pytest.mark.parametrize(
    ("fails", "said"),
    [
        ("refuses", r"/c.jsonl cannot be read \(ClientResponseError: 503.*; fix: start the same command again"),
        ("hangs up", "/c.jsonl cannot be read .*Payload"),
        ("is gone", "/c.jsonl cannot be reached .*name a copy on this machine"),
        ("tells no size", "/c.jsonl: its server does not tell its size"),
    ],
)
@pytest.mark.timeout(60)
def test_a_server_that_fails(server: _Server, fails: str, said: str) -> None:
    url = f"{server.url}/c.jsonl"
    file = look_at(url)
    assert hash_input(file)["bytes"] == len(ROWS)
    server.fails = fails
    with pytest.raises(DataError, match=said):
        hash_input(look_at(url) if fails in ("is gone", "tells no size") else file)


def test_a_change_of_equal_size_is_noticed_where_the_server_tells_a_time(server: _Server) -> None:
    server.written = "Wed, 01 Jul 2026 10:00:00 GMT"
    file = look_at(f"{server.url}/c.jsonl")
    refuse_change(file)
    server.written = "Wed, 01 Jul 2026 10:00:01 GMT"
    with pytest.raises(DataError, match="c.jsonl changed while the build read it"):
        refuse_change(file)


def test_a_bucket_of_the_hub_names_no_commit(capsys: pytest.CaptureFixture[str]) -> None:
    tell_remote(
        {"c": [InputFile("hf://datasets/o/r@1/c.jsonl", 1, ""), InputFile("hf://buckets/o/b/c.jsonl", 1, "")]}, 2
    )
    assert "of 1 files the server tells neither time nor tag" in capsys.readouterr().err


class _Keeps(MemoryFileSystem):
    """Keeps the listings of directories, as the file systems of object stores do."""

    protocol, store, find = "keeps", {}, AbstractFileSystem.find  # which lists one directory after another

    @classmethod
    def _strip_protocol(cls, path: str) -> str:
        return super()._strip_protocol(path.removeprefix("keeps://"))

    def ls(self, path: str, detail: bool = True, **values: Any) -> list[Any]:
        path = self._strip_protocol(path)
        if path not in self.dircache:
            self.dircache[path] = [dict(one) for one in super().ls(path, detail=True)]
        return self.dircache[path] if detail else [one["name"] for one in self.dircache[path]]

    def info(self, path: str, **values: Any) -> dict[str, Any]:
        path = self._strip_protocol(path)
        kept = self.dircache.get(self._parent(path), [])
        if found := next((one for one in kept if one["name"] == path), None):
            return found
        found = super().info(path)
        return found if found["type"] == "directory" else super().ls(path)[0]

    def invalidate_cache(self, path: str | None = None) -> None:
        if path is None:
            self.dircache.clear()
        else:
            self.dircache.pop(self._strip_protocol(path), None)


def test_a_kept_listing_is_not_asked_whether_a_file_changed() -> None:
    fsspec.register_implementation("keeps", _Keeps, clobber=True)
    files = fsspec.filesystem("keeps")
    files.pipe("/folder/a.jsonl", ROWS)
    config = config_of({"c": {"path": "keeps://folder"}})
    (shard,) = list_shards(config, "c")
    file = look_at(shard.path)
    refuse_change(file)
    files.ls("/folder")
    files.pipe("/folder/a.jsonl", ROWS + ROWS)
    files.pipe("/folder/b.jsonl", ROWS)
    assert look_at(shard.path) == file, "the listing is kept"
    with pytest.raises(DataError, match="a.jsonl changed while the build read it"):
        refuse_change(file)
    files.ls("/folder")
    files.pipe("/folder/c.jsonl", ROWS)
    assert len(list_shards(config, "c")) == 3


def test_a_server_that_fails_while_unread_files_are_looked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    fsspec.register_implementation("keeps", _Keeps, clobber=True)
    fsspec.filesystem("keeps").pipe("/unread/a.jsonl", ROWS)
    fsspec.filesystem("keeps").pipe("/unread/a.txt", ROWS)
    config = config_of({"c": {"path": "keeps://unread"}})
    assert unread_files(config) == {"c": {"files": 1, "first": ["a.txt"]}}

    def fail(*values: Any, **named: Any) -> None:
        raise RuntimeError("503 slow down")

    monkeypatch.setattr(_Keeps, "find", fail)
    with pytest.raises(DataError, match=r"corpora.c: keeps://unread cannot be listed \(RuntimeError: 503 slow down\)"):
        unread_files(config)


def test_what_is_not_read_of_the_hub_is_told_of_the_commit_that_is_read(
    server: _Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(fsspec.config.conf, "hf", {"endpoint": server.url, "skip_instance_cache": True})
    found: list[str] = []
    monkeypatch.setattr("megatron_octo.data.corpora.files._all_afar", lambda system, path: found.append(path) or [])
    unread_files(config_of({"c": {"path": "hf://datasets/org/rows/data"}}), {"datasets/org/rows": "c" * 40})
    assert found == [f"datasets/org/rows@{'c' * 40}/data"]


def test_what_is_read_over_the_network_is_said(
    server: _Server, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = config_of({"c": {"path": f"{server.url}/c.jsonl"}}, deduplicate={"near": None})
    clean_files(config, tmp_path / "out")
    said = capsys.readouterr().err
    assert "corpora.c: 1 files come over the network at every reading, up to 4 times; to fetch them once" in said
    assert "of 1 files the server tells neither time nor tag" in said


def test_a_branch_of_the_hub_is_read_at_one_commit(
    server: _Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The commit is looked up once: a build that goes on reads it, and a finished one stays of it."""
    monkeypatch.setitem(fsspec.config.conf, "hf", {"endpoint": server.url, "skip_instance_cache": True})
    config, out = config_of({"c": {"path": "hf://datasets/org/rows/data/*.jsonl"}}), tmp_path / "out"
    server.fails = "refuses"
    with pytest.raises(DataError):
        build_data(config, tmp_path / "nothing")
    server.fails = ""

    def interrupted(*values: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr("megatron_octo.data.engine.build.make_manifest", interrupted)
        build_data(config, out)
    server.head = "b" * 40
    manifest = build_data(config, out)
    assert manifest["revisions"] == {"datasets/org/rows": "a" * 40}
    assert build_data(config, out) == manifest
    assert "neither time nor tag" not in capsys.readouterr().err
    newer = build_data(config, tmp_path / "newer")
    assert newer["revisions"] == {"datasets/org/rows": "b" * 40}
    assert newer["inputs"] != manifest["inputs"]
