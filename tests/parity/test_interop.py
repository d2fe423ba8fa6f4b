"""Checkpoints of other trainers: what we write is what they store, and what they write is read."""

from __future__ import annotations

import importlib
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from foreign_checkpoints import EMBEDDING, MODELS, SIZES, Numbered, foreign, same_weights, written

from megatron_octo.checkpoint.dist import read_metadata, stored_names
from megatron_octo.checkpoint.dist_write import write_model
from megatron_octo.checkpoint.seal import verify_seal
from megatron_octo.config.model import ModelConfig, RopeScaling
from megatron_octo.convert.layouts import LAYOUTS, layout_of
from megatron_octo.convert.megatron_io import find_checkpoint, read_origin, weights_of
from megatron_octo.errors import CheckpointError, ConfigError

ROOT = Path(__file__).resolve().parents[2]
INVENTORY = json.loads((ROOT / "tests/assets/interop.json").read_text(encoding="utf-8"))
FOREIGN = [name for name in LAYOUTS if name != "octo"]


@pytest.mark.parametrize("family", MODELS)
@pytest.mark.parametrize("trainer", INVENTORY)
def test_we_store_what_their_code_stores(trainer: str, family: str, tmp_path: Path) -> None:
    """Names and shapes recorded from their own savers by tools/check_interop.py."""
    recorded = INVENTORY[trainer][family]
    weights = weights_of(written(tmp_path / "out", MODELS[family], trainer))
    tensors = {name: list(facts.shape) for name, facts in read_metadata(weights).items()}
    assert tensors == recorded["tensors"]
    assert recorded["objects"], "their modules' states were not recorded"
    assert set(recorded["objects"]) <= stored_names(weights) - tensors.keys()


@pytest.mark.parametrize("family", MODELS)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_what_we_write_is_sealed_and_read_back(layout: str, family: str, tmp_path: Path) -> None:
    out = written(tmp_path / "out", MODELS[family], layout)
    verify_seal(out)
    origin = read_origin(find_checkpoint(out))
    assert (origin.layout, origin.model) == (layout, MODELS[family])
    assert same_weights(out, MODELS[family])


@pytest.mark.parametrize("family", MODELS)
@pytest.mark.parametrize("layout", FOREIGN)
def test_their_own_description_says_the_same_model(layout: str, family: str, tmp_path: Path) -> None:
    out = foreign(tmp_path / "out", MODELS[family], layout)
    origin = read_origin(find_checkpoint(out))
    assert (origin.layout, origin.model) == (layout, MODELS[family])
    assert origin.lineage["layout"] == layout and len(origin.lineage["seal"]) == 64
    assert same_weights(out, MODELS[family])


def test_a_checkpoint_of_a_run_is_found_by_megatrons_pointer(tmp_path: Path) -> None:
    out = foreign(tmp_path / "out", MODELS["llama"], "megatron-bridge")
    (out / "iter_0000000").rename(out / "iter_0000042")
    (out / "latest_checkpointed_iteration.txt").write_text("42\n")
    assert find_checkpoint(out) == out / "iter_0000042"
    assert read_origin(find_checkpoint(out)).facts["step"] == 42


@pytest.mark.parametrize("layout", ["megatron-lm", "megatron-bridge"])
def test_what_they_trained_on_in_our_directory_is_found(layout: str, tmp_path: Path) -> None:
    out = written(tmp_path / "out", MODELS["llama"], layout)
    assert find_checkpoint(out) == out
    shutil.copytree(weights_of(out), out / "iter_0000005")
    (out / "latest_checkpointed_iteration.txt").write_text("5")
    assert find_checkpoint(out) == weights_of(find_checkpoint(out)) == out / "iter_0000005"
    assert read_origin(find_checkpoint(out)).layout == layout
    shutil.rmtree(out / "iter_0000005")
    with pytest.raises(CheckpointError, match="names '5'"):
        find_checkpoint(out)


@pytest.mark.parametrize("said", ["7", "", "release", "../x"])
def test_a_pointer_to_nothing_is_named(said: str, tmp_path: Path) -> None:
    (tmp_path / "latest_checkpointed_iteration.txt").write_text(said)
    with pytest.raises(CheckpointError, match="latest_checkpointed_iteration.txt: names"):
        find_checkpoint(tmp_path)


@pytest.mark.parametrize("layout", FOREIGN)
def test_an_unsealed_checkpoint_is_known_by_its_weights_and_its_description(layout: str, tmp_path: Path) -> None:
    out = foreign(tmp_path / "out", MODELS["qwen3"], layout)
    before, again = (read_origin(find_checkpoint(out)).digest for _ in range(2))
    assert before == again
    shard = next(weights_of(find_checkpoint(out)).glob("*.distcp"))
    content = shard.read_bytes()
    shard.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    assert read_origin(find_checkpoint(out)).digest != before, "of the same process, of files as they are now"
    shard.write_bytes(content)
    assert read_origin(find_checkpoint(out)).digest == before
    if layout == "nemo":  # whose description lies in another folder than the weights
        path = out / "context" / "model.yaml"
        path.write_text(path.read_text().replace("rotary_base: 500000", "rotary_base: 10000"))
        origin = read_origin(find_checkpoint(out))
        assert origin.model.rope_theta == 10000 and origin.digest != before


def test_legacy_formats_are_named(tmp_path: Path) -> None:
    (tmp_path / "iter_0000003" / "mp_rank_00").mkdir(parents=True)
    (tmp_path / "latest_checkpointed_iteration.txt").write_text("3")
    with pytest.raises(CheckpointError, match="a file for each rank.*torch_dist"):
        find_checkpoint(tmp_path)
    (tmp_path / "dcp").mkdir()
    (tmp_path / "dcp" / ".metadata").touch()
    with pytest.raises(CheckpointError, match="fsdp_dtensor"):
        find_checkpoint(tmp_path / "dcp")


@pytest.mark.parametrize("rows", [130, 512])
def test_their_padding_of_the_vocabulary_becomes_ours(rows: int, tmp_path: Path) -> None:
    model = MODELS["qwen3"]
    weights, layout = Numbered(model), layout_of("megatron-lm")
    for name in (EMBEDDING, "output_layer.weight"):
        whole = torch.full((rows, model.hidden), 9.0)
        whole[: model.vocabulary] = weights.tensors[name][: model.vocabulary]
        weights.tensors[name] = whole
    places = layout.places(weights.shapes())
    write_model(tmp_path / "out", weights, {}, {}, places, lambda d: layout.write(d, model, "float32"), layout.into)
    (tmp_path / "out" / "run.json").unlink()
    tensors = read_origin(find_checkpoint(tmp_path / "out" / "release")).tensors()
    wanted = Numbered(model).tensors[EMBEDDING]
    assert tensors.shapes()[EMBEDDING] == tuple(wanted.shape)
    found = torch.full(wanted.shape, 7.0)
    tensors.fill(EMBEDDING, 0, found)
    wanted[model.vocabulary :] = (
        0.0 if rows == 130 else 9.0
    )  # rows nobody stored are zeros; theirs are cut, not changed
    assert torch.equal(found, wanted)


def test_a_forgotten_tensor_shows(tmp_path: Path) -> None:
    """A bias that no family of ours has must not be dropped silently."""
    weights, layout = Numbered(MODELS["llama"]), layout_of("megatron-lm")
    weights.tensors["decoder.layers.0.mlp.linear_fc2.bias"] = torch.zeros(32)
    places = layout.places(weights.shapes())
    extras = lambda directory: layout.write(directory, MODELS["llama"], "float32")  # noqa: E731
    write_model(tmp_path / "out", weights, {}, {}, places, extras, layout.into)
    names = read_origin(find_checkpoint(tmp_path / "out" / "release")).tensors().shapes()
    assert "decoder.layers.0.mlp.linear_fc2.bias" in names


def test_their_optimizer_is_left_out(tmp_path: Path) -> None:
    weights, layout = Numbered(MODELS["llama"]), layout_of("nemo")
    places = layout.places(weights.shapes())
    weights.tensors["chained_0.optimizer.state.exp_avg.x"] = torch.zeros(4)
    extras = lambda directory: layout.write(directory, MODELS["llama"], "float32")  # noqa: E731
    write_model(tmp_path / "out", weights, {}, {}, places, extras, layout.into)
    (tmp_path / "out" / "run.json").unlink()
    assert find_checkpoint(tmp_path / "out" / "weights") == find_checkpoint(tmp_path / "out")
    assert same_weights(tmp_path / "out" / "weights", MODELS["llama"])


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("add_bias_linear", True), ("normalization", "LayerNorm"), ("gated_linear_unit", False),
        ("position_embedding_type", "learned_absolute"), ("rotary_percent", 0.5), ("rotary_interleaved", True),
        ("num_moe_experts", 8), ("multi_latent_attention", True), ("layernorm_zero_centered_gamma", True),
        ("mtp_num_layers", 1), ("window_size", [128, 0]), ("softmax_scale", 0.5), ("qk_l2_norm", True),
        ("add_qkv_bias", True), ("vocab_size", 5000), ("num_layers", None), ("no_rope_freq", 4),
        ("activation_func", {"_target_": "torch.nn.functional.gelu", "_call_": False}), ("old_context_len", 4096),
    ],
)  # fmt: skip
def test_what_is_not_ours_is_refused_by_name(key: str, value: object, tmp_path: Path) -> None:
    out = foreign(tmp_path / "out", MODELS["qwen3"], "megatron-bridge")
    path = out / "iter_0000000" / "run_config.yaml"
    config = yaml.safe_load(path.read_text())
    scaled = {"scale_factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
    config["model"] |= (scaled if key == "old_context_len" else {}) | {key: value}
    path.write_text(yaml.safe_dump(config))
    named = "original_max_position_embeddings" if key == "old_context_len" else key
    with pytest.raises(ConfigError, match=named):
        read_origin(find_checkpoint(out))


def test_a_factor_megatron_lm_ignores_is_refused_both_ways(tmp_path: Path) -> None:
    model = ModelConfig(family="llama", **SIZES, rope_scaling=RopeScaling(factor=32.0))
    with pytest.raises(ConfigError, match="factor = 32"):
        layout_of("megatron-lm").refuse(model)
    layout_of("megatron-bridge").refuse(model)
    with pytest.raises(ConfigError, match="rope_scaling_factor = 32"):
        read_origin(find_checkpoint(foreign(tmp_path / "out", model, "megatron-lm")))


def test_nemo_scales_only_its_llamas() -> None:
    with pytest.raises(ConfigError, match="qwen2"):
        layout_of("nemo").refuse(ModelConfig(family="qwen2", **SIZES, rope_scaling=RopeScaling(factor=8.0)))


def test_an_unknown_layout_is_refused() -> None:
    with pytest.raises(ConfigError, match="known are octo, megatron-lm, megatron-bridge, nemo"):
        layout_of("gguf")


def test_an_unstated_vocabulary_is_counted_in_the_tokenizer(tmp_path: Path) -> None:
    out = foreign(tmp_path / "out", MODELS["llama"], "megatron-bridge")
    tokenizer = out / "iter_0000000" / "tokenizer"
    tokenizer.mkdir()
    words = {"model": {"vocab": {"a": 0, "b": 127}}, "added_tokens": [{"id": 129, "content": "<end>"}]}
    (tokenizer / "tokenizer.json").write_text(json.dumps(words))
    path = out / "iter_0000000" / "run_config.yaml"
    config = yaml.safe_load(path.read_text())
    config["model"]["vocab_size"] = None
    path.write_text(yaml.safe_dump(config))
    origin = read_origin(find_checkpoint(out))
    assert (origin.model.vocabulary, origin.tokenizer) == (130, tokenizer)
    (tokenizer / "tokenizer.json").unlink()
    assert read_origin(find_checkpoint(out)).model.vocabulary == 256, "all stored rows, where nobody knows better"


@pytest.mark.slow
@pytest.mark.parametrize("trainer", ["megatron-lm", "megatron-bridge"])
def test_exchange_with_their_code(trainer: str) -> None:
    variable = f"OCTO_{trainer.upper().replace('-', '_')}"
    if not os.environ.get(variable):
        pytest.skip(f"{variable} names no checkout: only the recorded inventory was checked")
    command = [sys.executable, "tools/check_interop.py", f"--{trainer}", os.environ[variable]]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=250)
    assert done.returncode == 0, done.stdout + done.stderr[-2000:]


def test_nemo_builds_its_configuration_from_our_context(tmp_path: Path) -> None:
    reason = "nemo-toolkit[llm] is not installed: our NeMo context was not held against NeMo's classes"
    pytest.importorskip("nemo.collections.llm", reason=reason, exc_type=ImportError)
    for family, model in MODELS.items():
        context = written(tmp_path / family, model, "nemo") / "context" / "model.yaml"
        values = yaml.safe_load(context.read_text())["config"]
        module, _, name = values.pop("_target_").rpartition(".")
        kind = getattr(importlib.import_module(module), name)
        values |= {"activation_func": torch.nn.functional.silu, "params_dtype": torch.float32}
        values |= dict.fromkeys(("bias_activation_fusion", "masked_softmax_fusion", "persist_layer_norm"), False)
        values |= dict.fromkeys(("bias_dropout_fusion", "apply_rope_fusion", "gradient_accumulation_fusion"), False)
        built = kind(**values)
        assert (built.num_layers, built.qk_layernorm, built.add_qkv_bias) == (3, model.qk_norm, model.qkv_bias)
        assert getattr(built, "scale_factor", None) == (model.rope_scaling.factor if model.rope_scaling else None)
