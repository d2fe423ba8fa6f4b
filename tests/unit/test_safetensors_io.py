"""Safetensors are read by offset and written block by block; a damaged file is refused by name."""

from __future__ import annotations

import json
import struct
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save, save_file

from megatron_octo.checkpoint.tensors import BLOCK_BYTES, read
from megatron_octo.convert.safetensors_io import (
    INDEX_FILE,
    SINGLE_FILE,
    SafetensorsDirectory,
    read_header,
    write_safetensors,
)
from megatron_octo.errors import DataError
from megatron_octo.locations import locate
from megatron_octo.publish import publishing

ONE, TWO = torch.ones(2, 3), torch.arange(4.0)
TENSORS = {
    "odd": torch.tensor([1.5, -0.0, float("nan"), 1e-42]),
    "half": torch.randn(3, 2, 5, generator=torch.Generator().manual_seed(0)).half(),
    "brain": torch.randn(7, 3, generator=torch.Generator().manual_seed(1)).bfloat16(),
    "none": torch.empty(0, 4),
}


class Memory:
    """Tensors of a mapping as a source, which notes what is asked of it."""

    where = "memory"

    def __init__(self, tensors: dict[str, torch.Tensor]) -> None:
        self.tensors = tensors
        self.asked: list[tuple[str, int, int]] = []

    def shapes(self) -> dict[str, tuple[int, ...]]:
        return {name: tuple(tensor.shape) for name, tensor in self.tensors.items()}

    def dtype(self, name: str) -> str:
        return str(self.tensors[name].dtype).removeprefix("torch.")

    def fill(self, name: str, start: int, out: torch.Tensor) -> None:
        self.asked.append((name, start, len(out)))
        out.copy_(self.tensors[name][start : start + len(out)])


def _write(target: Path, source: Any, shard_bytes: float = 1e9) -> list[str]:
    with publishing(target, {}, "done") as partial:
        names = write_safetensors(partial, source, shard_bytes)
        (partial.directory / "done").touch()
    return names


def _same(left: torch.Tensor, right: torch.Tensor) -> bool:
    """Equal bit for bit, NaN and signs of zero included."""
    bits = {2: torch.int16, 4: torch.int32}[left.element_size()]
    return left.dtype == right.dtype and torch.equal(left.view(bits), right.view(bits))


def _shards(directory: Path, parts: list[dict[str, torch.Tensor]], listed: dict[str, str] | None = None) -> Path:
    directory.mkdir()
    names = [f"model-{number:05d}-of-{len(parts):05d}.safetensors" for number in range(1, len(parts) + 1)]
    for name, part in zip(names, parts, strict=True):
        save_file(part, directory / name)
    own = {tensor: name for name, part in zip(names, parts, strict=True) for tensor in part}
    (directory / INDEX_FILE).write_text(json.dumps({"weight_map": listed or own}))
    return directory


def test_what_is_written_safetensors_loads_bit_for_bit(tmp_path: Path) -> None:
    assert _write(tmp_path / "out", Memory(TENSORS)) == [SINGLE_FILE]
    loaded = load_file(tmp_path / "out" / SINGLE_FILE)
    assert set(loaded) == set(TENSORS)
    assert all(_same(loaded[name], TENSORS[name]) for name in TENSORS)
    (length,) = struct.unpack("<Q", (tmp_path / "out" / SINGLE_FILE).read_bytes()[:8])
    assert length % 8 == 0


@pytest.mark.parametrize("remote", [False, True])
def test_what_safetensors_wrote_is_read_by_rows(tmp_path: Path, remote: bool) -> None:
    directory = locate(f"memory:/{tmp_path}") if remote else tmp_path
    (directory / SINGLE_FILE).write_bytes(save(TENSORS, {"format": "pt"}))
    source = SafetensorsDirectory(directory)
    assert source.where == str(directory)
    for name, tensor in TENSORS.items():
        assert source.shapes()[name] == tuple(tensor.shape)
        assert source.dtype(name) == str(tensor.dtype).removeprefix("torch.")
        for start in range(len(tensor)):
            assert _same(read(source, name, start, 1), tensor[start : start + 1])
        assert _same(read(source, name), tensor)


def test_shards_close_by_size_and_the_index_names_them(tmp_path: Path) -> None:
    sizes = {"a": 10, "big": 100, "c": 4, "d": 4}
    tensors = {name: torch.full((size,), float(size)).bfloat16() for name, size in sizes.items()}
    names = _write(tmp_path / "out", Memory(tensors), shard_bytes=32)
    assert names == [*(f"model-0000{number}-of-00003.safetensors" for number in (1, 2, 3)), INDEX_FILE]
    source = SafetensorsDirectory(tmp_path / "out")
    assert list(source.shapes()) == list(sizes)
    assert all(_same(read(source, name), tensor) for name, tensor in tensors.items())
    index = json.loads((tmp_path / "out" / INDEX_FILE).read_text())
    assert index["metadata"]["total_size"] == 2 * 118
    assert index["weight_map"]["c"] == index["weight_map"]["d"] == names[2]


def test_a_long_tensor_is_asked_for_in_blocks(tmp_path: Path) -> None:
    rows = BLOCK_BYTES // 4096
    source = Memory({"long": torch.arange((rows + 3) * 1024, dtype=torch.int32).view(torch.float32).view(-1, 1024)})
    _write(tmp_path / "out", source)
    assert source.asked == [("long", 0, rows), ("long", rows, 3)]
    assert _same(load_file(tmp_path / "out" / SINGLE_FILE)["long"], source.tensors["long"])


def test_an_interrupted_writer_goes_on_shard_by_shard(tmp_path: Path) -> None:
    tensors = {name: torch.full((8,), float(ord(name))) for name in "abc"}

    class Interrupted(Memory):
        def fill(self, name: str, start: int, out: torch.Tensor) -> None:
            if name == "b":
                raise KeyboardInterrupt
            super().fill(name, start, out)

    with pytest.raises(KeyboardInterrupt):
        _write(tmp_path / "out", Interrupted(tensors), shard_bytes=32)
    again = Memory(tensors)
    assert len(_write(tmp_path / "out", again, shard_bytes=32)) == 4
    assert [name for name, *_ in again.asked] == ["b", "c"]
    source = SafetensorsDirectory(tmp_path / "out")
    assert all(_same(read(source, name), tensor) for name, tensor in tensors.items())


def test_other_dtypes_are_neither_written_nor_read(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="memory: ids has dtype int64"):
        _write(tmp_path / "out", Memory({"a": ONE, "ids": torch.arange(3)}))
    assert list(tmp_path.iterdir()) == []
    save_file({"a": ONE, "small": ONE.to(torch.float8_e4m3fn)}, tmp_path / SINGLE_FILE)
    with pytest.raises(DataError, match="small has dtype 'F8_E4M3'; weights are one of F32, BF16, F16"):
        SafetensorsDirectory(tmp_path)


def _head(entries: Any, values: bytes = b"", length: int | None = None) -> bytes:
    text = entries if isinstance(entries, bytes) else json.dumps(entries).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + values


def _entry(start: int, end: int, shape: Any = None, dtype: str = "F32") -> dict[str, Any]:
    return {"dtype": dtype, "shape": [(end - start) // 4] if shape is None else shape, "data_offsets": [start, end]}


A, B = _entry(0, 8), _entry(8, 16)
TWICE = b'{"a":' + json.dumps(A).encode() + b',"a":' + json.dumps(B).encode() + b"}"

DAMAGED = {
    "empty": (b"", "a header of 0 bytes"),
    "short": (b"\x02\0\0", "a header of 0 bytes"),
    "longer than the file": (_head({}, length=1 << 20), r"a header of 1048576 bytes\); the file has 10 bytes"),
    "huge": (_head({}, length=2**63), "a header of 9223372036854775808 bytes"),
    "no JSON": (_head(b"{nothing"), "its header is not JSON"),
    "no text": (_head(b"{\xff\xfe}"), "its header is not JSON"),
    "nested": (_head(b"[" * 200_000), "its header is not JSON"),
    "no object": (_head([1, 2]), "its header is no JSON object"),
    "named twice": (_head(TWICE, bytes(16)), "its header names a twice"),
    "no entry": (_head({"a": 3}), "entry of a is damaged"),
    "no shape": (_head({"a": {"dtype": "F32", "data_offsets": [0, 0]}}), "entry of a is damaged"),
    "negative shape": (_head({"a": _entry(0, 8, [-1, -2])}, bytes(8)), "entry of a is damaged"),
    "truth for a number": (_head({"a": _entry(0, 4, [True])}, bytes(4)), "entry of a is damaged"),
    "three offsets": (_head({"a": {**A, "data_offsets": [0, 4, 8]}}, bytes(8)), "entry of a is damaged"),
    "unknown dtype": (_head({"a": _entry(0, 8, dtype="F99")}, bytes(8)), "a has dtype 'F99'"),
    "dtype no text": (_head({"a": {**A, "dtype": ["F32"]}}, bytes(8)), "entry of a is damaged"),
    "shape too large": (_head({"a": _entry(0, 8, [3])}, bytes(8)), r"a \[3\] F32 does not fill bytes 0 to 8"),
    "ends swapped": (_head({"a": {**A, "data_offsets": [8, 0]}}, bytes(8)), "does not fill bytes 8 to 0"),
    "overlap": (_head({"a": A, "b": _entry(4, 12)}, bytes(12)), "b overlaps with a"),
    "hole": (_head({"a": A, "b": _entry(12, 20)}, bytes(20)), "b lies behind a hole after a"),
    "late start": (_head({"b": B}, bytes(16)), "b lies behind a hole after the header"),
    "cut off": (_head({"a": A, "b": B}, bytes(15)), r"b ends at byte \d+, the file at \d+"),
    "trailing": (_head({"a": A, "b": B}, bytes(17)), r"b ends at byte \d+, the file at \d+"),
}


@pytest.mark.parametrize("fault", DAMAGED)
def test_a_damaged_file_is_refused_by_name(tmp_path: Path, fault: str) -> None:
    content, message = DAMAGED[fault]
    (tmp_path / SINGLE_FILE).write_bytes(content)
    with pytest.raises(DataError, match=f"model.safetensors: .*{message}"):
        SafetensorsDirectory(tmp_path)


def test_the_whole_file_these_faults_are_made_of_is_read(tmp_path: Path) -> None:
    (tmp_path / SINGLE_FILE).write_bytes(_head({"b": B, "a": A, "__metadata__": {"x": "y"}}, bytes(16)))
    assert dict(SafetensorsDirectory(tmp_path).shapes()) == {"a": (2,), "b": (2,)}


@settings(max_examples=300, deadline=None)
@given(flips=st.lists(st.tuples(st.integers(0, 399), st.integers(0, 255)), min_size=1, max_size=3))
def test_no_damage_leads_outside_the_file(tmp_path_factory: pytest.TempPathFactory, flips: list) -> None:
    content = bytearray(save({"a": ONE, "b": TWO}))
    for at, byte in flips:
        content[at % len(content)] = byte
    path = tmp_path_factory.getbasetemp() / "flipped.safetensors"
    path.write_bytes(content)
    try:
        found = read_header(path)
    except DataError:
        return
    assert all(8 <= stored.start <= stored.end <= len(content) for stored in found.values())


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        (lambda d: (d / "model-00002-of-00002.safetensors").unlink(), r"00002-of-00002.safetensors: missing"),
        (lambda d: (d / "model-00001-of-00002.safetensors").write_bytes(b"\xff" * 40), "not a safetensors file"),
        (lambda d: (d / INDEX_FILE).write_text("{"), "not readable as JSON"),
        (lambda d: (d / INDEX_FILE).write_bytes(b"\xff\xff"), "not readable as JSON"),
        (lambda d: (d / INDEX_FILE).write_text("[]"), "it must be a JSON object"),
        (lambda d: (d / INDEX_FILE).write_text("{}"), "no weight_map"),
        (lambda d: save_file({"a": ONE}, d / SINGLE_FILE), "holds both model.safetensors and model.safetensors.index"),
    ],
)
def test_damaged_directories_are_named(tmp_path: Path, fault: Any, message: str) -> None:
    directory = _shards(tmp_path / "hf", [{"a": ONE}, {"b": TWO}])
    fault(directory)
    with pytest.raises(DataError, match=message):
        SafetensorsDirectory(directory)


def test_index_and_shards_must_agree(tmp_path: Path) -> None:
    first = "model-00001-of-00001.safetensors"
    with pytest.raises(DataError, match="lists ghost, which no shard holds"):
        SafetensorsDirectory(_shards(tmp_path / "1", [{"a": ONE}], {"a": first, "ghost": first}))
    with pytest.raises(DataError, match="holds b, which .* does not place there"):
        SafetensorsDirectory(_shards(tmp_path / "2", [{"a": ONE, "b": TWO}], {"a": first}))
    with pytest.raises(DataError, match="00002-of-00002.safetensors: holds a, which another shard holds too"):
        names = {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"}
        SafetensorsDirectory(_shards(tmp_path / "3", [{"a": ONE}, {"a": ONE, "b": TWO}], names))
    with pytest.raises(DataError, match="shards lie beside their index"):
        SafetensorsDirectory(_shards(tmp_path / "4", [{"a": ONE}], {"a": "../../etc/passwd"}))
    with pytest.raises(DataError, match="holds neither model.safetensors nor"):
        SafetensorsDirectory(tmp_path)
    with pytest.raises(DataError, match="no such directory"):
        SafetensorsDirectory(tmp_path / "nowhere")


READS = """
import sys, torch
from pathlib import Path
from megatron_octo.convert.safetensors_io import SafetensorsDirectory

def peak():
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("VmHWM"))

source, out = SafetensorsDirectory(Path(sys.argv[1])), torch.empty(64, 1024)
source.fill("a", 0, out)
before = peak()
for start in range(0, 24 * 1024, 64):
    source.fill("a", start, out)
print(peak() - before)
"""


def test_reading_takes_no_memory_of_its_own(tmp_path: Path) -> None:
    save_file({"a": torch.zeros(24 * 1024, 1024)}, tmp_path / SINGLE_FILE)
    found = subprocess.run(
        [sys.executable, "-c", READS, str(tmp_path)], capture_output=True, text=True, timeout=120, check=True
    )
    (tmp_path / SINGLE_FILE).unlink()
    assert int(found.stdout) < 8 * 1024, "kibibytes, for a file of 96 MiB"


def test_a_pointer_of_git_lfs_is_told_as_one(tmp_path):
    path = tmp_path / "model.safetensors"
    path.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 12\n")
    with pytest.raises(DataError, match="Git LFS pointer"):
        read_header(path)
