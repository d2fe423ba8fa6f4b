"""A conversion is the model it was, for every family: bits there and back, and the same answers in every program."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from convert_models import FAMILIES, LLAMA3, VOCABULARY, write_hf, write_tokenizer
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from megatron_octo.checkpoint.dist import TorchDist
from megatron_octo.checkpoint.part import write_parts
from megatron_octo.checkpoint.seal import seal
from megatron_octo.checkpoint.sharded import Sharder, load_state
from megatron_octo.checkpoint.store import read_facts, write_facts
from megatron_octo.checkpoint.tensors import read
from megatron_octo.config.layout import ParallelConfig
from megatron_octo.config.model import ModelConfig
from megatron_octo.convert import forward
from megatron_octo.convert.api import from_hf, to_hf, to_hf_many, verify
from megatron_octo.convert.compare import diff
from megatron_octo.convert.derive import average, truncate
from megatron_octo.convert.forward import single_process
from megatron_octo.convert.show import show
from megatron_octo.convert.views import same_bits
from megatron_octo.errors import ConfigError
from megatron_octo.model.build import build_gpt

pytestmark = [pytest.mark.timeout(180), pytest.mark.slow]

KINDS = {
    "llama": {},
    "llama untied, a KV head for each": {"tie_word_embeddings": False, "num_key_value_heads": 8},
    "llama bf16, wide heads": {"dtype": torch.bfloat16, "head_dim": 16},
    "llama factor 32": {"rope_parameters": {**LLAMA3, "factor": 32.0}},
    "llama fp16": {"dtype": torch.float16},
    "qwen2": {"family": "qwen2"},
    "qwen2 bf16 untied": {"family": "qwen2", "dtype": torch.bfloat16, "tie_word_embeddings": False},
    "qwen3": {"family": "qwen3"},
    "qwen3 untied, one KV head": {"family": "qwen3", "tie_word_embeddings": False, "num_key_value_heads": 1},
}
PROMPT = torch.arange(40)[None] * 7 % VOCABULARY


class World:
    """One model of each kind: as Hugging Face directory, as checkpoint, and as certified export."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.tokenizer = write_tokenizer(root / "tokenizer")
        for kind, changes in KINDS.items():
            write_hf(root / kind / "hf", self.tokenizer, **changes)
            from_hf(root / kind / "hf", root / kind / "checkpoint")
        pairs = [(root / kind / "checkpoint", root / kind / "out") for kind in KINDS]
        self.certificates = dict(zip(KINDS, to_hf_many(pairs), strict=True))


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with pytest.MonkeyPatch.context() as patch, single_process():
        patch.setattr(forward, "_LONGEST", 128)  # what certificates measure has tests of its own
        yield World(tmp_path_factory.mktemp("convert"))
    torch.set_num_threads(threads)


def _weights(directory: Path) -> dict[str, torch.Tensor]:
    return {name: tensor for file in directory.glob("*.safetensors") for name, tensor in load_file(file).items()}


def _content(checkpoint: Path) -> dict[str, torch.Tensor]:
    source = TorchDist(checkpoint)
    return {name: read(source, name) for name in source.shapes()}


def _same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(same_bits(one[name], other[name]) for name in one)


def _load(directory: Path) -> torch.nn.Module:
    return AutoModelForCausalLM.from_pretrained(directory, dtype="auto").eval()


@pytest.mark.parametrize("kind", KINDS)
def test_there_and_back_is_bitwise(world: World, kind: str) -> None:
    assert world.certificates[kind]["valid"] is True
    source, out = world.root / kind / "hf", world.root / kind / "out"
    assert _same(_weights(source), _weights(out))
    assert diff(source, out)["same"] is diff(source, world.root / kind / "checkpoint")["same"] is True


@pytest.mark.parametrize("kind", KINDS)
def test_transformers_loads_the_export_as_it_loads_the_source(world: World, kind: str) -> None:
    before, after = _load(world.root / kind / "hf"), _load(world.root / kind / "out")
    assert type(after) is type(before)
    assert after.dtype == before.dtype
    with torch.no_grad():
        assert torch.equal(before(PROMPT).logits, after(PROMPT).logits)
        far = {"position_ids": torch.arange(12000, 12040)[None], "attention_mask": torch.ones_like(PROMPT)}
        assert torch.equal(before(PROMPT, **far).logits, after(PROMPT, **far).logits)
    tokenizer = AutoTokenizer.from_pretrained(world.root / kind / "out")
    assert tokenizer.eos_token_id == after.config.eos_token_id == after.generation_config.eos_token_id == 2
    assert tokenizer.decode(tokenizer.encode("Question: 12")) == "Question: 12"


class _NoOptimizer:
    def reload_model_params(self, weights: dict | None) -> None:
        """There is none."""


@pytest.mark.parametrize("kind", [kind for kind in KINDS if "16" not in kind])
def test_the_trainer_loads_the_import_and_answers_as_transformers(world: World, kind: str) -> None:
    """Through megatron-core's own loader and model: nothing of the conversion's reading is used."""
    model = ModelConfig(**read_facts(world.root / kind / "checkpoint")["model"])
    gpt = build_gpt(model, ParallelConfig(), "fp32", pre_process=True, post_process=True, seed=1).eval()
    load_state(world.root / kind / "checkpoint", [gpt], _NoOptimizer(), moments=False)
    with torch.no_grad():
        ours = gpt(PROMPT, torch.arange(40)[None], None)[..., :VOCABULARY]
        theirs = _load(world.root / kind / "hf")(PROMPT).logits
    assert theirs.std() > 0.1
    torch.testing.assert_close(ours, theirs, atol=2e-5, rtol=1e-5)


def test_config_is_spelled_for_both_majors_of_transformers(world: World) -> None:
    for kind, factor in (("llama", 8.0), ("llama factor 32", 32.0)):
        values = json.loads((world.root / kind / "out" / "config.json").read_text())
        rope = {**LLAMA3, "factor": factor}
        assert values["rope_theta"] == values["rope_parameters"]["rope_theta"] == LLAMA3["rope_theta"]
        assert values["rope_scaling"] == {key: value for key, value in rope.items() if key != "rope_theta"}
        assert values["rope_parameters"] == rope
        assert values["torch_dtype"] == values["dtype"] == "float32"


@pytest.mark.parametrize("family", FAMILIES)
def test_a_checkpoint_saved_by_megatron_comes_back_bitwise(world: World, tmp_path: Path, family: str) -> None:
    """Megatron -> Hugging Face -> Megatron, with rows of padding that training left non-zero."""
    values = {"layers": 2, "hidden": 32, "heads": 4, "kv_groups": 2, "ffn": 48, "vocabulary": VOCABULARY}
    model = ModelConfig(**values, family=family, max_positions=64, tied_embeddings=False)
    gpt = build_gpt(model, ParallelConfig(), "fp32", pre_process=True, post_process=True, seed=5)
    with torch.no_grad():
        for name, parameter in gpt.named_parameters():
            if "norm" in name or name.endswith("bias"):
                parameter.normal_(1, 0.2)
        gpt.embedding.word_embeddings.weight[VOCABULARY:] = 1.5
        gpt.output_layer.weight[VOCABULARY:] = 0
    checkpoint = tmp_path / "run" / "checkpoints" / "step_00000003"
    checkpoint.mkdir(parents=True)
    write_parts(checkpoint, Sharder([gpt], None).part())
    config = {"name": "long", "model": model.model_dump(mode="json"), "data": {"tokenizer": str(world.tokenizer)}}
    facts = {"step": 3, "run_tokens": 30, "tokens": 130, "config": config, "lineage": {"parent": "stable"}}
    write_facts(checkpoint, facts)
    seal(checkpoint)
    (tmp_path / "run" / "latest").write_text(checkpoint.name)

    certificate = to_hf(tmp_path / "run", tmp_path / "hf")
    assert certificate["valid"] is True
    assert certificate["vocabulary"]["padding_is_zero"] is False
    lineage = certificate["lineage"]
    assert (lineage["run"], lineage["step"], lineage["tokens"]) == ("long", 3, 130)
    assert lineage["lineage"] == {"parent": "stable"}
    assert _weights(tmp_path / "hf")["model.embed_tokens.weight"].shape == (VOCABULARY, 32)

    from_hf(tmp_path / "hf", tmp_path / "again")
    first, second = _content(checkpoint), _content(tmp_path / "again")
    assert first["embedding.word_embeddings.weight"][VOCABULARY:].eq(1.5).all()
    first["embedding.word_embeddings.weight"][VOCABULARY:] = 0
    assert _same(first, second)


def test_export_in_another_dtype_and_in_shards(world: World, tmp_path: Path) -> None:
    certificate = to_hf(world.root / "llama" / "checkpoint", tmp_path / "out", dtype="bf16", shard_bytes=100_000)
    assert certificate["dtype"] == {"checkpoint": "float32", "export": "bfloat16"}
    assert sum(name.endswith(".safetensors") for name in certificate["files"]) > 2
    assert verify(tmp_path / "out")["valid"] is True
    loaded = _load(tmp_path / "out")
    assert loaded.dtype == torch.bfloat16
    original = _weights(world.root / "llama" / "hf")["model.layers.1.mlp.up_proj.weight"]
    assert torch.equal(loaded.model.layers[1].mlp.up_proj.weight, original.to(torch.bfloat16))
    from_hf(tmp_path / "out", tmp_path / "again")
    assert diff(tmp_path / "out", tmp_path / "again")["same"] is True


@pytest.mark.parametrize("family", FAMILIES)
def test_a_truncated_model_answers_as_the_whole_one_cut(world: World, tmp_path: Path, family: str) -> None:
    truncate(world.root / family / "hf", 2, tmp_path / "hf")
    whole, cut = _load(world.root / family / "hf"), _load(tmp_path / "hf")
    whole.model.layers = whole.model.layers[:2]
    with torch.no_grad():
        assert torch.equal(whole(PROMPT, use_cache=False).logits, cut(PROMPT, use_cache=False).logits)
    assert AutoTokenizer.from_pretrained(tmp_path / "hf").eos_token_id == 2
    truncate(world.root / family / "checkpoint", 2, tmp_path / "checkpoint")
    assert diff(tmp_path / "hf", tmp_path / "checkpoint")["same"] is True
    certificate = to_hf(tmp_path / "checkpoint", tmp_path / "out")
    assert certificate["valid"] is True
    assert _same(_weights(tmp_path / "hf"), _weights(tmp_path / "out"))


def test_an_average_is_exported_with_the_names_of_its_parts(world: World, tmp_path: Path) -> None:
    write_hf(tmp_path / "hf", world.tokenizer, seed=4)
    from_hf(tmp_path / "hf", tmp_path / "checkpoint")
    average([world.root / "llama" / "checkpoint", tmp_path / "checkpoint"], tmp_path / "average")
    certificate = to_hf(tmp_path / "average", tmp_path / "out")
    assert certificate["valid"] is True
    parts = certificate["lineage"]["source"]["average_of"]
    assert [Path(part["checkpoint"]).name for part in parts] == ["checkpoint", "checkpoint"]
    one, other, mean = (_weights(path) for path in (world.root / "llama" / "hf", tmp_path / "hf", tmp_path / "out"))
    assert all(torch.equal(mean[name], ((one[name].double() + other[name]) / 2).float()) for name in mean)


def test_an_import_stands_alone(world: World, tmp_path: Path) -> None:
    """With the directory it was made from gone, the checkpoint still has tokenizer and generation settings."""
    source = write_hf(tmp_path / "hf", world.tokenizer)
    settings = json.loads((source / "generation_config.json").read_text())
    (source / "generation_config.json").write_text(json.dumps({**settings, "eos_token_id": [2, 5], "temperature": 0.6}))
    (source / "LICENSE").write_text("terms")
    from_hf(source, tmp_path / "checkpoint")
    source.rename(tmp_path / "gone")
    to_hf(tmp_path / "checkpoint", tmp_path / "out")
    kept = json.loads((tmp_path / "out" / "generation_config.json").read_text())
    assert (kept["temperature"], kept["eos_token_id"]) == (0.6, [2, 5])
    assert json.loads((tmp_path / "out" / "config.json").read_text())["eos_token_id"] == [2, 5]
    assert (tmp_path / "out" / "LICENSE").read_text() == "terms"


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("layout", ["megatron-lm", "megatron-bridge", "nemo"])
def test_every_layout_holds_the_same_model(world: World, tmp_path: Path, layout: str, family: str) -> None:
    """Stacked or not, under whatever names: the tools see through it, and export gives the source's bits."""
    source = world.root / family / "hf"
    from_hf(source, tmp_path / "theirs", layout=layout)
    assert diff(source, tmp_path / "theirs")["same"] is True
    assert diff(world.root / family / "checkpoint", tmp_path / "theirs")["same"] is True
    assert show(tmp_path / "theirs")["lineage"]["layout"] == layout
    truncate(tmp_path / "theirs", 1, tmp_path / "cut")
    truncate(source, 1, tmp_path / "hf")
    assert diff(tmp_path / "cut", tmp_path / "hf")["same"] is True
    certificate = to_hf(tmp_path / "theirs", tmp_path / "out")
    assert certificate["valid"] is True
    assert _same(_weights(source), _weights(tmp_path / "out"))


def test_an_existing_target_is_kept_if_identical_and_refused_otherwise(world: World, tmp_path: Path) -> None:
    out = world.root / "llama" / "out"
    before = {path.name: path.stat().st_mtime_ns for path in out.iterdir()}
    assert to_hf_many([(world.root / "llama" / "checkpoint", out)]) == [world.certificates["llama"]]
    for other, dtype in (("qwen2", "source"), ("llama", "bf16")):
        with pytest.raises(ConfigError, match="out: already exists"):
            to_hf(world.root / other / "checkpoint", out, dtype=dtype)
    assert {path.name: path.stat().st_mtime_ns for path in out.iterdir()} == before
    with pytest.raises(ConfigError, match="checkpoint: already exists"):
        from_hf(world.root / "qwen2" / "hf", world.root / "llama" / "checkpoint")
