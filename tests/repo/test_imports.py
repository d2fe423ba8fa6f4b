"""Which way imports run: the layout tells the architecture only while the arrows hold."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parents[2] / "megatron_octo"

ALLOWED = {
    "errors": set(),
    "units": {"errors"},
    "files": set(),
    "locations": {"errors"},
    "publish": {"errors", "files", "locations"},
    "progress": {"errors", "units"},
    "config": {"errors", "units"},
    "page": set(),
    "schedule": {"config"},
    "model": {"config"},
    "runtime": {"config", "progress"},
    "data": {"config", "progress", "evaluate", "page"},
    "checkpoint": {"config", "progress", "schedule", "model", "runtime", "data"},
    "convert": {"config", "progress", "schedule", "model", "runtime", "data", "checkpoint"},
    "train": {"config", "progress", "schedule", "model", "runtime", "data", "checkpoint"},
    "evaluate": {"config", "progress"},
    "rl": {"config", "progress", "schedule", "model", "runtime", "data", "checkpoint", "convert", "train", "evaluate"},
}
ALLOWED["campaign"] = set(ALLOWED)
ALLOWED["cli"] = set(ALLOWED)
EVERYWHERE = {"errors", "units", "files", "locations", "publish", "__version__"}

HEAVY = {
    "megatron": {"model", "runtime", "checkpoint", "train", "convert", "data"},
    "transformer_engine": {"model", "runtime"},
    "transformers": {"model", "convert", "data", "evaluate", "rl"},
    "openrlhf": {"rl"},
    "ray": {"rl", "data"},
}


def _modules() -> list[Path]:
    return sorted(path for path in PACKAGE.rglob("*.py") if path != PACKAGE / "__init__.py")


def _room(path: Path) -> str:
    first = path.relative_to(PACKAGE).parts[0]
    return first.removesuffix(".py")


def _imported(path: Path) -> list[str]:
    """Dotted names a file imports, at any depth of its functions."""
    names = []
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            own = node.module == "megatron_octo"
            names += [f"megatron_octo.{alias.name}" for alias in node.names] if own else [node.module]
    return names


@pytest.mark.parametrize("path", _modules(), ids=lambda path: str(path.relative_to(PACKAGE)))
def test_arrows(path: Path) -> None:
    room = _room(path)
    allowed = ALLOWED[room] | EVERYWHERE | {room}
    for name in _imported(path):
        first, *rest = name.split(".")
        if first == "megatron_octo" and rest:
            assert rest[0] in allowed, f"{room} must not import {name}"
        elif first in HEAVY:
            assert room in HEAVY[first], f"{room} must not import {name}"


def test_every_room_has_its_arrows() -> None:
    rooms = {_room(path) for path in _modules()}
    assert rooms <= set(ALLOWED), f"name the arrows of {rooms - set(ALLOWED)}"


def test_the_check_sees_a_wrong_arrow(tmp_path: Path) -> None:
    wrong = tmp_path / "wrong.py"
    wrong.write_text("def f():\n    from megatron_octo.campaign import engine\n    from megatron_octo import cli\n")
    assert _imported(wrong) == ["megatron_octo.campaign", "megatron_octo.cli"]


def test_light_import() -> None:
    """The configuration can be read on a machine without torch or megatron."""
    import subprocess
    import sys

    code = (
        "import sys, megatron_octo.config.run, megatron_octo.config.campaign, megatron_octo.config.check; "
        "print([m for m in ('torch', 'megatron', 'transformers', 'ray') if m in sys.modules])"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    assert found.stdout.strip() == "[]"
