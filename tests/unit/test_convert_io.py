"""Reading and writing Hugging Face directories: what is refused, and that nothing half-written stays."""

from __future__ import annotations

import json
import struct
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from megatron_octo.config.run import ModelConfig
from megatron_octo.convert import hf_io
from megatron_octo.convert.api import from_hf, to_hf, to_hf_many
from megatron_octo.convert.llama import LLAMA
from megatron_octo.convert.megatron_io import find_checkpoint, geometry
from megatron_octo.convert.rules import Rename
from megatron_octo.convert.safetensors_io import Planned, SafetensorsDirectory, write_safetensors
from megatron_octo.convert.show import format_tree, show
from megatron_octo.convert.walk import import_tensors, source_shapes, table_of
from megatron_octo.errors import CheckpointError, ConfigError, DataError

MODEL = ModelConfig(layers=2, hidden=16, heads=4, kv_groups=2, ffn=24, vocabulary=40, tied_embeddings=True)


def _tensors(model: ModelConfig = MODEL) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    shapes = source_shapes(LLAMA, geometry(model))
    return {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}


def _hf(directory: Path, tensors: dict[str, torch.Tensor] | None = None, **changes: object) -> Path:
    directory.mkdir(parents=True)
    config = {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "num_hidden_layers": 2, "hidden_size": 16,
        "num_attention_heads": 4, "num_key_value_heads": 2, "intermediate_size": 24, "vocab_size": 40,
        "tie_word_embeddings": True, "rms_norm_eps": 1e-5, "rope_theta": 500000.0, "max_position_embeddings": 64,
    }  # fmt: skip
    (directory / "config.json").write_text(json.dumps({**config, **changes}))
    save_file(tensors or _tensors(), directory / "model.safetensors")
    return directory


def _shards(directory: Path, parts: list[dict[str, torch.Tensor]], listed: dict[str, str] | None = None) -> Path:
    directory.mkdir()
    names = [f"model-{number:05d}-of-{len(parts):05d}.safetensors" for number in range(1, len(parts) + 1)]
    for name, part in zip(names, parts, strict=True):
        save_file(part, directory / name)
    own = {tensor: name for name, part in zip(names, parts, strict=True) for tensor in part}
    (directory / "model.safetensors.index.json").write_text(json.dumps({"weight_map": listed or own}))
    return directory


ONE, TWO = torch.ones(2, 3), torch.arange(4.0)


def test_a_stream_becomes_files_that_safetensors_reads(tmp_path: Path) -> None:
    tensors = {"a": ONE, "b": TWO, "c": torch.tensor([1.5, -0.0, float("nan")])}
    plan = [Planned(name, tuple(tensor.shape), "float32") for name, tensor in tensors.items()]
    assert write_safetensors(tmp_path, plan, iter(tensors.items())) == ["model.safetensors"]
    loaded = load_file(tmp_path / "model.safetensors")
    assert all(torch.equal(loaded[n].view(torch.int32), tensors[n].view(torch.int32)) for n in tensors)
    (length,) = struct.unpack("<Q", (tmp_path / "model.safetensors").read_bytes()[:8])
    assert length % 8 == 0


def test_shards_close_by_size_and_the_index_names_them(tmp_path: Path) -> None:
    tensors = {"a": torch.zeros(10), "big": torch.zeros(100), "c": torch.zeros(4), "d": torch.zeros(4)}
    plan = [Planned(name, tuple(tensor.shape), "bfloat16") for name, tensor in tensors.items()]
    names = write_safetensors(tmp_path, plan, iter(tensors.items()), shard_bytes=32)
    assert len(names) == 4
    with SafetensorsDirectory(tmp_path) as weights:
        assert dict(weights.shapes()) == {name: tuple(tensor.shape) for name, tensor in tensors.items()}
        assert set(weights.dtypes.values()) == {"BF16"}
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == 2 * 118
    assert index["weight_map"]["c"] == index["weight_map"]["d"] == "model-00003-of-00003.safetensors"


@pytest.mark.parametrize("stream", [[], [("b", TWO), ("a", ONE)], [("a", ONE.T), ("b", TWO)]])
def test_a_stream_that_leaves_the_plan_is_an_error(tmp_path: Path, stream: list) -> None:
    plan = [Planned("a", (2, 3), "float32"), Planned("b", (4,), "float32")]
    with pytest.raises(ValueError, match="planned"):
        write_safetensors(tmp_path, plan, iter(stream))


def test_pickled_weights_are_refused_unopened(tmp_path: Path) -> None:
    (tmp_path / "pytorch_model.bin").write_bytes(b"cos\nsystem\n")
    with pytest.raises(DataError, match=r"pickled weights \(pytorch_model.bin\)"):
        from_hf(tmp_path, tmp_path / "out")


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        (lambda d: (d / "model-00002-of-00002.safetensors").unlink(), r"00002-of-00002.safetensors: missing"),
        (lambda d: (d / "model-00001-of-00002.safetensors").write_bytes(b"\xff" * 40), "not a safetensors file"),
        (lambda d: (d / "model.safetensors.index.json").write_text("{"), "not readable as JSON"),
        (lambda d: (d / "model.safetensors.index.json").write_text("{}"), "no weight_map"),
    ],
)
def test_damaged_shards_are_named(tmp_path: Path, fault, message: str) -> None:
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
    with pytest.raises(DataError, match="no such directory"):
        SafetensorsDirectory(tmp_path / "nowhere")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop("model.layers.1.mlp.up_proj.weight"), "missing model.layers.1.mlp.up_proj.weight"),
        (lambda t: t.update({"model.layers.2.input_layernorm.weight": torch.ones(16)}), "extra model.layers.2"),
        (lambda t: t.update({"model.norm.weight": torch.ones(17)}), r"model.norm.weight \[17\] instead of \[16\]"),
    ],
)
def test_coverage_names_the_tensor(tmp_path: Path, change, message: str) -> None:
    tensors = _tensors()
    change(tensors)
    with pytest.raises(DataError, match=message):
        from_hf(_hf(tmp_path / "hf", tensors), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_dropped_layer_of_many_is_counted(tmp_path: Path) -> None:
    tensors = {name: tensor for name, tensor in _tensors().items() if ".layers.1." not in name}
    with pytest.raises(DataError, match="missing .* and 3 more"):
        from_hf(_hf(tmp_path / "hf", tensors), tmp_path / "out")


def test_two_rules_for_one_tensor_are_an_error() -> None:
    with pytest.raises(ValueError, match="two rules of one table name model.norm.weight"):
        source_shapes((*LLAMA, Rename("other", "model.norm.weight", ("hidden",))), geometry(MODEL))


def test_a_tied_head_may_be_written_out_if_it_is_the_embedding(tmp_path: Path) -> None:
    embedding = _tensors()["model.embed_tokens.weight"]
    same = {**_tensors(), "lm_head.weight": embedding.clone()}
    other = {**_tensors(), "lm_head.weight": embedding + 1e-3}
    plain = from_hf(_hf(tmp_path / "plain"), tmp_path / "a")
    written = from_hf(_hf(tmp_path / "same", same), tmp_path / "b")
    assert plain["model"] == written["model"]
    assert show(tmp_path / "a")["tensors"] == show(tmp_path / "b")["tensors"]
    with pytest.raises(DataError, match="lm_head.weight differs from model.embed_tokens.weight"):
        from_hf(_hf(tmp_path / "other", other), tmp_path / "c")
    assert not (tmp_path / "c").exists()


def test_nothing_named_by_auto_map_is_executed(tmp_path: Path) -> None:
    directory = _hf(tmp_path / "hf", auto_map={"AutoModelForCausalLM": "evil.Model", "AutoConfig": "evil.Config"})
    (directory / "evil.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')")
    from_hf(directory, tmp_path / "out")
    assert not (tmp_path / "ran").exists()


def test_an_import_is_kept_if_identical_and_never_overwritten(tmp_path: Path) -> None:
    source = _hf(tmp_path / "hf")
    facts = from_hf(source, tmp_path / "out")
    assert facts["source"]["files"].keys() == {"config.json", "model.safetensors"}
    stamp = (tmp_path / "out" / "seal.json").stat().st_mtime_ns
    assert from_hf(source, tmp_path / "out") == facts
    assert (tmp_path / "out" / "seal.json").stat().st_mtime_ns == stamp
    with pytest.raises(ConfigError, match="already exists"):
        from_hf(_hf(tmp_path / "hf2", rms_norm_eps=1e-6), tmp_path / "out")
    damaged = next((tmp_path / "out").glob("*.distcp"))
    damaged.write_bytes(damaged.read_bytes()[:-1])
    with pytest.raises(ConfigError, match="already exists"):
        from_hf(source, tmp_path / "out")


def test_publishing_leaves_all_or_nothing(tmp_path: Path) -> None:
    target = tmp_path / "model"
    (tmp_path / ".model.partial").mkdir()
    (tmp_path / ".model.partial" / "old").touch()
    with pytest.raises(RuntimeError), hf_io.publishing(target) as partial:
        assert list(partial.iterdir()) == []
        raise RuntimeError
    assert list(tmp_path.iterdir()) == []
    with hf_io.publishing(target) as partial:
        (partial / "new").touch()
    assert [path.name for path in target.iterdir()] == ["new"]
    with pytest.raises(ConfigError, match="already exists"), hf_io.publishing(target):
        pass


def test_what_to_hf_refuses_before_it_writes(tmp_path: Path) -> None:
    from_hf(_hf(tmp_path / "hf"), tmp_path / "checkpoint")
    with pytest.raises(ConfigError, match="no tokenizer is known"):
        to_hf(tmp_path / "checkpoint", tmp_path / "out")
    with pytest.raises(ConfigError, match="dtype 'int4'"):
        to_hf(tmp_path / "checkpoint", tmp_path / "out", dtype="int4")
    with pytest.raises(CheckpointError, match="no such directory"):
        to_hf(tmp_path / "nowhere", tmp_path / "out")
    with pytest.raises(ConfigError, match="named as target twice"):
        to_hf_many([(tmp_path / "checkpoint", tmp_path / "out"), (tmp_path / "checkpoint", tmp_path / "x/../out")])
    metadata = tmp_path / "checkpoint" / "metadata.json"
    metadata.write_text(metadata.read_text() + " ")
    with pytest.raises(CheckpointError, match=r"metadata.json: holds \d+ bytes"):
        to_hf(tmp_path / "checkpoint", tmp_path / "out", tokenizer=tmp_path)
    assert not (tmp_path / "out").exists()


def test_show_tells_both_formats_without_loading(tmp_path: Path) -> None:
    source = _hf(tmp_path / "hf")
    from_hf(source, tmp_path / "checkpoint")
    there, here = show(source), show(tmp_path / "checkpoint")
    assert (there["format"], here["format"]) == ("hugging_face", "torch_dist")
    assert here["parameters"] - there["parameters"] == (128 - 40) * 16
    assert here["tensors"]["decoder.layers.1.self_attention.linear_qkv.weight"] == {
        "shape": [32, 16], "dtype": "float32", "bytes": 2048,
    }  # fmt: skip
    assert here["lineage"]["source"]["directory"] == str(source)
    tree = format_tree(here)
    assert "decoder.layers.*.mlp.linear_fc1.weight" in tree
    assert "x 2" in tree
    with pytest.raises(CheckpointError):
        show(tmp_path / "nothing")


def test_a_run_directory_means_its_latest_checkpoint(tmp_path: Path) -> None:
    from_hf(_hf(tmp_path / "hf"), tmp_path / "run" / "checkpoints" / "step_00000007")
    (tmp_path / "run" / "latest").write_text("step_00000007\n")
    assert find_checkpoint(tmp_path / "run").name == "step_00000007"
    assert find_checkpoint(tmp_path / "run/checkpoints/step_00000007").name == "step_00000007"


def test_unknown_families_are_refused() -> None:
    with pytest.raises(ConfigError, match="'mamba' cannot be converted"):
        table_of("mamba")


def test_import_checks_before_it_reads() -> None:
    class Nothing:
        where = "nothing"

        def shapes(self) -> dict:
            return {}

        def read(self, name: str) -> torch.Tensor:
            raise AssertionError(name)

    with pytest.raises(DataError, match="nothing: tensors do not cover the model"):
        next(import_tensors(LLAMA, geometry(MODEL), Nothing()))
