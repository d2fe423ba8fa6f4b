"""Writing a weights-only checkpoint: what reads back, what a kill or a full disk leaves, how much memory it takes."""

from __future__ import annotations

import errno
import json
import os
import shutil
import signal
import warnings
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from unittest import mock

import pytest
import torch
import torch.distributed.checkpoint as torch_checkpoint
from dist_files import Held
from upath import UPath

from megatron_octo.checkpoint import dist_write, hashing, store
from megatron_octo.checkpoint.dist import Place, TorchDist
from megatron_octo.checkpoint.dist_write import write_model
from megatron_octo.checkpoint.seal import verify_seal
from megatron_octo.checkpoint.tensors import read, row_blocks
from megatron_octo.errors import CheckpointError, ConfigError, DataError
from megatron_octo.files import hash_weights

MADE_FROM = {"model": "x"}
TENSORS = {
    "decoder.layers.0.weight": torch.arange(60, dtype=torch.float32).reshape(15, 4),
    "decoder.layers.1.weight": torch.arange(60, dtype=torch.float32).reshape(15, 4) + 0.5,
    "embedding.word_embeddings.weight": torch.randn(7, 2, generator=torch.manual_seed(1)).bfloat16(),
    "decoder.final_layernorm.weight": torch.randn(9, generator=torch.manual_seed(2)).half(),
}
STACKED = {f"decoder.layers.{layer}.weight": Place("decoder.layers.weight", layer) for layer in range(2)}


@pytest.fixture(autouse=True)
def small_files(monkeypatch):
    """Blocks of at most 40 bytes (2 rows of a layer) in files of about 160."""
    monkeypatch.setattr(dist_write, "row_blocks", partial(row_blocks, block_bytes=40))
    monkeypatch.setattr(dist_write, "FILE_BYTES", 160)


def assert_holds(directory, places=None) -> None:
    source = TorchDist(directory, places)
    assert set(source.shapes()) == set(TENSORS)
    for name, tensor in TENSORS.items():
        assert torch.equal(read(source, name), tensor)
        assert read(source, name).dtype == tensor.dtype


def test_it_reads_back_sealed_and_without_moments(tmp_path):
    write_model(tmp_path / "model", Held(TENSORS), {"config": {"name": "x"}}, MADE_FROM)
    verify_seal(tmp_path / "model")
    assert_holds(tmp_path / "model")
    facts = store.read_facts(tmp_path / "model")
    assert facts == {"step": 0, "run_tokens": 0, "tokens": 0, "config": {"name": "x"}, "moments": False}
    sealed = json.loads((tmp_path / "model" / "seal.json").read_text())["files"]
    assert {name for name in sealed if not name.endswith(".distcp")} == {
        ".metadata", "common.pt", "metadata.json", "run.json",
    }  # fmt: skip
    for name, entry in sealed.items():  # also where the writer took the hash and not the seal
        assert entry == {
            "blake3": hash_weights(tmp_path / "model" / name), "bytes": (tmp_path / "model" / name).stat().st_size,
        }  # fmt: skip
    assert list(tmp_path.iterdir()) == [tmp_path / "model"]


def test_torch_reads_it_too(tmp_path):
    write_model(tmp_path / "model", Held(TENSORS), {}, MADE_FROM)
    found = {name: torch.zeros_like(tensor) for name, tensor in TENSORS.items()}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch_checkpoint.load(found, checkpoint_id=str(tmp_path / "model"), no_dist=True)
    assert all(torch.equal(found[name], TENSORS[name]) for name in TENSORS)


def test_layers_are_stacked_and_folders_and_files_added(tmp_path):
    def extras(directory: Path) -> None:
        (directory / "hugging_face").mkdir()
        (directory / "hugging_face" / "config.json").write_text("{}")

    write_model(tmp_path / "model", Held(TENSORS), {}, MADE_FROM, STACKED, extras, into="weights")
    verify_seal(tmp_path / "model")
    assert (tmp_path / "model" / "weights" / "common.pt").is_file()
    assert TorchDist(tmp_path / "model" / "weights").shapes()["decoder.layers.weight"] == (2, 15, 4)
    assert_holds(tmp_path / "model" / "weights", STACKED)
    (tmp_path / "model" / "hugging_face" / "config.json").write_text("[]")
    with pytest.raises(CheckpointError, match="has been altered"):
        verify_seal(tmp_path / "model")


@pytest.mark.parametrize(
    ("other", "said"), [(torch.zeros(15, 4).half(), r"\[15, 4\] float16"), (torch.zeros(3, 4), r"\[3, 4\] float32")]
)
def test_layers_that_cannot_be_stacked_are_named_before_anything_is_begun(tmp_path, monkeypatch, other, said):
    source = Held({**TENSORS, "decoder.layers.1.weight": other})
    write_model(tmp_path / "plain", source, {}, MADE_FROM)
    monkeypatch.setattr(dist_write, "publishing", lambda *_, **__: pytest.fail("begun"))
    message = rf"decoder\.layers\.1\.weight is {said}, in the layers before it is \[15, 4\] float32.*--layout octo"
    with pytest.raises(DataError, match=message):
        write_model(tmp_path / "stacked", source, {}, MADE_FROM, STACKED)


def test_a_url_is_written_and_read(tmp_path):
    target = UPath("memory://written/model")
    write_model(target, Held(TENSORS), {}, MADE_FROM)
    verify_seal(target)
    assert_holds(target)
    (target / "__0_0.distcp").write_bytes(b"x")
    with pytest.raises(CheckpointError, match=r"__0_0\.distcp: holds 1 bytes"):
        verify_seal(target)


def test_the_same_is_written_twice(tmp_path):
    for name in ("one", "two"):
        write_model(tmp_path / name, Held(TENSORS), {}, MADE_FROM)
    assert (tmp_path / "one" / "seal.json").read_bytes() == (tmp_path / "two" / "seal.json").read_bytes()


def test_what_exists_is_never_written_over(tmp_path):
    (tmp_path / "model").mkdir()
    with pytest.raises(ConfigError, match="already exists"):
        write_model(tmp_path / "model", Held(TENSORS), {}, MADE_FROM)
    assert list((tmp_path / "model").iterdir()) == []


class Deadly(Held):
    """Kills its process when a tensor is asked for."""

    def fill(self, name: str, start: int, out: torch.Tensor) -> None:
        if name == "embedding.word_embeddings.weight":
            os.kill(os.getpid(), signal.SIGKILL)
        super().fill(name, start, out)


def killed(target: Path) -> None:
    child = os.fork()
    if child == 0:
        write_model(target, Deadly(TENSORS), {}, MADE_FROM)
        os._exit(0)
    assert os.WTERMSIG(os.waitpid(child, 0)[1]) == signal.SIGKILL
    assert not target.exists()


def test_a_killed_writing_goes_on(tmp_path):
    write_model(tmp_path / "calm", Held(TENSORS), {}, MADE_FROM)
    killed(tmp_path / "model")
    source = Held(TENSORS)
    write_model(tmp_path / "model", source, {}, MADE_FROM)
    assert "decoder.layers.0.weight" not in source.asked
    assert {"embedding.word_embeddings.weight", "decoder.final_layernorm.weight"} <= set(source.asked)
    verify_seal(tmp_path / "model")
    assert (tmp_path / "model" / "seal.json").read_bytes() == (tmp_path / "calm" / "seal.json").read_bytes()


def test_what_was_made_from_another_model_is_not_used(tmp_path):
    killed(tmp_path / "model")
    source = Held({name: tensor + 1 for name, tensor in TENSORS.items()})
    write_model(tmp_path / "model", source, {}, {"model": "y"})
    assert set(source.asked) == set(TENSORS)
    found = read(TorchDist(tmp_path / "model"), "decoder.layers.0.weight")
    assert torch.equal(found, TENSORS["decoder.layers.0.weight"] + 1)


@pytest.mark.parametrize("what", ["FILE_BYTES", "BLOCK_BYTES"])
def test_what_was_cut_into_other_files_is_not_used(tmp_path, monkeypatch, what):
    killed(tmp_path / "model")
    monkeypatch.setattr(dist_write, what, 200)
    source = Held(TENSORS)
    write_model(tmp_path / "model", source, {}, MADE_FROM)
    assert set(source.asked) == set(TENSORS)
    verify_seal(tmp_path / "model")
    assert_holds(tmp_path / "model")


def failing_at(share: float, error: BaseException, scratch: Path):
    """Raise from one of the writes to files: 0 is the first of all, 1 the last."""
    done, plain = [], hashing._Hashed.write

    def count(stream, content):
        done.append(len(content))
        return plain(stream, content)

    with mock.patch.object(hashing._Hashed, "write", count):
        write_model(scratch / "undisturbed", Held(TENSORS), {}, MADE_FROM)
    shutil.rmtree(scratch)
    last = round(share * (len(done) - 1))
    done.clear()

    def write(stream, content):
        if len(done) == last:
            raise error
        return count(stream, content)

    return mock.patch.object(hashing._Hashed, "write", write)


@pytest.mark.parametrize("share", [0, 0.5, 1])
def test_a_full_disk_is_told_as_one_and_leaves_nothing(tmp_path, share):
    torch.serialization.set_crc32_options(True)
    full = failing_at(share, OSError(errno.ENOSPC, "No space left on device"), tmp_path / "scratch")
    with full, pytest.raises(OSError, match="No space"):
        write_model(tmp_path / "model", Held(TENSORS), {}, MADE_FROM)
    assert list(tmp_path.iterdir()) == []
    assert torch.serialization.get_crc32_options()


@pytest.mark.parametrize("share", [0.5, 0.6])
def test_an_interrupt_amid_a_file_keeps_the_files_before(tmp_path, share):
    with failing_at(share, KeyboardInterrupt(), tmp_path / "scratch"), pytest.raises(KeyboardInterrupt):
        write_model(tmp_path / "model", Held(TENSORS), {}, MADE_FROM)
    source = Held(TENSORS)
    write_model(tmp_path / "model", source, {}, MADE_FROM)
    fresh = Held(TENSORS)
    write_model(tmp_path / "fresh", fresh, {}, MADE_FROM)
    assert 0 < len(source.asked) < len(fresh.asked)
    verify_seal(tmp_path / "model")
    assert_holds(tmp_path / "model")


class Endless:
    """Many tensors of 8 MiB, made as they are read."""

    where = "nowhere"

    def shapes(self) -> dict[str, tuple[int, ...]]:
        return {f"layer.{number}": (2048, 1024) for number in range(40)}

    def dtype(self, name: str) -> str:
        return "float32"

    def fill(self, name: str, start: int, out: torch.Tensor) -> None:
        out.fill_(start)


def peak_growth(directory: Path) -> int:
    """Bytes by which this process's peak memory grows while it writes a checkpoint, then reads it."""
    write_model(directory.with_name("before"), Held(TENSORS), {}, MADE_FROM)  # loads what is loaded but once
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
    before = peak()
    write_model(directory, Endless(), {}, MADE_FROM)
    source = TorchDist(directory)
    for name in source.shapes():
        read(source, name)
    return peak() - before


def peak() -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM"))


def test_memory_does_not_grow_with_the_model(tmp_path):
    """320 MiB in one file: torch's writer alone would hold on to all of it."""
    with ProcessPoolExecutor(1, get_context("spawn")) as fresh:
        grown = fresh.submit(peak_growth, tmp_path / "model").result(timeout=120)
    assert sum(path.stat().st_size for path in (tmp_path / "model").iterdir()) > 320 * 2**20
    assert grown < 80 * 2**20
