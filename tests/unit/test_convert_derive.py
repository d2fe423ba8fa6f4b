"""average and truncate: new models from old ones, exact where they must be, and nothing written where they refuse."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from convert_tools import MODEL, Held, tensors_of, write_checkpoint, write_directory
from safetensors.torch import load_file, save_file

from megatron_octo.checkpoint.dist import TorchDist
from megatron_octo.checkpoint.seal import seal_digest, verify_seal
from megatron_octo.checkpoint.store import read_facts
from megatron_octo.checkpoint.tensors import read
from megatron_octo.convert import derive
from megatron_octo.convert.derive import Averaged, average, truncate
from megatron_octo.convert.megatron_io import read_origin
from megatron_octo.convert.views import same_bits
from megatron_octo.errors import CheckpointError, ConfigError, DataError

UP, FC1 = "model.layers.1.mlp.up_proj.weight", "decoder.layers.1.mlp.linear_fc1.weight"
TOKENIZER = {"tokenizer.json": '{"a": 1}', "tokenizer_config.json": "{}", "LICENSE": "kept"}


def _content(checkpoint: Path) -> dict[str, torch.Tensor]:
    source = TorchDist(checkpoint)
    return {name: read(source, name) for name in source.shapes()}


def _same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(same_bits(one[name], other[name]) for name in one)


def _three(tmp_path: Path, dtype: torch.dtype = torch.float32) -> list[Path]:
    parts = [{name: tensor.to(dtype) for name, tensor in tensors_of(seed).items()} for seed in range(3)]
    return [write_checkpoint(tmp_path / f"part{n}", part, tokens=100 + n) for n, part in enumerate(parts)]


# --- average


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_an_average_is_the_mean_in_the_dtype_of_its_parts(tmp_path: Path, dtype: torch.dtype) -> None:
    paths = _three(tmp_path, dtype)
    facts = average(paths, tmp_path / "out")
    verify_seal(tmp_path / "out")
    parts, mean = [_content(path) for path in paths], _content(tmp_path / "out")
    for name, tensor in mean.items():
        exact = torch.stack([part[name].double() for part in parts]).mean(0)
        assert tensor.dtype == dtype
        assert torch.equal(tensor, exact.to(dtype)), name
    assert facts == read_facts(tmp_path / "out")
    assert [part["seal"] for part in facts["source"]["average_of"]] == [seal_digest(path) for path in paths]
    assert facts["tokens"] == 102
    assert read_origin(tmp_path / "out").model == MODEL


def test_the_average_of_equal_models_is_the_model_to_the_bit(tmp_path: Path) -> None:
    tensors = tensors_of()
    tensors[UP].view(-1)[:4] = torch.tensor([-0.0, 1e-45, 3e38, 0.1])
    paths = [write_checkpoint(tmp_path / name, tensors) for name in "abc"]
    average(paths, tmp_path / "out")
    assert _same(_content(paths[0]), _content(tmp_path / "out"))


def test_the_last_checkpoints_of_a_run_are_its_newest(tmp_path: Path) -> None:
    run = tmp_path / "run"
    paths = [write_checkpoint(run / "checkpoints" / f"step_{n:08d}", tensors_of(n)) for n in (9, 10, 11)]
    average([run], tmp_path / "last", last=2)
    average(paths[1:], tmp_path / "named")
    assert _same(_content(tmp_path / "last"), _content(tmp_path / "named"))
    with pytest.raises(CheckpointError, match=r"3 sealed checkpoints, not 4; .*step_00000009.*step_00000011"):
        average([run], tmp_path / "more", last=4)
    average([run, paths[0]], tmp_path / "mixed")  # a run means its latest
    assert len(read_facts(tmp_path / "mixed")["source"]["average_of"]) == 2


def test_small_blocks_give_the_same_average(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sources = [Held(tensors_of(seed)) for seed in range(3)]
    whole = {name: read(Averaged(sources), name) for name in sources[0].tensors}
    monkeypatch.setattr(derive, "_BLOCK_BYTES", 200)
    assert _same(whole, {name: read(Averaged(sources), name) for name in whole})
    assert torch.equal(read(Averaged(sources), UP, 5, 7), whole[UP][5:12])


def test_an_average_carries_the_tokenizer_of_its_newest_part(tmp_path: Path) -> None:
    paths = _three(tmp_path)
    carrying = _with_assets(tmp_path / "carrying")
    average([*paths, carrying], tmp_path / "out")
    for name, text in TOKENIZER.items():
        assert (tmp_path / "out" / "hugging_face" / name).read_text() == text


def _with_assets(path: Path) -> Path:
    def add(directory: Path) -> None:
        (directory / "hugging_face").mkdir()
        for name, text in TOKENIZER.items():
            (directory / "hugging_face" / name).write_text(text)

    return write_checkpoint(path, extras=add)


def _other_model(tmp_path: Path) -> list[Path]:
    other = MODEL.model_copy(update={"norm_epsilon": 1e-6})
    return [write_checkpoint(tmp_path / "a"), write_checkpoint(tmp_path / "b", model=other)]


def _other_dtype(tmp_path: Path) -> list[Path]:
    half = {name: tensor.bfloat16() for name, tensor in tensors_of().items()}
    return [write_checkpoint(tmp_path / "a"), write_checkpoint(tmp_path / "b", half)]


def _less(tmp_path: Path) -> list[Path]:
    return [write_checkpoint(tmp_path / "a"), write_checkpoint(tmp_path / "b", dropped=FC1)]


def _not_finite(tmp_path: Path) -> list[Path]:
    tensors = tensors_of()
    tensors[UP][0, 0] = torch.nan
    return [write_checkpoint(tmp_path / "a"), write_checkpoint(tmp_path / "b", tensors)]


def _altered(tmp_path: Path) -> list[Path]:
    paths = [write_checkpoint(tmp_path / "a"), write_checkpoint(tmp_path / "b", tensors_of(1))]
    file = next(paths[1].glob("*.distcp"))
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)
    return paths


REFUSED = {
    "other model": (_other_model, ConfigError, r"different models: norm_epsilon: 1e-05 -> 1e-06"),
    "other dtype": (_other_dtype, CheckpointError, r"float32 \[.*\] in .*, bfloat16"),
    "missing tensor": (_less, CheckpointError, rf"{FC1}: float32 \[48, 16\] in .*, nothing in"),
    "not finite": (_not_finite, CheckpointError, rf"b: {FC1} holds values that are not finite"),
    "altered": (_altered, CheckpointError, "altered"),
    "one": (lambda path: [write_checkpoint(path / "a")], ConfigError, "one checkpoint is no average"),
    "twice": (lambda path: 2 * [write_checkpoint(path / "a")], ConfigError, "named twice"),
    "directory": (lambda path: 2 * [write_directory(path / "a")], ConfigError, "a Hugging Face directory"),
    "nothing": (lambda path: [path / "a", path / "b"], CheckpointError, "no such directory"),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_what_has_no_average_is_refused_and_leaves_nothing(tmp_path: Path, kind: str) -> None:
    make, error, message = REFUSED[kind]
    paths = make(tmp_path)
    before = sorted(tmp_path.iterdir())
    with pytest.raises(error, match=message):
        average(paths, tmp_path / "out")
    assert sorted(tmp_path.iterdir()) == before


# --- truncate


def test_a_truncated_directory_holds_the_first_layers_byte_for_byte(tmp_path: Path) -> None:
    tensors = {name: tensor.bfloat16() for name, tensor in tensors_of().items()}
    path = write_directory(tmp_path / "hf", tensors, layer_types=2 * ["full_attention"], auto_map={"AutoModel": "x.Y"})
    for name, text in TOKENIZER.items():
        (path / name).write_text(text)
    (path / "modeling_x.py").write_text("raise SystemExit")
    truncate(path, 1, tmp_path / "out")
    kept = {name: tensor for name, tensor in tensors.items() if ".layers.1." not in name}
    assert _same(load_file(tmp_path / "out" / "model.safetensors"), kept)
    before, after = (json.loads((place / "config.json").read_text()) for place in (path, tmp_path / "out"))
    del before["auto_map"]
    assert after == {**before, "num_hidden_layers": 1, "layer_types": ["full_attention"]}
    found = {file.name for file in (tmp_path / "out").iterdir()}
    assert found == {*TOKENIZER, "config.json", "model.safetensors"}


def test_a_truncated_checkpoint_holds_the_first_layers_and_is_sealed(tmp_path: Path) -> None:
    path = _with_assets(tmp_path / "checkpoint")
    truncate(path, 1, tmp_path / "out")
    verify_seal(tmp_path / "out")
    kept = {name: tensor for name, tensor in _content(path).items() if ".layers.1." not in name}
    assert _same(_content(tmp_path / "out"), kept)
    origin = read_origin(tmp_path / "out")
    assert origin.model == MODEL.model_copy(update={"layers": 1})
    assert origin.facts["source"]["truncated_from"]["seal"] == seal_digest(path)
    assert (tmp_path / "out" / "hugging_face" / "LICENSE").read_text() == "kept"


def test_both_formats_truncate_to_the_same_model(tmp_path: Path) -> None:
    from megatron_octo.convert.compare import diff

    truncate(write_directory(tmp_path / "hf"), 1, tmp_path / "one")
    truncate(write_checkpoint(tmp_path / "checkpoint"), 1, tmp_path / "other")
    assert diff(tmp_path / "one", tmp_path / "other")["same"] is True


@pytest.mark.parametrize("write", [write_directory, write_checkpoint])
@pytest.mark.parametrize("layers", [-1, 0, 2, 3])
def test_only_fewer_layers_are_cut(tmp_path: Path, write, layers: int) -> None:
    path = write(tmp_path / "model")
    with pytest.raises(ConfigError, match=rf"{layers} layers of .*model; it has 2; fix: keep at least one"):
        truncate(path, layers, tmp_path / "out")
    assert list(tmp_path.iterdir()) == [path]


def test_a_model_that_is_not_whole_is_not_cut(tmp_path: Path) -> None:
    directory = write_directory(tmp_path / "hf")
    tensors = load_file(directory / "model.safetensors")
    del tensors[UP]
    save_file(tensors, directory / "model.safetensors")
    altered = _altered(tmp_path)[1]
    for path, error, message in ((directory, DataError, f"missing {UP}"), (altered, CheckpointError, "altered")):
        with pytest.raises(error, match=message):
            truncate(path, 1, tmp_path / "out")
    assert not list(tmp_path.glob("*out*"))


@pytest.mark.parametrize(
    "tool", [lambda path, out: truncate(path, 1, out), lambda path, out: average([path, path], out)]
)
def test_nothing_is_written_over(tmp_path: Path, tool) -> None:
    path = write_checkpoint(tmp_path / "model")
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine").touch()
    with pytest.raises(ConfigError, match="out: already exists"):
        tool(path, tmp_path / "out")
    assert [file.name for file in (tmp_path / "out").iterdir()] == ["mine"]
