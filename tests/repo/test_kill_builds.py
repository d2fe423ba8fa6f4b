"""The storm of kills over data builds runs, and would notice what it looks for."""

from __future__ import annotations

import importlib.util
import json
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


@pytest.fixture
def storm(tmp_path: Path) -> Any:
    """A storm that knows the truth, and a directory in which it is so."""
    spec = importlib.util.spec_from_file_location("kill_builds", SCRIPT)
    assert spec is not None and spec.loader is not None
    module: ModuleType = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    found = module.Storm.__new__(module.Storm)
    found.lost, found.silent, found.hangs, found._folder = [], [], 0, tmp_path
    found._truth = {"a.bin": b"tokens", "manifest.json": b"{}"}
    for name, content in found._truth.items():
        (tmp_path / "out").mkdir(exist_ok=True)
        (tmp_path / "out" / name).write_bytes(content)
    (tmp_path / "out" / ".work" / "records" / "join").mkdir(parents=True)
    (tmp_path / "out" / ".work" / "records" / "join" / "00000.json").write_text("{}")
    (tmp_path / "log.txt").write_text("")
    found.ended = module.Ended
    return found


def test_a_directory_as_it_should_be_is_left_in_peace(storm: Any, tmp_path: Path) -> None:
    records = storm._judge(tmp_path / "out", storm.ended("killed", 1.0, 1), {})
    storm._judge(tmp_path / "out", storm.ended("done", 1.0, 1), records)
    assert (storm.lost, storm.silent, storm.hangs) == ([], [], 0) and len(records) == 1


def test_harm_is_noticed(storm: Any, tmp_path: Path) -> None:
    out = tmp_path / "out"
    storm._judge(out, storm.ended("killed", 1.0, 1), {out / ".work" / "records" / "join" / "00000.json": 5})
    assert storm.lost == ["out: join/00000 was done again"]
    storm._judge(out, storm.ended("refused", 1.0, 1), {})
    assert "does not go on" in storm.lost[1]
    storm._judge(out, storm.ended("hung", 1.0, 1), {})
    assert storm.hangs == 1 and storm.silent == []
    (out / "a.bin").write_bytes(b"tokans")
    storm._judge(out, storm.ended("killed", 1.0, 1), {})
    assert "a.bin is in its place" in storm.silent[0]
    (out / "a.bin").unlink()
    storm._judge(out, storm.ended("killed", 1.0, 1), {})
    assert "manifest.json is in its place" in storm.silent[1]
