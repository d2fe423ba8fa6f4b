"""From a complete result to its place: what is flushed before it counts, and what is never seen half."""

from __future__ import annotations

import os
import shutil
import signal
import sys
from pathlib import Path
from subprocess import Popen
from typing import Any

import pytest

from megatron_octo.data.engine import publish as engine
from megatron_octo.data.engine.publish import publish

_remove: Any = shutil.rmtree


def _result(out: Path) -> Path:
    result = out / ".work" / "result"
    (result / "corpus" / "deep").mkdir(parents=True)
    for name in ("a.bin", "corpus/0.jsonl", "corpus/deep/1.jsonl"):
        (result / name).write_text(name)
    return result


def test_all_files_are_on_disk_before_the_manifest_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    result, flushed, real = _result(tmp_path / "out"), [], os.fsync

    def fsync(descriptor: int) -> None:
        flushed.append(Path(os.readlink(f"/proc/self/fd/{descriptor}")))
        real(descriptor)

    monkeypatch.setattr(os, "fsync", fsync)
    publish(tmp_path / "out", {}, ["a.bin", "corpus"])
    before = flushed[: next(place for place, path in enumerate(flushed) if path.name.startswith(".manifest.json"))]
    names = ("a.bin", "corpus", "corpus/0.jsonl", "corpus/deep", "corpus/deep/1.jsonl")
    assert set(before) == {result / name for name in names}
    assert (tmp_path / "out" / "corpus" / "deep" / "1.jsonl").read_text() == "corpus/deep/1.jsonl"


def test_a_directory_in_its_place_is_never_a_half(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One that is the same stays; another one goes in one step, not file after file."""
    out = tmp_path / "out"
    corpus = _result(out) / "corpus"
    shutil.rmtree(corpus / "deep")
    shutil.copytree(corpus, out / "corpus")
    known, deleted = (out / "corpus").stat().st_ino, []
    monkeypatch.setattr(engine.shutil, "rmtree", lambda path, *_: deleted.append(path) or _remove(path))
    publish(out, {}, ["corpus"])
    assert (out / "corpus").stat().st_ino == known
    (out / "corpus" / "0.jsonl").write_text("damaged")
    (out / ".work" / "result" / "corpus").mkdir()
    (out / ".work" / "result" / "corpus" / "0.jsonl").write_text("mended")
    publish(out, {}, ["corpus"])
    assert [path.name for path in (out / "corpus").iterdir()] == ["0.jsonl"]
    assert (out / "corpus" / "0.jsonl").read_text() == "mended" and out / "corpus" not in deleted


def test_what_killed_processes_left_is_not_published(tmp_path: Path) -> None:
    result = _result(tmp_path / "out")
    killed = Popen([sys.executable, "-c", _KILLED, str(result / "corpus")])
    assert killed.wait() == -signal.SIGKILL
    assert len(list(result.rglob(".*"))) == 2
    (result / ".tokenizer.0123456789ab.partial").mkdir()
    publish(tmp_path / "out", {}, ["a.bin", "corpus"])
    assert sorted(path.name for path in (tmp_path / "out" / "corpus").rglob("*")) == ["0.jsonl", "1.jsonl", "deep"]


_KILLED = """
import os, signal, sys
from pathlib import Path
from megatron_octo.files import replacing, write_bytes
folder = Path(sys.argv[1])
with replacing(folder / "2.jsonl") as temporary:
    temporary.write_bytes(b"half")
    os.fsync = lambda descriptor: os.kill(os.getpid(), signal.SIGKILL)
    write_bytes(folder / "deep" / "3.jsonl", b"half")
"""
