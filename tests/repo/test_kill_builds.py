"""The storm of kills over data builds runs, and would notice what it looks for."""

from __future__ import annotations

import importlib.util
import json
import os
import random
import shutil
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

SCRIPT = Path(__file__).resolve().parents[2] / "tools" / "kill_builds.py"


@pytest.mark.slow
@pytest.mark.timeout(150)
def test_a_few_kills_lose_nothing() -> None:
    ended = subprocess.run([sys.executable, str(SCRIPT), "--quick"], capture_output=True, text=True, timeout=140)
    assert ended.returncode == 0, ended.stdout + ended.stderr
    figures = json.loads(ended.stdout.splitlines()[-1])
    assert (figures["kills"], figures["lost"], figures["silent"], figures["hangs"]) == (8, 0, 0, 0)
    assert set(figures["by_kind"]) == {"build", "repair", "dedup", "curate"}


@pytest.fixture
def tool(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(SCRIPT.parent))
    spec = importlib.util.spec_from_file_location("kill_builds", SCRIPT)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


class Watched:
    """A storm that knows the truth, a directory in which it is so, and what it complains of."""

    def __init__(self, tool: ModuleType, folder: Path) -> None:
        self.storm, self.tool, self.out = tool.Storm.__new__(tool.Storm), tool, folder / "out"
        self.storm.lost, self.storm.silent, self.storm.hangs, self.storm._folder = [], [], 0, folder
        self.truth = {"a.bin": b"tokens", "tokenizer/b.json": b"{}", "manifest.json": b"{}"}
        self.storm._truths, self.storm._starter = {"build": self.truth}, tool.Starter(folder)
        self.storm._starter.log.write_text("")
        self.work = tool.Work("build", "build", lambda *_: [])
        for name, content in self.truth.items():
            (self.out / name).parent.mkdir(parents=True, exist_ok=True)
            (self.out / name).write_bytes(content)

    def record(self) -> Path:
        path = self.out / ".work" / "records" / "join" / "00000.json"
        path.parent.mkdir(parents=True)
        path.write_text("{}")
        return path

    def judge(self, code: int | None, aim: Any = None, before: Any = None, broken: Any = None) -> dict[Path, int]:
        ended = self.tool.Ended(code, 1.0, 1, True)
        return self.storm.judge("run", self.out, self.work, ended, aim, before or {}, {} if broken is None else broken)

    def settle(self) -> list[str]:
        self.storm.settle("run", self.out, self.work, 1)
        return self.storm.silent

    @property
    def found(self) -> Any:
        return self.storm.lost, self.storm.silent, self.storm.hangs


@pytest.fixture
def watched(tool: ModuleType, tmp_path: Path) -> Watched:
    return Watched(tool, tmp_path)


def test_a_directory_as_it_should_be_is_left_in_peace(watched: Watched) -> None:
    path = watched.record()
    records = watched.judge(-9, watched.tool.Aim("started", "KILL"))
    assert list(records) == [path]
    for code, aim in ((143, ("all", "TERM")), (130, ("all", "INT")), (5, ("worker", "KILL")), (0, ("all", "KILL"))):
        watched.judge(code, watched.tool.Aim(*aim), records)
    shutil.rmtree(watched.out / ".work")
    assert watched.settle() == [] and watched.found == ([], [], 0)


def test_harm_is_noticed(watched: Watched) -> None:
    path, storm = watched.record(), watched.storm
    watched.judge(0, before={path: 5})
    assert storm.lost == ["run: join/00000 was done again"]
    for code, aim in ((3, None), (3, ("all", "INT")), (1, ("worker", "KILL")), (143, ("started", "KILL"))):
        storm.lost.clear()
        watched.judge(code, aim and watched.tool.Aim(*aim))
        assert f"ends with {code}" in storm.lost[0], (code, aim)
    storm.lost.clear()
    storm._starter.log.write_text("Traceback (most recent call last):")
    watched.judge(0)
    assert "with a traceback" in storm.lost[0] and storm.silent == []
    watched.judge(None)
    assert storm.hangs == 1
    (watched.out / "a.bin").write_bytes(b"tokans")
    watched.judge(0)
    assert "a.bin is not as it should be" in storm.silent[0]
    (watched.out / "a.bin").unlink()
    watched.judge(0)
    assert "a.bin is not as it should be" in storm.silent[1], "it is missing beside a manifest"


def test_what_is_broken_on_purpose_may_be_so_until_it_is_mended(watched: Watched) -> None:
    for name in watched.truth:
        (watched.out / name).unlink()
    broken = sys.modules["killed_work"].damage(watched.out, watched.truth, random.Random(3))
    assert broken and all(watched.truth[name] != content for name, content in broken.items())
    watched.judge(0, broken=broken)
    assert watched.storm.silent == []
    for name in list(broken):
        (watched.out / name).write_bytes(watched.truth[name])
    watched.judge(0, broken=broken)
    assert broken == {} and watched.storm.silent == []
    (watched.out / "a.bin").write_bytes(b"")
    watched.judge(0, broken=broken)
    assert len(watched.storm.silent) == 1


def test_what_is_left_behind_is_noticed(watched: Watched, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(watched.tool, "GRACE", 0.3)
    watched.record()
    (watched.storm._starter.temporary / "file").write_text("")
    (watched.out / "more.bin").write_text("")
    sleeping = subprocess.Popen(["sleep", "60"], env={**os.environ, **dict([watched.tool.MARK])})
    try:
        said = " ".join(watched.settle())
    finally:
        sleeping.kill()
        sleeping.wait()
    for words in ("has other files", ".work is left behind", "tmp/file is left behind", "left behind: sleep 60"):
        assert words in said
