"""Our megatron-core model against that of transformers, for each family: logits and losses in fp32."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import torch
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedTensor, apply_factories
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from megatron_octo.checkpoint.tensors import read
from megatron_octo.config.layout import ParallelConfig
from megatron_octo.config.model import ModelConfig
from megatron_octo.convert.rules import Geometry
from megatron_octo.convert.tables import megatron_shapes, table_of
from megatron_octo.convert.views import AsMegatron
from megatron_octo.model.build import build_gpt
from megatron_octo.model.facts import parameter_count
from megatron_octo.model.hugging_face import to_hf_config
from megatron_octo.model.translate import padded_vocabulary
from megatron_octo.runtime.groups import initialize_single, shutdown

BASE = {"layers": 3, "hidden": 64, "heads": 8, "kv_groups": 2, "ffn": 176, "vocabulary": 384}
FAMILIES = ["llama", "qwen2", "qwen3"]
NORMS = (  # the tables name the norms as checkpoints do; in the local layer they are modules of their own
    ("self_attention.linear_qkv.layer_norm_weight", "input_layernorm.weight"),
    ("mlp.linear_fc1.layer_norm_weight", "pre_mlp_layernorm.weight"),
)
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


def reference(model: ModelConfig) -> PreTrainedModel:
    """transformers' model with random weights, those of norms and biases too."""
    torch.manual_seed(3)
    config = AutoConfig.for_model(**to_hf_config(model, "float32"))
    theirs = AutoModelForCausalLM.from_config(config, attn_implementation="sdpa").eval()
    with torch.no_grad():
        for name, weight in theirs.named_parameters():
            mean, spread = (1.0, 0.2) if "norm" in name else (0.0, 0.4 if name.endswith("bias") else 0.06)
            weight.normal_(mean, spread)
    return theirs


class Weights:
    """A state dict of transformers as a source of tensors."""

    where = "transformers"

    def __init__(self, state: dict[str, torch.Tensor]) -> None:
        self.state = state

    def shapes(self) -> dict[str, tuple[int, ...]]:
        return {name: tuple(weight.shape) for name, weight in self.state.items()}

    def dtype(self, name: str) -> str:
        return str(self.state[name].dtype).removeprefix("torch.")

    def fill(self, name: str, start: int, out: torch.Tensor) -> None:
        out.copy_(self.state[name][start : start + len(out)])


def translated(state: dict[str, torch.Tensor], model: ModelConfig) -> dict[str, torch.Tensor]:
    """transformers' weights through the family's table, under the local layer's names."""
    size = Geometry.of(model, padded_vocabulary(model.vocabulary))
    source = AsMegatron(table_of(model.family), size, Weights(state))
    weights = {name: read(source, name) for name in source.shapes()}
    for name in ("embedding.word_embeddings.weight", "output_layer.weight"):
        if name in weights:
            # Padded rows are filled with large values: nothing of them may reach a loss or a real logit.
            weights[name][model.vocabulary :] = 3.0
    return {name.replace(*NORMS[0]).replace(*NORMS[1]): weight for name, weight in weights.items()}


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
    "qwen2 untied": {"family": "qwen2", "tied_embeddings": False, "vocabulary": 312, "norm_epsilon": 1e-6},
    "qwen2 tied, a KV head for each": {"family": "qwen2", "kv_groups": 8, "rope_theta": 1e6},
    "qwen3 untied, narrow model": {"family": "qwen3", "tied_embeddings": False, "head_dim": 16, "norm_epsilon": 1e-2},
    "qwen3 tied, one KV head": {"family": "qwen3", "kv_groups": 1, "vocabulary": 312, "rope_scaling": {"factor": 8}},
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
@pytest.mark.parametrize("family", FAMILIES)
def test_parameter_count_is_that_of_the_built_model(family, tied):
    model = ModelConfig(**{**BASE, "family": family, "vocabulary": 312, "tied_embeddings": tied})
    padding = (padded_vocabulary(312) - 312) * model.hidden * (1 if tied else 2)
    built = sum(weight.numel() for weight in build(model).parameters())
    assert parameter_count(model) == built - padding
    assert parameter_count(model) == sum(weight.numel() for weight in reference(model).parameters())


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("family", FAMILIES)
def test_checkpoints_hold_what_the_table_names(family, tied):
    """Names and shapes as megatron-core saves the built model, against the table that conversion goes by."""
    model = ModelConfig(**{**BASE, "family": family, "vocabulary": 312, "tied_embeddings": tied})
    described = build(model).sharded_state_dict(metadata={"non_homogeneous_layers": True})  # as checkpoint.sharded asks
    apply_factories(described)
    stored = [part for part in nested_values(described) if isinstance(part, ShardedTensor)]
    size = Geometry.of(model, padded_vocabulary(model.vocabulary))
    assert {part.key: part.global_shape for part in stored} == megatron_shapes(table_of(family), size)


@pytest.mark.parametrize("family", FAMILIES)
def test_initial_weights_depend_on_seed_and_name_alone(family):
    model = ModelConfig(**BASE, family=family)
    first, again, other = (dict(build(model, seed=seed).named_parameters()) for seed in (1, 1, 2))
    drawn = [name for name, weight in first.items() if weight.dim() == 2]
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not any(torch.equal(first[name], other[name]) for name in drawn)
    vectors = {name: weight for name, weight in first.items() if weight.dim() == 1}
    assert all((weight == (0 if name.endswith("bias") else 1)).all() for name, weight in vectors.items())
    assert len(vectors) == 2 * model.layers + 1 + {"llama": 0, "qwen2": 1, "qwen3": 2}[family] * model.layers
    layers = [first[f"decoder.layers.{number}.mlp.linear_fc1.weight"] for number in range(2)]
    assert not torch.equal(*layers)
    assert first["decoder.layers.0.mlp.linear_fc1.weight"].std().item() == pytest.approx(0.02, rel=0.03)
    residual = first["decoder.layers.0.mlp.linear_fc2.weight"].std().item()
    assert residual == pytest.approx(0.02 / (2 * model.layers) ** 0.5, rel=0.03)
