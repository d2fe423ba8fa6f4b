"""Damage to the files of a finished build is found by `octo data inspect`, by name, with and without its manifest."""

from __future__ import annotations

import shutil
import struct
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from megatron_octo.config.data import DataBuildConfig
from megatron_octo.data.engine.build import build_data
from megatron_octo.data.engine.manifest import verify_data
from megatron_octo.data.index.inspect import inspect
from megatron_octo.data.index.pairs import bin_path, idx_path, read_index
from megatron_octo.data.index.table import DocumentTable, docs_path, histogram_path
from megatron_octo.errors import DataError

HEADER = 34


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("indexed") / "data"
    tokenizer = {"train": {"vocabulary_size": 300, "documents": 50}}
    config = {"tokenizer": tokenizer, "world": {"tokens": {"web": 3000}}}
    build_data(DataBuildConfig.model_validate(config), out)
    return out


@pytest.fixture
def data(built: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(built, tmp_path / "data"))


def _cut(path: Path, size: int) -> None:
    path.write_bytes(path.read_bytes()[:size])


def _put(path: Path, offset: int, value: bytes) -> None:
    content = bytearray(path.read_bytes())
    content[offset : offset + len(value)] = value
    path.write_bytes(bytes(content))


def _set_token(prefix: Path, place: int, token: int) -> None:
    _put(bin_path(prefix), 2 * place, struct.pack("<H", token))


def _flip(prefix: Path) -> None:
    tokens = read_index(prefix).all_tokens()
    _set_token(prefix, 4, int(tokens[4]) ^ 1)


def _swap(prefix: Path) -> None:
    tokens = np.array(read_index(prefix).all_tokens())
    other = next(n for n in range(1, len(tokens)) if tokens[n] != tokens[0] and not {tokens[n], tokens[0]} & {2})
    _set_token(prefix, 0, int(tokens[other]))
    _set_token(prefix, other, int(tokens[0]))


def _unended(prefix: Path) -> None:
    _set_token(prefix, int(read_index(prefix).lengths[:2].sum()) - 1, 70)


Damage = Callable[[Path], None]
FAULTS: dict[str, tuple[Damage, str, str]] = {
    "bin truncated": (lambda p: _cut(bin_path(p), bin_path(p).stat().st_size // 2), "web.bin", "counts"),
    "one token flipped": (_flip, "web.bin", "altered|occurs"),
    "idx truncated": (lambda p: _cut(idx_path(p), 100), "web.idx", "documents need"),
    "idx empty": (lambda p: _cut(idx_path(p), 0), "web.idx", "too few for an index"),
    "idx bad magic": (lambda p: _put(idx_path(p), 0, b"NOTANIDX"), "web.idx", "mark of a Megatron index"),
    "idx bad pointer": (
        lambda p: _put(idx_path(p), HEADER + 4 * read_index(p).documents + 8, struct.pack("<q", 2**40)),
        "web.idx",
        "positions",
    ),
    "idx count mismatch": (lambda p: _put(idx_path(p), 18, struct.pack("<Q", 7)), "web.idx", "its 7 documents"),
    "token outside the vocabulary": (lambda p: _set_token(p, 5, 300), "web.bin", r"document 0 \(web:1\): token 300"),
    "a document without its end mark": (_unended, "web.bin", r"document 1 \(web:2\): .* end mark, token 2"),
    "table of documents cut": (
        lambda p: _cut(docs_path(p), docs_path(p).stat().st_size - 4),
        "web.docs",
        "altered|need",
    ),
    "histogram cut": (lambda p: _cut(histogram_path(p), 300), "web.counts.npy", "altered|histogram"),
}


@pytest.mark.parametrize("manifest", [True, False], ids=["manifest", "alone"])
@pytest.mark.parametrize("name", FAULTS)
def test_damage_is_found_by_name(data: Path, name: str, manifest: bool) -> None:
    damage, file, reason = FAULTS[name]
    damage(data / "web")
    if not manifest and name != "a document without its end mark":  # only the manifest knows the rule
        (data / "manifest.json").unlink()
    with pytest.raises(DataError, match=reason) as caught:
        inspect(data / "web")
    assert str(data / file) in caught.value.what and caught.value.fix
    if manifest:
        with pytest.raises(DataError, match=reason):
            verify_data(data)


def test_two_tokens_that_changed_places_are_found_by_the_hash(data: Path) -> None:
    _swap(data / "web")
    with pytest.raises(DataError, match=r"web\.bin was altered"):
        inspect(data / "web")


def test_the_command_ends_with_its_code_and_one_line(data: Path) -> None:
    _set_token(data / "web", 5, 65_535)
    command = [sys.executable, "-m", "megatron_octo.cli", "data", "inspect", str(data / "web")]
    found = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert found.returncode == DataError.exit_code and found.stdout == ""
    assert found.stderr.count("\n") == 1 and "token 65535" in found.stderr and "fix:" in found.stderr


def test_an_intact_pair_is_shown_with_its_manifest(built: Path) -> None:
    facts, index = inspect(built / "web", first=4), read_index(built / "web")
    table = DocumentTable(docs_path(built / "web"))
    assert [sample["document"] for sample in facts["samples"]][::3] == [0, index.documents - 1]
    for sample in facts["samples"]:
        assert sample["id"] == table.id_of(sample["document"]) and sample["text"].endswith("<|end_of_text|>")
        assert sample["tokens"] == index.lengths[sample["document"]]
    tokens = np.array(index.all_tokens())
    assert facts["frequent"][0]["count"] == np.bincount(tokens).max() and len(facts["frequent"]) == 10
    assert (facts["shortest"], facts["longest"]) == (index.lengths.min(), index.lengths.max())
    assert facts["tokenizer"]["rows"] == 300 and facts["settings"]["eos"] == "after_document"
    assert facts["source"]["tokens"] == facts["tokens"] and "manifest" in facts["checked"]
