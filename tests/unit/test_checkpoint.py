"""Seals, pointers, retention, and a list of tensors that cannot run code; without process groups."""

from __future__ import annotations

import json
import pickle
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from dist_files import Held

from megatron_octo.checkpoint import retain, store
from megatron_octo.checkpoint.dist import read_metadata
from megatron_octo.checkpoint.dist_write import write_model
from megatron_octo.checkpoint.retain import Policy, prune
from megatron_octo.checkpoint.seal import seal, seal_digest, verify_seal
from megatron_octo.errors import CheckpointError, StageFailed
from megatron_octo.schedule.fork import record_fork


def save(run_dir: Path, step: int) -> Path:
    """A checkpoint of arbitrary files, published as the trainer does it."""
    temporary = store.begin(run_dir, step)
    (temporary / "__0_0.distcp").write_bytes(bytes(range(256)) * step)
    (temporary / ".metadata").write_bytes(b"names")
    store.write_facts(temporary, {"step": step, "run_tokens": 100 * step, "tokens": 1000 + 100 * step})
    return store.publish(temporary, run_dir, step)


def test_a_published_checkpoint_is_sealed_and_pointed_at(tmp_path):
    path = save(tmp_path, 3)
    verify_seal(path)
    assert path.name == "step_00000003"
    assert store.latest_checkpoint(tmp_path) == path
    assert (tmp_path / "latest").read_text() == "step_00000003\n"
    assert set(json.loads((path / "seal.json").read_text())["files"]) == {".metadata", "__0_0.distcp", "run.json"}
    assert len(seal_digest(path)) == 64


def test_publishing_a_step_again_replaces_it(tmp_path):
    save(tmp_path, 3)
    (tmp_path / "checkpoints" / "step_00000003" / "old").touch()
    verify_seal(save(tmp_path, 3))


def test_pruning_keeps_the_newest_and_the_one_in_charge(tmp_path):
    for step in (1, 2, 3, 4):
        save(tmp_path, step)
    store.point_at(tmp_path, "step_00000001")
    assert prune(tmp_path, Policy(2)) == ["step_00000002"]
    assert [path.name for path in store.sealed_checkpoints(tmp_path)] == [
        "step_00000001", "step_00000003", "step_00000004",
    ]  # fmt: skip


def test_a_branch_that_leaves_while_another_checkpoint_is_removed_keeps_its_own(tmp_path, monkeypatch):
    for step in (1, 2, 3):
        save(tmp_path, step)

    def remove_slowly(checkpoint: Path) -> None:
        plain(checkpoint)
        run = SimpleNamespace(name="long", out=tmp_path / "long")
        assert record_fork(run, {"run": "long", "parent": tmp_path, "checkpoint": "step_00000002", "position": 1200})

    plain = retain.retire
    monkeypatch.setattr(retain, "retire", remove_slowly)
    assert prune(tmp_path, Policy(1)) == ["step_00000001"]
    verify_seal(tmp_path / "checkpoints" / "step_00000002")


def test_a_withdrawal_that_is_cut_off_leaves_no_doubtful_checkpoint_in_charge(tmp_path, monkeypatch):
    from megatron_octo.train import rewind
    from megatron_octo.train.facts import Trouble

    def killed(checkpoint: Path) -> None:
        plain(checkpoint)
        raise KeyboardInterrupt

    for step in (1, 2, 3):
        save(tmp_path, step)
    plain, trouble = rewind.retire, Trouble("a weight changed by itself", since=0)
    monkeypatch.setattr(rewind, "retire", killed)
    with pytest.raises(KeyboardInterrupt):
        rewind._target(tmp_path, trouble, 4)
    with pytest.raises(CheckpointError, match="not a sealed checkpoint here"):
        store.latest_checkpoint(tmp_path)
    monkeypatch.setattr(rewind, "retire", plain)
    with pytest.raises(StageFailed, match="no checkpoint to go back to"):
        rewind._target(tmp_path, trouble, 4)
    assert not store.has_checkpoint(tmp_path)


def test_what_a_run_is_cut_and_pruned_by_is_checked_against_the_seal(tmp_path):
    path = save(tmp_path, 3)
    assert store.sealed_facts(path)["step"] == 3
    facts = (path / "run.json").read_text()
    for damage, said in ((facts.replace("3", "1"), "has been altered"), (None, "no such file")):
        (path / "run.json").unlink() if damage is None else (path / "run.json").write_text(damage)
        with pytest.raises(CheckpointError, match=rf"run\.json: {said}"):
            store.sealed_facts(path)
    (path / "run.json").write_text(facts)
    content = json.loads((path / "seal.json").read_text())
    del content["files"]["run.json"]
    (path / "seal.json").write_text(json.dumps(content))
    with pytest.raises(CheckpointError, match="is not part of the sealed checkpoint"):
        store.sealed_facts(path)


def test_a_fork_position_names_its_checkpoint(tmp_path):
    for step in (1, 2, 3):
        save(tmp_path, step)
    assert store.checkpoint_at(tmp_path, None).name == "step_00000003"
    assert store.checkpoint_at(tmp_path, 1200).name == "step_00000002"
    assert store.checkpoint_at(tmp_path, 1150).name == "step_00000002"
    with pytest.raises(CheckpointError) as missing:
        store.checkpoint_at(tmp_path, 1301)
    assert "no checkpoint at 1301 tokens" in str(missing.value)
    assert "1100 (step_00000001), 1200 (step_00000002), 1300 (step_00000003)" in str(missing.value)
    with pytest.raises(CheckpointError, match="no such run directory"):
        store.checkpoint_at(tmp_path / "absent", None)


TENSORS = {
    "decoder.layers.0.weight": torch.arange(12, dtype=torch.float32).reshape(3, 4),
    "embedding.word_embeddings.weight": torch.full((2, 2), 1.5, dtype=torch.bfloat16),
}


def test_a_checkpoint_lists_its_tensors(tmp_path):
    write_model(tmp_path / "model", Held(TENSORS), {}, {})
    facts = read_metadata(tmp_path / "model")
    assert {name: (item.shape, item.dtype) for name, item in facts.items()} == {
        name: (tuple(tensor.shape), tensor.dtype) for name, tensor in TENSORS.items()
    }


class Trap:
    """Touches a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


class Evaluated:
    """Runs code through a builtin when it is unpickled."""

    def __reduce__(self):
        return eval, ("__import__('os').getpid()",)


@pytest.mark.parametrize("kind", ["call", "eval", "cut", "missing"])
def test_metadata_that_would_run_code_is_refused(tmp_path, kind):
    write_model(tmp_path / "model", Held(TENSORS), {}, {})
    path = tmp_path / "model" / ".metadata"
    sprung = tmp_path / "sprung"
    if kind == "missing":
        path.unlink()
    else:
        content = {"call": pickle.dumps(Trap(sprung)), "eval": pickle.dumps(Evaluated()), "cut": path.read_bytes()[:40]}
        path.write_bytes(content[kind])
    with pytest.raises(CheckpointError, match=r"\.metadata"):
        read_metadata(tmp_path / "model")
    assert not sprung.exists()


def test_the_store_needs_no_torch():
    rooms = "megatron_octo.checkpoint.store, megatron_octo.checkpoint.retain, megatron_octo.train.api"
    code = f"import sys, {rooms}; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], timeout=60).returncode == 0


def test_sealing_twice_gives_the_same_seal(tmp_path):
    path = save(tmp_path, 1)
    before = seal_digest(path)
    seal(path)
    assert seal_digest(path) == before
