"""A save is judged by what it saved: whatever happens to older checkpoints beside it is told, and ends no run."""

from __future__ import annotations

from types import SimpleNamespace
from unittest import mock

import pytest
import torch
from megatron.core.dist_checkpointing.mapping import ShardedTensor

from megatron_octo.checkpoint import store
from megatron_octo.checkpoint.retain import Policy
from megatron_octo.checkpoint.save import Saver
from megatron_octo.checkpoint.seal import verify_seal
from megatron_octo.errors import EnvironmentProblem
from megatron_octo.runtime.groups import initialize_single, shutdown
from megatron_octo.train.hooks.save import SaveCheckpoints


class Model(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.arange(6.0))

    def sharded_state_dict(self, metadata=None):
        return {"weight": ShardedTensor.from_rank_offsets("weight", self.weight.data)}


@pytest.fixture(scope="module", autouse=True)
def one_process():
    initialize_single(1)
    yield
    shutdown()


@pytest.mark.parametrize("background", [False, True])
def test_an_old_checkpoint_that_cannot_be_removed_ends_no_run(tmp_path, capsys, background):
    saver = Saver(tmp_path, [Model()], None, Policy(1))
    saver.save({"step": 1})
    (tmp_path / "checkpoints" / ".old-step_00000001").write_text("a file stands where it would be moved to")
    saver.save({"step": 2}, background=background)
    saver.complete()
    assert store.latest_checkpoint(tmp_path).name == "step_00000002"
    assert [path.name for path in store.sealed_checkpoints(tmp_path)] == ["step_00000001", "step_00000002"]
    for path in store.sealed_checkpoints(tmp_path):
        verify_seal(path)
    said = capsys.readouterr().err
    assert said.startswith("octo: note: an old checkpoint stays, it cannot be removed (") and said.count("\n") == 1
    (tmp_path / "checkpoints" / ".old-step_00000001").unlink()
    saver.save({"step": 3})
    assert [path.name for path in store.sealed_checkpoints(tmp_path)] == ["step_00000003"]


def test_a_run_learns_at_its_start_that_its_checkpoints_will_not_fit(tmp_path, capsys, monkeypatch):
    saver = Saver(tmp_path, [Model()], None, Policy(keep=3))
    need = int(saver._bytes * 1.1)

    def free(count: int) -> None:
        monkeypatch.setattr("shutil.disk_usage", lambda path: SimpleNamespace(free=count))

    free(need - need // 5)
    with pytest.raises(EnvironmentProblem, match="no space for a checkpoint of about .* nothing had been saved before"):
        saver.check_room()
    free(2 * need)
    saver.check_room()
    assert "checkpoint.keep=3 and the one being written need" in capsys.readouterr().err
    free(4 * need)
    saver.check_room()
    saver.save({"step": 1})
    free(3 * need)  # one of the three is there
    saver.check_room()
    assert capsys.readouterr().err == ""


def test_the_start_of_a_run_looks_for_room(tmp_path, monkeypatch):
    saver = mock.Mock()
    monkeypatch.setattr("megatron_octo.train.hooks.save.Saver", lambda *_: saver)
    state = mock.Mock(step=0)
    state.run.timeout_minutes = 1.0
    SaveCheckpoints().open(state)
    saver.check_room.assert_called_once_with()
