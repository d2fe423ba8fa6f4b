"""Damaged checkpoints are refused by name; a kill anywhere in a save leaves the last good one in charge."""

from __future__ import annotations

import json
import os
import shutil
import signal
from pathlib import Path
from unittest import mock

import pytest

from megatron_octo.checkpoint import retain, seal, store
from megatron_octo.errors import CheckpointError

SHARD = "__0_0.distcp"


def save(run_dir: Path, step: int, keep: int = 9) -> Path:
    temporary = store.begin(run_dir, step)
    for name in (SHARD, "__1_0.distcp"):
        (temporary / name).write_bytes(bytes(range(256)) * step)
    (temporary / ".metadata").write_bytes(b"names")
    store.write_facts(temporary, {"step": step})
    path = store.publish(temporary, run_dir, step)
    retain.prune(run_dir, retain.Policy(keep))
    return path


@pytest.fixture
def checkpoint(tmp_path):
    save(tmp_path, 4)
    return save(tmp_path, 8)


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


DAMAGE = {
    "flipped byte": (lambda path: flip(path / SHARD), SHARD, "has been altered"),
    "flipped byte in the metadata": (lambda path: flip(path / ".metadata"), ".metadata", "has been altered"),
    "flipped byte in the facts": (lambda path: flip(path / "run.json"), "run.json", "has been altered"),
    "truncated shard": (lambda path: os.truncate(path / SHARD, 100), SHARD, "holds 100 bytes, sealed with 2048"),
    "missing shard": (lambda path: (path / SHARD).unlink(), SHARD, "is missing"),
    "missing metadata": (lambda path: (path / ".metadata").unlink(), ".metadata", "is missing"),
    "shard of another step": (
        lambda path: shutil.copy(path.with_name("step_00000004") / SHARD, path / SHARD), SHARD, "holds 1024 bytes",
    ),
    "foreign file": (lambda path: (path / "extra").touch(), "extra", "is not part of the sealed checkpoint"),
    "no seal": (lambda path: (path / "seal.json").unlink(), "step_00000008", "no seal.json"),
    "damaged seal": (lambda path: (path / "seal.json").write_text("{"), "seal.json", "is damaged"),
    "seal of another form": (lambda path: (path / "seal.json").write_text("[]"), "seal.json", "is damaged"),
}  # fmt: skip


@pytest.mark.parametrize("kind", DAMAGE)
def test_damage_is_refused_by_name(checkpoint, kind):
    seal.verify_seal(checkpoint)
    damage, name, said = DAMAGE[kind]
    damage(checkpoint)
    with pytest.raises(CheckpointError) as refused:
        seal.verify_seal(checkpoint)
    assert name in refused.value.what
    assert said in refused.value.what
    assert refused.value.fix
    seal.verify_seal(checkpoint.with_name("step_00000004"))


@pytest.mark.parametrize(
    ("text", "said"),
    [("", "is empty"), ("\x00\xff nonsense", "nonsense"), ("step_00000099", "names 'step_00000099'"), ("..", "'..'")],
)
def test_a_bad_pointer_says_what_exists(checkpoint, text, said):
    run_dir = checkpoint.parent.parent
    (run_dir / "latest").write_text(text)
    with pytest.raises(CheckpointError) as refused:
        store.latest_checkpoint(run_dir)
    assert said in refused.value.what
    assert "step_00000004, step_00000008" in refused.value.rule


def test_a_pointer_to_an_unsealed_checkpoint_is_refused(checkpoint):
    (checkpoint / "seal.json").unlink()
    with pytest.raises(CheckpointError, match="not a sealed checkpoint"):
        store.latest_checkpoint(checkpoint.parent.parent)


def test_without_a_pointer_the_newest_sealed_checkpoint_counts(checkpoint):
    run_dir = checkpoint.parent.parent
    (run_dir / "latest").unlink()
    assert store.latest_checkpoint(run_dir) == checkpoint


def test_nothing_saved_is_an_error_of_its_own(tmp_path):
    with pytest.raises(CheckpointError, match="no checkpoint"):
        store.latest_checkpoint(tmp_path)


KILL_POINTS = {
    "before any byte": ("megatron_octo.checkpoint.store.write_facts", 1),
    "while sealing": ("megatron_octo.checkpoint.seal._entry", 1),
    "before the seal is written": ("megatron_octo.checkpoint.seal.write_text", 1),
    "before the seal gets its name": ("pathlib.Path.replace", 1),
    "before the rename": ("megatron_octo.checkpoint.store.retire", 1),
    "between rename and pointer": ("megatron_octo.checkpoint.store.point_at", 1),
    "while the pointer is written": ("pathlib.Path.replace", 2),
    "before pruning": ("megatron_octo.checkpoint.retain.retire", 1),
    "while pruning": ("shutil.rmtree", 3),
}


def killed_at(target: str, call: int, run_dir: Path) -> int:
    """Save step 12 in a child that gets SIGKILL instead of the given call; returns its wait status."""
    child = os.fork()
    if child == 0:
        left = [call]

        def die(*_arguments, **_options):
            left[0] -= 1
            if left[0] == 0:
                os.kill(os.getpid(), signal.SIGKILL)
            return mock.DEFAULT

        original = _resolve(target)
        with mock.patch(target, autospec=True, side_effect=_before(die, original)):
            save(run_dir, 12, keep=2)
        os._exit(0)
    return os.waitpid(child, 0)[1]


def _resolve(target: str):
    import pkgutil

    module, _, name = target.rpartition(".")
    return getattr(pkgutil.resolve_name(module), name)


def _before(die, original):
    def call(*arguments, **options):
        die()
        return original(*arguments, **options)

    return call


@pytest.mark.parametrize("point", KILL_POINTS)
def test_a_kill_while_saving_loses_nothing(checkpoint, point):
    run_dir = checkpoint.parent.parent
    assert os.WTERMSIG(killed_at(*KILL_POINTS[point], run_dir)) == signal.SIGKILL
    latest = store.latest_checkpoint(run_dir)
    late = ("before pruning", "while pruning")
    assert latest.name == ("step_00000012" if point in late else "step_00000008")
    for path in store.sealed_checkpoints(run_dir):
        seal.verify_seal(path)
    store.remove_leftovers(run_dir)
    save(run_dir, 12, keep=2)
    assert [path.name for path in (run_dir / "checkpoints").iterdir() if path.name.startswith(".")] == []
    assert json.loads((store.latest_checkpoint(run_dir) / "run.json").read_text()) == {"step": 12}
    assert len(store.sealed_checkpoints(run_dir)) == 2
