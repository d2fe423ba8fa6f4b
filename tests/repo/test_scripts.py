"""The scripts run by path refuse in one line, before they install or start anything."""

from __future__ import annotations

import shutil
import socket
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
TOOLS = ("bash", "dirname", "cmp", "head", "rm", "ls", "sed", "wc")


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """A directory that stands for PATH: a few tools, and no Python, g++ or torchrun."""
    path = tmp_path / "bin"
    path.mkdir()
    for tool in TOOLS:
        (path / tool).symlink_to(shutil.which(tool) or tool)
    return path


def refusal(script: str, path: Path, *arguments: str, **environment: str) -> str:
    """What a script says on stderr when it refuses."""
    venv = path.parent / "venv"
    result = subprocess.run(
        ["bash", str(ROOT / script), *arguments],
        env={"PATH": str(path), "OCTO_VENV": str(venv), **environment},
        capture_output=True, text=True, timeout=30, check=False,
    )  # fmt: skip
    assert result.returncode in (2, 6) and result.stdout == "", result.stdout + result.stderr
    assert not venv.exists() or list(venv.iterdir()) == [venv / "note"], "nothing is installed or removed"
    return result.stderr


def executable(path: Path, text: str) -> None:
    path.write_text(f"#!/usr/bin/env bash\n{text}\n")
    path.chmod(0o755)


OLD = 'if [ "$1" = --version ]; then echo "Python 3.9.1"; echo "and more"; fi; exit 1'


@pytest.mark.parametrize("script", ["tools/demo.sh", "tools/test.sh"])
def test_a_python_that_is_too_old(path: Path, script: str) -> None:
    for name in ("python3.11", "python3.12", "python3", "python3.10"):
        executable(path / name, OLD)
    for environment in ({}, {"PYTHON": "python3.10"}):
        found = refusal(script, path, **environment)
        assert found.startswith("octo: error: Python 3.11 or 3.12 is needed, found Python 3.9.1; fix: install it")
        assert found.count("\n") == 1


def test_no_python_at_all(path: Path) -> None:
    found = refusal("tools/test.sh", path, PYTHON="/nowhere/python3.11")
    assert found.startswith("octo: error: Python 3.11 or 3.12 is needed") and found.count("\n") == 1


def test_a_missing_compiler(path: Path) -> None:
    executable(path / "python3.11", f'exec {sys.executable} "$@"')
    found = refusal("tools/test.sh", path)
    assert found == "octo: error: g++ is missing; fix: install it (Debian: apt-get install g++)\n"


def test_a_directory_that_is_no_environment_is_not_removed(path: Path) -> None:
    executable(path / "python3.11", f'exec {sys.executable} "$@"')
    executable(path / "g++", "exit 0")
    (path.parent / "venv").mkdir()
    (path.parent / "venv" / "note").write_text("mine")
    assert "not a virtual environment; fix: set OCTO_VENV" in refusal("tools/test.sh", path)


@pytest.mark.parametrize(
    ("environment", "words"),
    [
        ({}, "no GPU found; fix: set GPUS_PER_NODE"),
        ({"NNODES": "2"}, "NNODES=2 needs MASTER_ADDR (address of node 0) and NODE_RANK (0..1)"),
        ({"NNODES": "two"}, "NNODES=two is not a number"),
        ({"GPUS_PER_NODE": "all"}, "GPUS_PER_NODE=all is not a number"),
        ({"GPUS_PER_NODE": "2"}, "torchrun is not on PATH; fix: activate the environment"),
    ],
)
def test_launching_on_nodes(path: Path, environment: dict[str, str], words: str) -> None:
    found = refusal("launch/torchrun.sh", path, "run.yaml", **environment)
    assert found.startswith(f"octo: error: {words}") and found.count("\n") == 1


def test_launching_on_a_port_in_use(path: Path) -> None:
    executable(path / "torchrun", "echo started")
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        found = refusal("launch/torchrun.sh", path, "run.yaml", GPUS_PER_NODE="2", MASTER_PORT=port)
    assert found.startswith(f"octo: error: port {port} is in use on this node; fix: set MASTER_PORT")
    assert "usage" in refusal("launch/torchrun.sh", path)
