"""Descriptions by other trainers that are damaged, odd or hostile: nothing runs, nothing is visited, all is named."""

from __future__ import annotations

import argparse
import shutil
import struct
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import fsspec
import pytest
import torch
import yaml
from foreign_checkpoints import MODELS, foreign, written

from megatron_octo.convert import inert
from megatron_octo.convert.inert import Inert, read_inert
from megatron_octo.convert.megatron_io import find_checkpoint, read_origin
from megatron_octo.errors import CheckpointError


class Bomb:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple:
        return Path.touch, (self.path,)


def test_arguments_are_read_and_nothing_is_run(tmp_path: Path) -> None:
    values = {"args": torch.nn.Linear(1, 1), "bomb": Bomb(tmp_path / "ran"), "iteration": 5, "t": torch.ones(3)}
    torch.save(values, tmp_path / "common.pt")
    found = read_inert(tmp_path / "common.pt")
    assert found["iteration"] == 5
    assert isinstance(found["args"], Inert) and found["args"].named.endswith("Linear")
    assert found["args"].values["in_features"] == 1
    assert isinstance(found["bomb"], Inert)
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("content", [b"", b"PK\x03\x04 no archive", b"\x80\x02}q\x00."])
def test_damaged_arguments_are_named(content: bytes, tmp_path: Path) -> None:
    out = foreign(tmp_path / "out", MODELS["llama"], "megatron-lm")
    (out / "release" / "common.pt").write_bytes(content)
    with pytest.raises(CheckpointError, match="common.pt: cannot be read"):
        read_origin(find_checkpoint(out))


def test_a_checkpoint_without_arguments_is_named(tmp_path: Path) -> None:
    out = foreign(tmp_path / "out", MODELS["llama"], "megatron-lm")
    torch.save({"iteration": 1}, out / "release" / "common.pt")
    with pytest.raises(CheckpointError, match="holds no arguments"):
        read_origin(find_checkpoint(out))


def deflated(content: bytearray, entry: zipfile.ZipInfo) -> None:
    """Says that the pickle is compressed, which it is not."""
    for at in (entry.header_offset + 8, content.rfind(entry.filename.encode()) - 36):
        content[at : at + 2] = struct.pack("<H", zipfile.ZIP_DEFLATED)


def encrypted(content: bytearray, entry: zipfile.ZipInfo) -> None:
    for at in (entry.header_offset + 6, content.rfind(entry.filename.encode()) - 38):
        content[at] |= 1


def before_its_start(content: bytearray, entry: zipfile.ZipInfo) -> None:
    """The end of the archive says that its list lies a byte further on; its first entry is then at minus one."""
    at = content.rfind(b"PK\6\6") + 48
    content[at : at + 8] = struct.pack("<Q", struct.unpack("<Q", content[at : at + 8])[0] + entry.header_offset + 1)


@pytest.mark.parametrize("damage", [deflated, encrypted, before_its_start])
def test_damaged_archives_are_named(damage: Callable[[bytearray, zipfile.ZipInfo], None], tmp_path: Path) -> None:
    path = tmp_path / "common.pt"
    torch.save({"args": argparse.Namespace(text="x" * 300)}, path)
    with zipfile.ZipFile(path) as archive:
        (entry,) = [entry for entry in archive.infolist() if entry.filename.endswith("data.pkl")]
    content = bytearray(path.read_bytes())
    damage(content, entry)
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match="common.pt: cannot be read"):
        read_inert(path)


def test_a_file_that_is_too_long_is_not_read_to_its_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.save({"args": 1}, tmp_path / "common.pt")
    monkeypatch.setattr(inert, "_LONGEST", (tmp_path / "common.pt").stat().st_size - 1)
    with pytest.raises(CheckpointError, match="longer than"):
        read_inert(tmp_path / "common.pt")


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("checkpoints")
    for layout in ("megatron-lm", "megatron-bridge", "nemo"):
        foreign(root / layout, MODELS["qwen3"], layout)
    return root


def described(path: Path, change: dict[str, Any]) -> None:
    """Change fields of a description in YAML, those of a section by `section.field`."""
    content = yaml.safe_load(path.read_text())
    for field, value in change.items():
        section, _, name = field.rpartition(".")
        if section:
            content[section] = {**(content.get(section) or {}), name: value}
        else:
            content[name] = value
    path.write_text(yaml.safe_dump(content))


def changed(root: Path, layout: str, change: dict[str, Any]) -> Path:
    """Change what a checkpoint says of itself: arguments by `args.name`, and the rest of the common state."""
    if layout != "megatron-lm":
        file = "iter_0000000/run_config.yaml" if layout == "megatron-bridge" else "context/model.yaml"
        described(root / file, change)
        return root
    common = torch.load(root / "release" / "common.pt", weights_only=False)
    for field, value in change.items():
        arguments, _, name = field.rpartition(".")
        (vars(common["args"]) if arguments else common)[name] = value
    torch.save(common, root / "release" / "common.pt")
    return root


ODD: list[tuple[str, str, Any]] = [
    ("megatron-bridge", "model", "x"), ("megatron-bridge", "model", [1]), ("megatron-bridge", "model", None),
    ("megatron-bridge", "tokenizer", "x"), ("megatron-bridge", "tokenizer.tokenizer_model", 5),
    ("megatron-bridge", "model.vocab_size", "abc"), ("megatron-bridge", "model.vocab_size", [1]),
    ("megatron-bridge", "model.vocab_size", -1), ("megatron-bridge", "model.vocab_size", True),
    ("nemo", "config", 3), ("nemo", "tokenizer", ["x"]), ("nemo", "tokenizer.pretrained_model_name", ["x"]),
    ("megatron-lm", "args.tokenizer_model", 7), ("megatron-lm", "args.vocab_size", "x"),
    ("megatron-lm", "iteration", torch.tensor(5)), ("megatron-lm", "iteration", "abc"),
]  # fmt: skip


@pytest.mark.parametrize(("layout", "field", "value"), ODD)
def test_a_field_of_another_type_is_named(
    checkpoints: Path, tmp_path: Path, layout: str, field: str, value: object
) -> None:
    root = changed(Path(shutil.copytree(checkpoints / layout, tmp_path / "odd")), layout, {field: value})
    with pytest.raises(CheckpointError, match=field.rpartition(".")[2]):
        read_origin(find_checkpoint(root))


def test_arguments_that_are_no_list_are_not_an_activations(checkpoints: Path, tmp_path: Path) -> None:
    root = Path(shutil.copytree(checkpoints / "megatron-bridge", tmp_path / "odd"))
    changed(root, "megatron-bridge", {"model.activation_func": {"_target_": "torch.nn.functional.silu", "_args_": 3}})
    assert read_origin(find_checkpoint(root)).model == MODELS["qwen3"]


@pytest.mark.parametrize("text", ["a: 2001-99-99", "[" * 3000])
def test_a_description_that_is_no_yaml_is_named(checkpoints: Path, tmp_path: Path, text: str) -> None:
    root = Path(shutil.copytree(checkpoints / "nemo", tmp_path / "odd"))
    (root / "context" / "model.yaml").write_text(text)
    with pytest.raises(CheckpointError, match=r"model\.yaml: is not YAML"):
        read_origin(find_checkpoint(root))


DAMAGED = (
    '{"model": 5}',
    '{"model": {"vocab": 7}}',
    '{"model": {"vocab": {"a": "b"}}}',
    '{"added_tokens": [{}]}',
    "[" * 99999,
)


@pytest.mark.parametrize("text", DAMAGED, ids=range(len(DAMAGED)))
def test_a_damaged_vocabulary_is_named(checkpoints: Path, tmp_path: Path, text: str) -> None:
    root = Path(shutil.copytree(checkpoints / "megatron-bridge", tmp_path / "odd"))
    (root / "iter_0000000" / "tokenizer").mkdir()
    (root / "iter_0000000" / "tokenizer" / "tokenizer.json").write_text(text)
    changed(root, "megatron-bridge", {"model.vocab_size": None})
    with pytest.raises(CheckpointError, match=r"tokenizer\.json: its vocabulary is damaged"):
        read_origin(find_checkpoint(root))


@pytest.mark.parametrize("said", ["9" * 5000, "x" * 5000, "\udcff"])
def test_a_pointer_that_names_no_folder_is_named(tmp_path: Path, said: str) -> None:
    path = tmp_path / "latest_checkpointed_iteration.txt"
    path.write_text(said, encoding="utf-8", errors="surrogateescape")
    with pytest.raises(CheckpointError, match="latest_checkpointed_iteration.txt: names"):
        find_checkpoint(tmp_path)


ADDRESSES = ("http://127.0.0.1:9/tokenizer", "s3://bucket/tokenizer", "foo://x", "memory://tokenizer")
NAMES = {
    "megatron-lm": "args.tokenizer_model",
    "megatron-bridge": "tokenizer.tokenizer_model",
    "nemo": "tokenizer.pretrained_model_name",
}


@pytest.fixture
def no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    """Lets nobody even ask for the class that speaks a protocol."""

    def asked(protocol: str, *_: object, **__: object) -> None:
        raise AssertionError(f"{protocol} is visited")

    monkeypatch.setattr(fsspec, "get_filesystem_class", asked)


@pytest.mark.parametrize("address", ADDRESSES)
@pytest.mark.parametrize("layout", NAMES)
def test_an_address_in_a_checkpoint_is_not_visited(
    checkpoints: Path, tmp_path: Path, layout: str, address: str, no_network: None
) -> None:
    root = Path(shutil.copytree(checkpoints / layout, tmp_path / "odd"))
    changed(root, layout, {NAMES[layout]: address})
    origin = read_origin(find_checkpoint(root))
    assert (origin.tokenizer, origin.model) == (None, MODELS["qwen3"])


@pytest.mark.parametrize("address", ADDRESSES)
def test_an_address_in_our_own_facts_is_not_visited(tmp_path: Path, address: str, no_network: None) -> None:
    root = written(tmp_path / "own", MODELS["qwen3"], "octo", {"tokenizer": address})
    assert read_origin(root).tokenizer is None


def test_a_tokenizer_on_this_machine_is_followed(checkpoints: Path, tmp_path: Path) -> None:
    (tmp_path / "tokenizer").mkdir()
    (tmp_path / "tokenizer" / "tokenizer.json").write_text("{}")
    for layout, field in NAMES.items():
        root = Path(shutil.copytree(checkpoints / layout, tmp_path / layout))
        changed(root, layout, {field: str(tmp_path / "tokenizer")})
        assert read_origin(find_checkpoint(root)).tokenizer == tmp_path / "tokenizer"
    root = written(tmp_path / "own", MODELS["qwen3"], "octo", {"tokenizer": str(tmp_path / "tokenizer")})
    assert read_origin(root).tokenizer == tmp_path / "tokenizer"


@pytest.mark.parametrize(
    ("fact", "value"), [("config", "x"), ("config", {"data": 3}), ("tokenizer", 5), ("model", ["x"])]
)
def test_our_own_facts_of_another_type_are_named(tmp_path: Path, fact: str, value: object) -> None:
    root = written(tmp_path / "own", MODELS["qwen3"], "octo", {fact: value})
    with pytest.raises(CheckpointError, match="data" if isinstance(value, dict) else fact):
        read_origin(root)


def test_our_own_facts_that_are_no_json_are_named(tmp_path: Path) -> None:
    (tmp_path / "run.json").write_text("[" * 99999)
    with pytest.raises(CheckpointError, match=r"run\.json: cannot be read"):
        read_origin(tmp_path)
