"""Any run of rows of a torch_dist tensor, however its layout cut it; and files that do not hold what they should."""

from __future__ import annotations

import io
import itertools
import os
import pickle
import zipfile
from collections import OrderedDict
from pathlib import Path

import pytest
import torch
from dist_files import store
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, Metadata, MetadataIndex
from upath import UPath

from megatron_octo.checkpoint.dist import Place, TorchDist, read_metadata
from megatron_octo.checkpoint.record import Unreadable, find_values
from megatron_octo.checkpoint.tensors import read
from megatron_octo.errors import CheckpointError

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


@st.composite
def cuts(draw: st.DrawFn) -> tuple[torch.Tensor, list, int, int]:
    """A tensor, boxes that tile it, and a run of rows."""
    shape = draw(st.lists(st.integers(1, 6), min_size=1, max_size=3))
    edges = [sorted({0, n, *draw(st.lists(st.integers(0, n), max_size=2))}) for n in shape]
    boxes = list(itertools.product(*(list(itertools.pairwise(edge)) for edge in edges)))
    rows = draw(st.integers(0, shape[0]))
    tensor = torch.randn(shape).to(draw(st.sampled_from(DTYPES)))
    listed = [(tuple(a for a, _ in box), tuple(b - a for a, b in box)) for box in boxes]
    return tensor, listed, draw(st.integers(0, shape[0] - rows)), rows


@settings(max_examples=60, deadline=None)
@given(cut=cuts())
def test_any_rows_of_any_cut_are_the_tensors_own(tmp_path_factory, cut):
    tensor, boxes, start, rows = cut
    directory = tmp_path_factory.mktemp("cut")
    store(directory, {"x": tensor}, {"x": boxes})
    source = TorchDist(directory)
    assert source.shapes() == {"x": tuple(tensor.shape)}
    assert torch.equal(read(source, "x", start, rows), tensor[start : start + rows])
    assert torch.equal(read(source, "x"), tensor)
    if tensor.dim() > 1:  # the same file as a stack of layers
        layer = tensor.shape[0] - 1
        stacked = TorchDist(directory, {"last": Place("x", layer)})
        assert torch.equal(read(stacked, "last"), tensor[layer])
        assert read(stacked, "last").dtype == tensor.dtype


STACK = {"layers.w": torch.arange(24.0).reshape(3, 2, 4), "head": torch.arange(6.0), "optimizer.m": torch.ones(2)}


def test_places_give_names_and_forget_nothing(tmp_path):
    store(tmp_path, STACK, {})
    places = {"head.weight": Place("head"), "layers.0.w": Place("layers.w", 0), "layers.9.w": Place("layers.w", 9)}
    source = TorchDist(tmp_path, {**places, "bias": Place("bias")})
    assert source.shapes() == {
        "head.weight": (6,), "layers.0.w": (2, 4), "layers.w[1]": (2, 4), "layers.w[2]": (2, 4),
    }  # fmt: skip
    assert torch.equal(read(source, "layers.w[2]"), STACK["layers.w"][2])
    assert set(TorchDist(tmp_path).shapes()) == {"head", "layers.w"}
    assert set(TorchDist(tmp_path, optimizer=True).shapes()) == set(STACK)
    assert set(read_metadata(tmp_path)) == {"head", "layers.w"}


def test_a_remote_checkpoint_reads_like_a_local_one(tmp_path):
    store(tmp_path, STACK, {"layers.w": [((0, 0, 0), (3, 2, 1)), ((0, 0, 1), (3, 2, 3))]})
    remote = UPath("memory://rows/checkpoint")
    for path in tmp_path.iterdir():
        (remote / path.name).write_bytes(path.read_bytes())
    assert torch.equal(read(TorchDist(remote), "layers.w"), STACK["layers.w"])
    (remote / "__1_0.distcp").unlink()
    with pytest.raises(CheckpointError, match=r"__1_0\.distcp: no such file"):
        read(TorchDist(remote), "layers.w")


def shard(directory: Path) -> Path:
    store(directory, {"x": torch.arange(40.0).reshape(8, 5)}, {})
    return directory / "__0_0.distcp"


def test_a_missing_or_cut_file_is_named(tmp_path):
    path = shard(tmp_path)
    os.truncate(path, path.stat().st_size // 2)
    with pytest.raises(CheckpointError, match=r"__0_0\.distcp: ends at byte .*tensor 'x'"):
        read(TorchDist(tmp_path), "x")
    path.unlink()
    with pytest.raises(CheckpointError, match=r"__0_0\.distcp: no such file \(tensor 'x'\)"):
        read(TorchDist(tmp_path), "x")


def edited(directory: Path, change) -> None:
    """Change the unpickled list of tensors of a checkpoint."""
    path = directory / ".metadata"
    metadata: Metadata = pickle.loads(path.read_bytes())
    change(metadata, metadata.state_dict_metadata["x"], next(iter(metadata.storage_data.values())))
    path.write_bytes(pickle.dumps(metadata))


def another_shape(_metadata, facts, _stored):
    facts.size = facts.chunks[0].sizes = torch.Size((5, 8))


def as_much_twice_as_missing(metadata, facts, stored):
    facts.chunks = [
        ChunkStorageMetadata(torch.Size((start, 0)), torch.Size((rows, 5))) for start, rows in ((0, 5), (3, 3))
    ]
    metadata.storage_data = {MetadataIndex("x", chunk.offsets): stored for chunk in facts.chunks}


LIES = {
    "a hole": (lambda m, facts, s: setattr(facts, "size", torch.Size((9, 5))), "do not cover it exactly once"),
    "an overlap": (lambda m, facts, s: facts.chunks.append(facts.chunks[0]), "do not cover it exactly once"),
    "an overlap and a hole": (as_much_twice_as_missing, "do not cover it exactly once"),
    "another shape": (another_shape, "holds [8, 5] float32, listed is [5, 8] float32"),
    "another dtype": (
        lambda m, facts, s: setattr(facts.properties, "dtype", torch.float16), "listed is [8, 5] float16",
    ),
    "a file elsewhere": (lambda m, f, stored: setattr(stored, "relative_path", "../secret"), "names no file of this"),
    "no file": (lambda metadata, f, s: metadata.storage_data.clear(), "names no file of this"),
    "a filter": (lambda m, f, stored: setattr(stored, "transform_descriptors", ["zstd"]), "stored through zstd"),
    "a place no file has": (lambda m, f, stored: setattr(stored, "offset", 2**62), "has no byte 4611686018427"),
    "a place no number has": (lambda m, f, stored: setattr(stored, "offset", 2**70), "it is not one saved tensor"),
    "another place": (lambda m, f, stored: setattr(stored, "offset", stored.offset + 7), ".distcp"),
}  # fmt: skip


@pytest.mark.parametrize("lie", LIES)
def test_a_list_of_tensors_that_lies_is_refused(tmp_path, lie):
    shard(tmp_path)
    change, said = LIES[lie]
    edited(tmp_path, change)
    with pytest.raises(CheckpointError) as refused:
        read(TorchDist(tmp_path), "x")
    assert said in str(refused.value)
    assert "tensor 'x'" in str(refused.value)


def archive(value, packed: int = zipfile.ZIP_STORED, **changes: bytes | None) -> io.BytesIO:
    """What `torch.save` writes, with records replaced (None: left out)."""
    plain, changed = io.BytesIO(), io.BytesIO()
    torch.save(value, plain)
    with zipfile.ZipFile(plain) as source, zipfile.ZipFile(changed, "w", packed) as target:
        for entry in source.infolist():
            content = changes.get(entry.filename.partition("/")[2].replace("/", "_").replace(".", "_"), b"same")
            if content is not None:
                target.writestr(entry.filename, source.read(entry) if content == b"same" else content)
    return changed


class Trap:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


WEIGHT = torch.arange(12.0).reshape(3, 4)
ARCHIVES = {
    "not row-major": (lambda path: archive(WEIGHT.reshape(4, 3).t()), "row-major"),
    "a part of another": (lambda path: archive(torch.zeros(13)[1:].reshape(3, 4)), "row-major"),
    "values missing": (lambda path: archive(WEIGHT, data_0=None), "not one saved tensor"),
    "values cut": (lambda path: archive(WEIGHT, data_0=bytes(40)), "40 bytes of values"),
    "compressed": (lambda path: archive(WEIGHT, zipfile.ZIP_DEFLATED), "compressed"),
    "other byte order": (lambda path: archive(WEIGHT, byteorder=b"big"), "little-endian"),
    "two tensors": (lambda path: archive([WEIGHT, WEIGHT]), "not one saved tensor"),
    "a huge pickle": (lambda path: archive(WEIGHT, data_pkl=bytes(2 << 20)), "2097152 bytes long"),
    "code": (lambda path: archive(WEIGHT, data_pkl=pickle.dumps(Trap(path))), "it names"),
    "no archive": (lambda path: io.BytesIO(bytes(2000)), "zip"),
}


@pytest.mark.parametrize("kind", ARCHIVES)
def test_an_archive_of_anything_but_the_tensor_is_refused(tmp_path, kind):
    make, said = ARCHIVES[kind]
    path = tmp_path / "file"
    path.write_bytes(make(tmp_path / "sprung").getvalue())
    with pytest.raises(Unreadable, match=said):
        find_values(path, 0, path.stat().st_size, (3, 4), torch.float32)
    assert not (tmp_path / "sprung").exists()


def test_a_damaged_byte_reads_or_is_refused_in_words(tmp_path):
    """A seal finds damage first; without one, none of what describes a tensor leads to a traceback."""
    shards = (shard(tmp_path), tmp_path / ".metadata")
    for path in shards:
        intact = path.read_bytes()
        for position in range(0, len(intact), 3):
            path.write_bytes(intact[:position] + bytes([intact[position] ^ 0x15]) + intact[position + 1 :])
            try:
                source = TorchDist(tmp_path)
                for name in source.shapes():
                    read(source, name)
            except CheckpointError as error:
                assert str(tmp_path) in str(error)
        path.write_bytes(intact)


class Odd:
    """Is saved as a tensor of another description."""

    def __init__(self, *description: object) -> None:
        self.description = description

    def __reduce__(self) -> tuple:
        return torch._utils._rebuild_tensor_v2, (*self.description, False, OrderedDict())


@pytest.mark.parametrize(("shape", "strides"), [(40, (1,)), ((40,), None), ((40,), ("x",)), ((40,), (1, 1))])
def test_a_tensor_described_by_nonsense_is_refused(tmp_path, shape, strides):
    torch.save(Odd(torch.zeros(40).storage(), 0, shape, strides), path := tmp_path / "x")
    with pytest.raises(Unreadable):
        find_values(path, 0, path.stat().st_size, (40,), torch.float32)
