"""Every fault a conversion is known to have, planted on purpose: the certificate must name it."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from certified import Memory, MemoryOrigin, World, change_weights, origin_of
from convert_models import VOCABULARY, write_hf

from megatron_octo.convert import forward
from megatron_octo.convert.certificate import certify, examine, explain, require_valid
from megatron_octo.convert.forward import single_process
from megatron_octo.convert.hf_io import tokenizer_facts, write_configuration
from megatron_octo.convert.rules import FusedQKV, GatedPair, Geometry, Rows
from megatron_octo.errors import CertificateError

pytestmark = [pytest.mark.timeout(120), pytest.mark.usefixtures("short_prompts")]

Tensors = dict[str, torch.Tensor]
Change = Callable[[Tensors], None]

QKV = "decoder.layers.1.self_attention.linear_qkv.weight"
ATTENTION, MLP = "model.layers.1.self_attn", "model.layers.0.mlp"
OUTPUTS = {"rope", "logits"}


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    return World(tmp_path_factory.mktemp("planted"))


@pytest.fixture(scope="module", autouse=True)
def _one_process() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with single_process():
        yield
    torch.set_num_threads(threads)


@pytest.fixture
def short_prompts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(forward, "_LONGEST", 128)


def _judge(origin: MemoryOrigin, directory: Path, failed: set[str], named: str, dtype: str | None = None) -> None:
    certificate = certify(origin, directory, dtype)
    told = "\n".join(explain(certificate))
    assert certificate["valid"] is False
    assert set(certificate["failed"]) == failed, told
    assert named in told


# --- in the weights


def _swap(one: str, other: str) -> Change:
    def change(tensors: Tensors) -> None:
        tensors[one], tensors[other] = tensors[other].clone(), tensors[one].clone()

    return change


def _permute_groups(tensors: Tensors) -> None:
    for name in ("q_proj", "k_proj", "v_proj"):
        name = f"{ATTENTION}.{name}.weight"
        tensors[name] = torch.cat(tensors[name].chunk(2)[::-1])


def _leave_padding(tensors: Tensors) -> None:
    rows = tensors["model.embed_tokens.weight"]
    tensors["model.embed_tokens.weight"] = torch.cat([rows, torch.zeros(72, rows.shape[1])])


def _drop(text: str) -> Change:
    def change(tensors: Tensors) -> None:
        for name in [name for name in tensors if text in name]:
            del tensors[name]

    return change


def _fill(name: str, value: float) -> Change:
    return lambda tensors: tensors[name].fill_(value)


def _copy_head(factor: float) -> Change:
    return lambda tensors: tensors.update({"lm_head.weight": tensors["model.embed_tokens.weight"] * factor})


def _another_layer(tensors: Tensors) -> None:
    tensors["model.layers.0.mlp.down_proj.weight"] = tensors["model.layers.2.mlp.down_proj.weight"].clone()


def _transpose(tensors: Tensors) -> None:
    name = f"{ATTENTION}.o_proj.weight"
    tensors[name] = tensors[name].T.contiguous()


def _flip_a_bit(tensors: Tensors) -> None:
    tensors["model.norm.weight"].view(torch.int32)[5] ^= 1


def _not_a_number(tensors: Tensors) -> None:
    tensors["model.norm.weight"][5] = math.nan


WEIGHTS: dict[str, tuple[str, Change, set[str], str]] = {
    "query and key swapped": (
        "untied", _swap(f"{ATTENTION}.q_proj.weight", f"{ATTENTION}.k_proj.weight"), {"round_trip", "logits"},
        f"{ATTENTION}.v_proj.weight): query and key swapped",
    ),
    "KV groups permuted": ("tied", _permute_groups, {"round_trip", "logits"}, "v_proj.weight): KV groups permuted"),
    "gate and up swapped": (
        "tied", _swap(f"{MLP}.gate_proj.weight", f"{MLP}.up_proj.weight"), {"round_trip", "logits"},
        f"{MLP}.up_proj.weight): gate and up swapped",
    ),
    "padded rows left in": (
        "tied", _leave_padding, {"coverage", "round_trip"} | OUTPUTS,
        "coverage: padded vocabulary rows left in: model.embed_tokens.weight",
    ),
    "dropped layer": ("tied", _drop(".layers.2."), {"coverage", "round_trip"} | OUTPUTS, "coverage: layer 2 dropped"),
    "untied copy of a tied head": (
        "tied", _copy_head(1.01), {"coverage", "round_trip", "tied_head"} | OUTPUTS,
        "tied_head: lm_head.weight is stored, an untied copy of the tied head",
    ),
    "exact copy of a tied head": (
        "tied", _copy_head(1), {"coverage", "tied_head"} | OUTPUTS, "tied_head: lm_head.weight is stored",
    ),
    "own head lost": (
        "untied", _drop("lm_head"), {"coverage", "round_trip", "tied_head"} | OUTPUTS,
        "tied_head: lm_head.weight is missing, the model's own head",
    ),
    "a bias lost": (
        "qwen2", _drop("1.self_attn.k_proj.bias"), {"coverage", "round_trip"} | OUTPUTS,
        f"coverage: biases lost: {ATTENTION}.k_proj.bias",
    ),
    "a bias zeroed": (
        "qwen2", _fill(f"{ATTENTION}.k_proj.bias", 0), {"round_trip", "logits"}, f"{ATTENTION}.k_proj.bias: all zeros",
    ),
    "query and key norms lost": (
        "qwen3", _drop("_norm.weight"), {"coverage", "round_trip"} | OUTPUTS,
        "coverage: query and key norms lost: model.layers.0.self_attn.q_norm.weight",
    ),
    "a layer's matrix from another": (
        "tied", _another_layer, {"round_trip", "logits"}, "0.mlp.down_proj.weight): rows of another layer (2)",
    ),
    "transposed": ("tied", _transpose, {"round_trip", "logits"}, "transposed"),
    "one bit changed": (
        "tied", _flip_a_bit, {"round_trip"}, "decoder.final_layernorm.weight (model.norm.weight): one bit differs",
    ),
    "not a number": ("tied", _not_a_number, {"round_trip", "logits"}, "model.norm.weight): not finite"),
}  # fmt: skip


@pytest.mark.parametrize("fault", WEIGHTS)
def test_a_fault_in_the_weights_is_named(world: World, tmp_path: Path, fault: str) -> None:
    kind, change, failed, named = WEIGHTS[fault]
    directory = world.copy(kind, tmp_path / "out")
    change_weights(directory, change)
    _judge(world.origins[kind], directory, failed, named)
    with pytest.raises(CertificateError, match="model.safetensors: changed since it was certified"):
        require_valid(directory)


def _exported_as(directory: Path, origin: MemoryOrigin, dtype: torch.dtype, change: Callable) -> None:
    """Write the export of an fp32 checkpoint in another dtype, each tensor put through `change`."""

    def cast(tensors: Tensors) -> None:
        tensors.update({name: change(tensor).to(dtype) for name, tensor in tensors.items()})

    change_weights(directory, cast)
    name = str(dtype).removeprefix("torch.")
    write_configuration(directory, origin.model, name, tokenizer_facts(directory))


def test_a_dtype_asked_for_is_right_when_rounded_once(world: World, tmp_path: Path) -> None:
    directory = world.copy("tied", tmp_path / "out")
    origin = world.origins["tied"]
    _exported_as(directory, origin, torch.bfloat16, lambda tensor: tensor)
    certificate = certify(origin, directory, "bfloat16")
    assert explain(certificate) == []
    assert certificate["dtype"] == {"checkpoint": "float32", "export": "bfloat16"}


def test_bf16_rounded_twice_is_named(world: World, tmp_path: Path) -> None:
    """float32 -> float16 -> bfloat16 moves some values by one in the last place: far below what logits show."""
    directory = world.copy("tied", tmp_path / "out")
    origin = world.origins["tied"]
    _exported_as(directory, origin, torch.bfloat16, lambda tensor: tensor.half())
    certificate = certify(origin, directory, "bfloat16")
    told = "\n".join(explain(certificate))
    assert certificate["failed"] and "round_trip" in certificate["failed"]
    assert "rounded to bfloat16 twice, through float16" in told


def test_precision_lost_on_the_way_is_named(world: World, tmp_path: Path) -> None:
    """An fp32 export whose values went through bfloat16; and one that is bfloat16 although nobody asked."""
    origin = world.origins["tied"] if world.make("tied") else None
    through = world.copy("tied", tmp_path / "through")
    _exported_as(through, origin, torch.float32, lambda tensor: tensor.bfloat16())
    _judge(origin, through, {"round_trip", "logits"}, "precision lost: rounded to bfloat16")
    unasked = world.copy("tied", tmp_path / "unasked")
    _exported_as(unasked, origin, torch.bfloat16, lambda tensor: tensor)
    _judge(origin, unasked, {"round_trip", "logits"}, "(stored as float32, exported as bfloat16)")


# --- in the configuration


def _set(**values: Any) -> Callable[[dict], None]:
    return lambda config: config.update(values)


def _set_rope(key: str, value: float) -> Callable[[dict], None]:
    def change(config: dict) -> None:
        for spelling in (config, config["rope_scaling"], config["rope_parameters"]):
            if key in spelling:
                spelling[key] = value

    return change


def _lose_scaling(config: dict) -> None:
    config["rope_scaling"] = None
    config["rope_parameters"] = {"rope_type": "default", "rope_theta": 500000.0}


CONFIGURATION: dict[str, tuple[str, Callable[[dict], None], set[str], tuple[str, ...]]] = {
    "RoPE scaling lost": (
        "tied", _lose_scaling, {"config"} | OUTPUTS, ("rope: the RoPE scaling by factor 8.0 is lost", "rope_scaling"),
    ),
    "wrong RoPE factor": (
        "tied", _set_rope("factor", 32.0), {"config"} | OUTPUTS,
        ("rope: the RoPE scaling factor is 32 instead of 8", "config: rope_scaling.factor: 8.0 -> 32.0"),
    ),
    "RoPE theta": (
        "tied", _set_rope("rope_theta", 400000.0), {"config"} | OUTPUTS,
        ("rope: RoPE theta is 400000 instead of 500000", "config: rope_theta: 500000.0 -> 400000.0"),
    ),
    "norm epsilon": (
        "tied", _set(rms_norm_eps=1e-6), {"config", "logits"},
        ("config: norm_epsilon: 1e-05 -> 1e-06", "the sides part at the"),
    ),
    "positions": ("tied", _set(max_position_embeddings=8192), {"config"}, ("max_positions: 16384 -> 8192",)),
    "tie flag": (
        "tied", _set(tie_word_embeddings=False), {"config", "tied_head"} | OUTPUTS,
        ("config: tied_embeddings: True -> False", "tied_head: config.json says tie_word_embeddings False"),
    ),
    "end of text": (
        "tied", _set(eos_token_id=1), {"end_of_text"},
        ("the end of a text differs: tokenizer 2, config 1, generation_config 2",),
    ),
    "biases switched off": (
        "qwen2", _set(model_type="llama", architectures=["LlamaForCausalLM"]), {"config"} | OUTPUTS,
        ("config: family: 'qwen2' -> 'llama'", "q_proj.bias"),
    ),
    "another family": (
        "tied", _set(model_type="mamba"), {"config", "vocabulary", "tokenizer", "end_of_text"} | OUTPUTS,
        ("config.json: model_type = 'mamba'",),
    ),
}  # fmt: skip


@pytest.mark.parametrize("fault", CONFIGURATION)
def test_a_fault_in_the_configuration_is_named(world: World, tmp_path: Path, fault: str) -> None:
    kind, change, failed, names = CONFIGURATION[fault]
    directory = world.copy(kind, tmp_path / "out")
    values = json.loads((directory / "config.json").read_text())
    change(values)
    (directory / "config.json").write_text(json.dumps(values))
    for named in names:
        _judge(world.origins[kind], directory, failed, named)
    # After certification: RL refuses the file, verify names the field without checkpoint or trainer.
    with pytest.raises(CertificateError, match="config.json: changed since it was certified"):
        require_valid(directory)
    problems = "\n".join(examine(directory)["problems"])
    assert "config.json: changed" in problems
    assert names[0] in problems


# --- around the model


def test_a_tokenizer_larger_than_the_vocabulary_is_named(world: World, tmp_path: Path) -> None:
    """Rows 260 to 279 have tokens, and would be cut."""
    small = write_hf(tmp_path / "small", world.tokenizer, vocab_size=260)
    origin = origin_of(small, world.tokenizer)
    write_configuration(small, origin.model, "float32", tokenizer_facts(small))
    _judge(origin, small, {"vocabulary"}, "vocabulary: the tokenizer has 280 tokens, the embedding 260 rows")


def _change_json(path: Path, change: Callable[[dict], None]) -> None:
    values = json.loads(path.read_text())
    change(values)
    path.write_text(json.dumps(values))


def _swap_two_tokens(core: dict) -> None:
    vocabulary = core["model"]["vocab"]
    vocabulary["a"], vocabulary["b"] = vocabulary["b"], vocabulary["a"]


def test_another_tokenizer_than_trainings_is_named(world: World, tmp_path: Path) -> None:
    """Weights, logits and vocabulary size are all right: only the tokenizer's own files can tell."""
    directory = world.copy("tied", tmp_path / "ids")
    _change_json(directory / "tokenizer.json", _swap_two_tokens)
    _judge(world.origins["tied"], directory, {"tokenizer"}, "tokenizer: tokenizer.json is not training's")
    directory = world.copy("tied", tmp_path / "end")
    _change_json(directory / "tokenizer_config.json", lambda settings: settings.update(eos_token="a"))
    end = tokenizer_facts(directory).eos
    _judge(
        world.origins["tied"], directory, {"tokenizer", "end_of_text"},
        f"tokenizer: texts end with token {end}, in training with 2",
    )  # fmt: skip


def test_padding_that_training_changed_is_told_and_not_a_fault(world: World) -> None:
    directory, origin = world.make("untied"), world.origins["untied"]
    held = {name: tensor.clone() for name, tensor in origin.held.held.items()}
    held["output_layer.weight"][VOCABULARY:] = 1.5
    certificate = certify(MemoryOrigin(origin.model, origin.tokenizer, Memory(held)), directory, None)
    assert certificate["valid"] is True and certificate["vocabulary"]["padding_is_zero"] is False
    assert world.certificates["untied"]["vocabulary"]["padding_is_zero"] is True


def test_what_a_checkpoint_has_too_much_is_named(world: World) -> None:
    """A bias the table knows nothing of would vanish without a trace in the files."""
    directory, origin = world.make("tied"), world.origins["tied"]
    held = {**origin.held.held, "decoder.layers.0.mlp.linear_fc2.bias": torch.ones(64)}
    other = MemoryOrigin(origin.model, origin.tokenizer, Memory(held))
    named = "coverage: checkpoint: extra: decoder.layers.0.mlp.linear_fc2.bias"
    _judge(other, directory, {"coverage", "round_trip"} | OUTPUTS, named)


# --- in the rules themselves: both directions agree with each other, so only the forward pass can tell


def _query_and_key_swapped(self: FusedQKV, size: Geometry) -> list[Rows]:
    widths = (size.dim, size.heads // size.groups * size.dim, size.dim)
    return [Rows(part, g * widths[part], widths[part]) for g in range(size.groups) for part in (1, 0, 2)]


def _ungrouped(self: FusedQKV, size: Geometry) -> list[Rows]:
    small = size.groups * size.dim
    return [Rows(0, 0, size.attention), Rows(1, 0, small), Rows(2, 0, small)]


def _gate_and_up_swapped(self: GatedPair, size: Geometry) -> list[Rows]:
    return [Rows(1, 0, size.ffn), Rows(0, 0, size.ffn)]


RULES = {
    "query and key swapped": ("untied", FusedQKV, _query_and_key_swapped, "attention"),
    "not grouped": ("tied", FusedQKV, _ungrouped, "attention"),
    "gate and up swapped": ("tied", GatedPair, _gate_and_up_swapped, "MLP"),
}


@pytest.mark.parametrize("fault", RULES)
def test_a_wrong_rule_is_caught_by_the_logits(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fault: str
) -> None:
    kind, rule, rows, part = RULES[fault]
    directory = world.copy(kind, tmp_path / "out")
    monkeypatch.setattr(rule, "rows", rows)
    certificate = certify(origin_of(directory, world.tokenizer), directory, None)
    assert certificate["failed"] == ["logits"]
    assert f"the sides part at the {part} of layer 0" in "\n".join(explain(certificate))
