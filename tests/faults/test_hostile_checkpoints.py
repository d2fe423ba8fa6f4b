"""A sealed checkpoint somebody else made, in the trainer's load: it runs nothing and leads nowhere else."""

from __future__ import annotations

import io
import pickle
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from megatron.core.dist_checkpointing.mapping import ShardedObject, ShardedTensor

from megatron_octo.checkpoint import store
from megatron_octo.checkpoint.part import write_parts
from megatron_octo.checkpoint.retain import Policy, prune
from megatron_octo.checkpoint.save import load_checkpoint
from megatron_octo.checkpoint.seal import seal
from megatron_octo.checkpoint.sharded import Sharder
from megatron_octo.errors import CheckpointError
from megatron_octo.runtime.groups import initialize_single, shutdown

OPTIMIZER = SimpleNamespace(reload_model_params=lambda weights: None)


class Trap:
    """Touches a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


class Holder(torch.nn.Module):
    """A model of one weight that also keeps an object in its checkpoints, as layers with FP8 do."""

    def __init__(self, kept: object) -> None:
        super().__init__()
        self.weight, self.kept = torch.nn.Parameter(torch.arange(6.0)), kept

    def sharded_state_dict(self, metadata=None):
        weight = ShardedTensor.from_rank_offsets("weight", self.weight.data)
        return {"weight": weight, "kept": ShardedObject("kept", self.kept, (1,), (0,))}


class Scaled(Holder):
    """Unpickles its state as TransformerEngine's layers do."""

    def get_extra_state(self):
        return self.kept

    def set_extra_state(self, state):
        pickle.loads(state.numpy().tobytes())

    def sharded_state_dict(self, metadata=None):
        kept = super().sharded_state_dict(metadata)
        return {"weight": kept["weight"], "_extra_state": kept["kept"]}


@pytest.fixture(scope="module", autouse=True)
def one_process():
    initialize_single(1)
    yield
    shutdown()


def saved(folder: Path, kept: object = None, kind: type[Holder] = Holder) -> Path:
    checkpoint = folder / "checkpoints" / "step_00000001"
    checkpoint.mkdir(parents=True)
    model = kind(torch.ones(3) if kept is None else kept)
    write_parts(checkpoint, Sharder([model], None).part())
    store.write_facts(checkpoint, {"step": 1})
    return checkpoint


def load(checkpoint: Path, kind: type[Holder] = Holder) -> Holder:
    seal(checkpoint)  # whoever can write a file can seal it
    model = kind(torch.zeros(3))
    with torch.no_grad():
        model.weight.zero_()
    load_checkpoint(checkpoint, [model], OPTIMIZER, moments=False)
    return model


def test_an_honest_checkpoint_loads(tmp_path):
    assert load(saved(tmp_path)).weight.tolist() == [0, 1, 2, 3, 4, 5]


@pytest.mark.parametrize("form", ["archive", "pickle"])
def test_common_state_that_would_run_code_is_refused(tmp_path, monkeypatch, form):
    monkeypatch.setenv("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "1")  # must not decide it
    checkpoint, sprung = saved(tmp_path), tmp_path / "sprung"
    if form == "archive":
        torch.save({"optimizer": Trap(sprung)}, checkpoint / "common.pt")
    else:
        (checkpoint / "common.pt").write_bytes(pickle.dumps(Trap(sprung)))
    with pytest.raises(CheckpointError, match=r"common\.pt: cannot be trusted"):
        load(checkpoint)
    assert not sprung.exists()


def test_an_object_that_would_run_code_is_refused(tmp_path):
    sprung = tmp_path / "sprung"
    checkpoint = saved(tmp_path, Trap(sprung))
    with pytest.raises(CheckpointError, match="does not fit this model"):
        load(checkpoint)
    assert not sprung.exists()


def test_a_layers_state_that_would_run_code_is_refused(tmp_path):
    sprung = tmp_path / "sprung"
    state = torch.frombuffer(bytearray(pickle.dumps({"recipe": Trap(sprung)})), dtype=torch.uint8)
    checkpoint = saved(tmp_path, state, Scaled)
    with pytest.raises(CheckpointError, match=r"cannot be trusted \(_extra_state: it names pathlib"):
        load(checkpoint, Scaled)
    assert not sprung.exists()


class Wider(Holder):
    """Has one weight more."""

    def sharded_state_dict(self, metadata=None):
        more = ShardedTensor.from_rank_offsets("bias", self.weight.data.clone())
        return {**super().sharded_state_dict(metadata), "bias": more}


def test_weights_that_the_model_has_no_place_for_are_not_left_out(tmp_path):
    with pytest.raises(CheckpointError, match="holds 1 tensor that this model has no place for: bias"):
        load(saved(tmp_path, kind=Wider))


def test_a_list_of_tensors_that_would_run_code_is_refused(tmp_path):
    checkpoint, sprung = saved(tmp_path), tmp_path / "sprung"
    (checkpoint / ".metadata").write_bytes(pickle.dumps(Trap(sprung)))
    with pytest.raises(CheckpointError, match=r"\.metadata: cannot be trusted"):
        load(checkpoint)
    assert not sprung.exists()


@pytest.mark.parametrize(
    "content", ["[]", "{}", "{", '{"sharded_backend": "zarr", "sharded_backend_version": 1}', None]
)
def test_a_checkpoint_of_another_format_is_refused(tmp_path, content):
    checkpoint = saved(tmp_path)
    path = checkpoint / "metadata.json"
    path.unlink() if content is None else path.write_text(content)
    with pytest.raises(CheckpointError, match=r"metadata\.json: .*the trainer reads torch_dist of version 1"):
        load(checkpoint)


@pytest.mark.parametrize("elsewhere", ["../outside.distcp", "/etc/hostname", "folder/__0_0.distcp"])
def test_a_path_out_of_the_checkpoint_is_refused(tmp_path, elsewhere):
    checkpoint = saved(tmp_path)
    (tmp_path / "checkpoints" / "outside.distcp").write_bytes((checkpoint / "__0_0.distcp").read_bytes())
    metadata = pickle.load(io.BytesIO((checkpoint / ".metadata").read_bytes()))
    for stored in metadata.storage_data.values():
        stored.relative_path = elsewhere
    (checkpoint / ".metadata").write_bytes(pickle.dumps(metadata))
    with pytest.raises(CheckpointError, match="names no file of this checkpoint"):
        load(checkpoint)


def test_a_link_among_checkpoints_is_removed_and_not_what_it_points_to(tmp_path):
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    (elsewhere / "seal.json").write_text("{}")
    run = tmp_path / "run"
    for step in (2, 3):
        directory = store.begin(run, step)
        store.write_facts(directory, {"step": step})
        store.publish(directory, run, step)
    (run / "checkpoints" / "step_00000001").symlink_to(elsewhere)
    assert prune(run, Policy(1)) == ["step_00000001", "step_00000002"]
    store.remove_leftovers(run)
    assert [path.name for path in (run / "checkpoints").iterdir()] == ["step_00000003"]
    assert (elsewhere / "seal.json").exists()
