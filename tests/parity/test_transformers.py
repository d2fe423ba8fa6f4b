"""Our megatron-core model against transformers' LlamaForCausalLM: logits and losses in fp32."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from megatron_octo.config.run import ModelConfig, ParallelConfig
from megatron_octo.model.build import build_gpt
from megatron_octo.model.facts import parameter_count
from megatron_octo.model.hugging_face import to_hf_config
from megatron_octo.model.translate import padded_vocabulary
from megatron_octo.runtime.groups import initialize_single, shutdown

BASE = {"layers": 3, "hidden": 64, "heads": 8, "kv_groups": 2, "ffn": 176, "vocabulary": 384}
TOLERANCE = 1e-5
FIGURES: dict[str, dict[str, float]] = {}


@pytest.fixture(scope="module", autouse=True)
def world():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    initialize_single(seed=1)
    yield
    shutdown()
    torch.set_num_threads(threads)
    if os.environ.get("OCTO_FIGURES"):
        target = Path(os.environ["OCTO_FIGURES"]) / "transformers.json"
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text(json.dumps(FIGURES, indent=1))


def reference(model: ModelConfig) -> LlamaForCausalLM:
    """transformers' model with random weights, the norms' too."""
    torch.manual_seed(3)
    config = LlamaConfig(**to_hf_config(model, "fp32"), attn_implementation="sdpa")
    theirs = LlamaForCausalLM(config).eval()
    with torch.no_grad():
        for weight in theirs.parameters():
            weight.normal_(1.0, 0.2) if weight.dim() == 1 else weight.normal_(0.0, 0.06)
    return theirs


def fused(state: dict, layer: str, model: ModelConfig) -> torch.Tensor:
    """q, k, v -> per KV group its query heads, its key, its value."""
    groups = [state[f"{layer}.self_attn.{kind}_proj.weight"].view(model.kv_groups, -1, model.hidden) for kind in "qkv"]
    return torch.cat(groups, dim=1).reshape(-1, model.hidden)


def translated(state: dict, model: ModelConfig) -> dict[str, torch.Tensor]:
    """transformers' weights under megatron-core's names."""
    padding = padded_vocabulary(model.vocabulary) - model.vocabulary
    # Padded rows are filled with large values: nothing of them may reach a loss or a real logit.
    pad = torch.full((padding, model.hidden), 3.0)
    weights = {
        "embedding.word_embeddings.weight": torch.cat([state["model.embed_tokens.weight"], pad]),
        "decoder.final_layernorm.weight": state["model.norm.weight"],
    }
    if not model.tied_embeddings:
        weights["output_layer.weight"] = torch.cat([state["lm_head.weight"], pad])
    for number in range(model.layers):
        theirs, ours = f"model.layers.{number}", f"decoder.layers.{number}"
        mlp = [state[f"{theirs}.mlp.{kind}_proj.weight"] for kind in ("gate", "up")]
        weights |= {
            f"{ours}.self_attention.linear_qkv.weight": fused(state, theirs, model),
            f"{ours}.self_attention.linear_proj.weight": state[f"{theirs}.self_attn.o_proj.weight"],
            f"{ours}.mlp.linear_fc1.weight": torch.cat(mlp),
            f"{ours}.mlp.linear_fc2.weight": state[f"{theirs}.mlp.down_proj.weight"],
            f"{ours}.input_layernorm.weight": state[f"{theirs}.input_layernorm.weight"],
            f"{ours}.pre_mlp_layernorm.weight": state[f"{theirs}.post_attention_layernorm.weight"],
        }
    return weights


def build(model: ModelConfig, dtype: str = "fp32", seed: int | None = None) -> torch.nn.Module:
    return build_gpt(model, ParallelConfig(), dtype, pre_process=True, post_process=True, seed=seed).eval()


def compare(name: str, model: ModelConfig, length: int, batch: int = 2) -> None:
    """Logits of every position and the loss of every token, in both models."""
    theirs, ours = reference(model), build(model)
    loaded = ours.load_state_dict(translated(theirs.state_dict(), model), strict=False)
    assert not loaded.unexpected_keys
    assert not [key for key in loaded.missing_keys if "_extra_state" not in key and key != "output_layer.weight"]
    torch.manual_seed(11)
    tokens = torch.randint(0, model.vocabulary, (batch, length + 1))
    positions = torch.arange(length)[None].expand(batch, -1)
    with torch.no_grad():
        expected = theirs(tokens[:, :-1]).logits
        logits = ours(tokens[:, :-1], positions, None)
        loss = ours(tokens[:, :-1], positions, None, labels=tokens[:, 1:])
    expected_loss = torch.nn.functional.cross_entropy(
        expected.flatten(0, 1), tokens[:, 1:].flatten(), reduction="none"
    ).view_as(loss)
    FIGURES[name] = {
        "max_logit": expected.abs().max().item(),
        "logit_difference": (expected - logits[..., : model.vocabulary]).abs().max().item(),
        "loss_difference": (expected_loss - loss).abs().max().item(),
    }
    print(name, FIGURES[name])
    assert expected.abs().max() > 1  # a comparison of zeros proves nothing
    assert FIGURES[name]["logit_difference"] < TOLERANCE
    assert FIGURES[name]["loss_difference"] < TOLERANCE


CASES = {
    "untied": {"tied_embeddings": False},
    "tied": {"tied_embeddings": True},
    "theta 10000": {"rope_theta": 10_000.0},
    "llama3 factor 8 untied": {"tied_embeddings": False, "rope_scaling": {"factor": 8}},
    "llama3 factor 32 tied": {"tied_embeddings": True, "rope_scaling": {"factor": 32}},
    "padded vocabulary 312 tied": {"vocabulary": 312, "tied_embeddings": True},
    "padded vocabulary 312 untied": {"vocabulary": 312, "tied_embeddings": False},
    "one KV head, wide heads": {"heads": 4, "kv_groups": 1, "head_dim": 32},
}


@pytest.mark.parametrize("name", CASES)
def test_same_logits_and_losses(name):
    compare(name, ModelConfig(**{**BASE, **CASES[name]}), length=96)


@pytest.mark.parametrize("factor", [8, 32])
def test_same_beyond_the_original_context(factor):
    """9,000 positions: where the scaled frequencies of llama3 have turned far enough to matter."""
    model = ModelConfig(**{**BASE, "layers": 1, "heads": 4, "kv_groups": 1, "rope_scaling": {"factor": factor}})
    compare(f"llama3 factor {factor}, 9,000 positions", model, length=9_000, batch=1)


def test_the_long_sequence_would_notice_a_missing_scaling():
    scaled, plain = (
        build(ModelConfig(**BASE, rope_scaling=scaling)).rotary_pos_emb(9_000) for scaling in ({"factor": 8}, None)
    )
    assert (scaled - plain).abs().max() > 1


def test_padding_gets_no_probability_and_no_gradient():
    model = ModelConfig(**{**BASE, "vocabulary": 50})
    ours = build(model, seed=2)
    tokens = torch.randint(0, 50, (2, 17))
    positions = torch.arange(16)[None].expand(2, -1)
    logits = ours(tokens[:, :-1], positions, None)
    assert logits.softmax(-1)[..., 50:].max() == 0
    ours(tokens[:, :-1], positions, None, labels=tokens[:, 1:]).mean().backward()
    gradient = ours.embedding.word_embeddings.weight.grad
    assert gradient[50:].abs().max() == 0
    assert gradient[:50].abs().max() > 0


def test_bf16_stays_close_and_finite():
    model = ModelConfig(**{**BASE, "vocabulary": 312})
    exact, rounded = build(model, seed=2), build(model, "bf16", seed=2)
    tokens = torch.randint(0, 312, (2, 65))
    positions = torch.arange(64)[None].expand(2, -1)
    losses = [gpt(tokens[:, :-1], positions, None, labels=tokens[:, 1:]).mean() for gpt in (exact, rounded)]
    assert losses[1].item() == pytest.approx(losses[0].item(), abs=0.01)


@pytest.mark.parametrize("tied", [True, False])
def test_parameter_count_is_that_of_the_built_model(tied):
    model = ModelConfig(**{**BASE, "vocabulary": 312, "tied_embeddings": tied})
    padding = (padded_vocabulary(312) - 312) * model.hidden * (1 if tied else 2)
    built = sum(weight.numel() for weight in build(model).parameters())
    assert parameter_count(model) == built - padding
    assert parameter_count(model) == sum(weight.numel() for weight in reference(model).parameters())


def test_initial_weights_depend_on_seed_and_name_alone():
    model = ModelConfig(**BASE)
    first, again, other = (dict(build(model, seed=seed).named_parameters()) for seed in (1, 1, 2))
    drawn = [name for name, weight in first.items() if weight.dim() == 2]
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not any(torch.equal(first[name], other[name]) for name in drawn)
    layers = [first[f"decoder.layers.{number}.mlp.linear_fc1.weight"] for number in range(2)]
    assert not torch.equal(*layers)
    assert first["decoder.layers.0.mlp.linear_fc1.weight"].std().item() == pytest.approx(0.02, rel=0.03)
    residual = first["decoder.layers.0.mlp.linear_fc2.weight"].std().item()
    assert residual == pytest.approx(0.02 / (2 * model.layers) ** 0.5, rel=0.03)
