"""Pickled weights are opened only when asked for, and nothing in them is ever run."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_octo.checkpoint.tensors import read
from megatron_octo.convert.hf_io import open_weights
from megatron_octo.convert.pickled import INDEX_FILE, SINGLE_FILE, PickledDirectory
from megatron_octo.convert.safetensors_io import SafetensorsDirectory
from megatron_octo.errors import DataError
from megatron_octo.locations import locate

ONE, TWO = torch.arange(6.0).view(2, 3), torch.arange(4.0).bfloat16()


class Bomb:
    """What a hostile file holds: a call that is made when it is unpickled."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.mark),)


def _is(directory: Path, **tensors: torch.Tensor) -> bool:
    source = open_weights(directory, allow_pickle=True)
    return isinstance(source, PickledDirectory) and all(
        source.dtype(name) == str(tensor.dtype).removeprefix("torch.")
        and torch.equal(read(source, name), tensor)
        and torch.equal(read(source, name, 1, 1), tensor[1:2])
        for name, tensor in tensors.items()
    )


def test_they_are_refused_unopened_unless_asked_for(tmp_path: Path) -> None:
    (tmp_path / SINGLE_FILE).write_bytes(b"cos\nsystem\n")
    with pytest.raises(DataError, match=r"pickled weights \(pytorch_model.bin\) and no safetensors"):
        open_weights(tmp_path)


def test_one_file_and_shards_are_read_by_rows(tmp_path: Path) -> None:
    (tmp_path / "one").mkdir()
    torch.save({"a": ONE, "b": TWO, "c": ONE.T}, tmp_path / "one" / SINGLE_FILE)
    assert _is(tmp_path / "one", a=ONE, b=TWO, c=ONE.T)
    (tmp_path / "two").mkdir()
    names = {"a": "pytorch_model-00001-of-00002.bin", "b": "pytorch_model-00002-of-00002.bin"}
    for name, tensor in (("a", ONE), ("b", TWO)):
        torch.save({name: tensor}, tmp_path / "two" / names[name])
    (tmp_path / "two" / INDEX_FILE).write_text(json.dumps({"weight_map": names}))
    assert _is(tmp_path / "two", a=ONE, b=TWO)
    (tmp_path / "two" / names["b"]).unlink()
    with pytest.raises(DataError, match=r"00002-of-00002.bin: missing"):
        open_weights(tmp_path / "two", allow_pickle=True)


def test_safetensors_are_preferred(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    save_file({"a": ONE}, tmp_path / "model.safetensors")
    (tmp_path / SINGLE_FILE).write_bytes(b"cos\nsystem\n")
    assert isinstance(open_weights(tmp_path, allow_pickle=True), SafetensorsDirectory)


@pytest.mark.parametrize("zipped", [True, False])
def test_a_call_in_a_pickle_is_not_made(tmp_path: Path, zipped: bool) -> None:
    mark = tmp_path / "ran"
    torch.save({"a": ONE, "b": Bomb(mark)}, tmp_path / SINGLE_FILE, _use_new_zipfile_serialization=zipped)
    with pytest.raises(
        DataError, match=r"pytorch_model.bin: (asks for more than tensors|not weights that torch saved)"
    ):
        open_weights(tmp_path, allow_pickle=True)
    assert not mark.exists()
    torch.load(tmp_path / SINGLE_FILE, weights_only=False)
    assert mark.exists(), "the file would have done harm"


@pytest.mark.parametrize(
    ("held", "message"),
    [
        ({"a": ONE, "epoch": 3}, "'epoch' is int"),
        ({"a": torch.arange(3)}, "'a' is int64"),
        ({"a": ONE.to_sparse()}, "'a' is sparse_coo"),
        ([ONE], "is list"),
        ({3: ONE}, "3 is float32; weights are named"),
    ],
)
def test_only_weights_are_taken(tmp_path: Path, held: Any, message: str) -> None:
    torch.save(held, tmp_path / SINGLE_FILE)
    with pytest.raises(DataError, match=message):
        open_weights(tmp_path, allow_pickle=True)


def test_what_is_damaged_or_elsewhere_is_named(tmp_path: Path) -> None:
    (tmp_path / SINGLE_FILE).write_bytes(b"PK\x03\x04 nothing")
    with pytest.raises(DataError, match=r"pytorch_model.bin: not weights that torch saved"):
        open_weights(tmp_path, allow_pickle=True)
    with pytest.raises(DataError, match="no such directory"):
        open_weights(tmp_path / "nowhere", allow_pickle=True)
    with pytest.raises(DataError, match="from this machine only"):
        open_weights(locate("memory://nowhere"), allow_pickle=True)
