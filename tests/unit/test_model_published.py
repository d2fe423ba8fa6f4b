"""The published config.json of real models: what our recipes say, counted to the last parameter, and written back.

The values are those of the models' own files; ids of special tokens and switches without meaning here are left out.
"""

from __future__ import annotations

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from megatron_octo.config.layout import ParallelConfig
from megatron_octo.config.load import parse_config, read_yaml
from megatron_octo.config.model import ModelConfig
from megatron_octo.config.recipes import RECIPES
from megatron_octo.model.build import build_chunks
from megatron_octo.model.facts import parameter_count
from megatron_octo.model.hugging_face import from_hf_config, to_hf_config
from megatron_octo.model.translate import padded_vocabulary
from megatron_octo.runtime.rehearsal import standing_at


def config(
    hidden: int, ffn: int, layers: int, heads: int, groups: int, vocabulary: int, positions: int, tied: bool, **other
) -> dict:
    return {
        "hidden_size": hidden, "intermediate_size": ffn, "num_hidden_layers": layers, "num_attention_heads": heads,
        "num_key_value_heads": groups, "vocab_size": vocabulary, "max_position_embeddings": positions,
        "tie_word_embeddings": tied, "hidden_act": "silu", "attention_dropout": 0.0, "initializer_range": 0.02,
        "use_cache": True, "torch_dtype": "bfloat16", **other,
    }  # fmt: skip


def llama(*sizes: int, tied: bool, factor: float, **other) -> dict:
    scaling = {
        "factor": factor, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192,
        "rope_type": "llama3",
    }  # fmt: skip
    fixed = {"attention_bias": False, "mlp_bias": False, "pretraining_tp": 1, "rms_norm_eps": 1e-05}
    rope = {"rope_theta": 500000.0, "rope_scaling": scaling}
    name = {"architectures": ["LlamaForCausalLM"], "model_type": "llama"}
    return config(*sizes, 128256, 131072, tied, **name, **fixed, **rope, **other)


def qwen2(*sizes: int, tied: bool, vocabulary: int = 151936, positions: int = 131072) -> dict:
    fixed = {"rms_norm_eps": 1e-06, "rope_theta": 1000000.0, "use_mrope": False, "use_sliding_window": False}
    window = {"sliding_window": positions, "max_window_layers": sizes[2]}  # stated, and switched off
    name = {"architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2"}
    return config(*sizes, vocabulary, positions, tied, **name, **fixed, **window)


def qwen3(*sizes: int, tied: bool) -> dict:
    fixed = {"attention_bias": False, "head_dim": 128, "rms_norm_eps": 1e-06, "rope_theta": 1000000}
    window = {"sliding_window": None, "use_sliding_window": False, "max_window_layers": sizes[2]}
    name = {"architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3"}
    return config(*sizes, 151936, 40960, tied, **name, **fixed, **window, rope_scaling=None)


PUBLISHED = {
    "Llama-3.2-1B": (llama(2048, 8192, 16, 32, 8, tied=True, factor=32.0, head_dim=64), 1_235_814_400),
    "Llama-3.2-3B": (llama(3072, 8192, 28, 24, 8, tied=True, factor=32.0, head_dim=128), 3_212_749_824),
    "Llama-3.1-8B": (llama(4096, 14336, 32, 32, 8, tied=False, factor=8.0), 8_030_261_248),
    "Qwen2.5-1.5B": (qwen2(1536, 8960, 28, 12, 2, tied=True), 1_543_714_304),
    "Qwen2.5-3B": (qwen2(2048, 11008, 36, 16, 2, tied=True, positions=32768), 3_085_938_688),
    "Qwen2.5-7B": (qwen2(3584, 18944, 28, 28, 4, tied=False, vocabulary=152064), 7_615_616_512),
    "Qwen3-0.6B": (qwen3(1024, 3072, 28, 16, 8, tied=True), 596_049_920),
    "Qwen3-1.7B": (qwen3(2048, 6144, 28, 16, 8, tied=True), 1_720_574_976),
    "Qwen3-4B": (qwen3(2560, 9728, 36, 32, 8, tied=True), 4_022_468_096),
    "Qwen3-8B": (qwen3(4096, 12288, 36, 32, 8, tied=False), 8_190_735_360),
}


FILES = {name: name.lower().replace("-", "_").replace("llama_3.", "llama3").replace(".", "_") for name in PUBLISHED}
FILES = {name: file.replace("qwen2_5", "qwen25") for name, file in FILES.items()}


def recipe(name: str) -> ModelConfig:
    """The model as the package's own file says it."""
    return parse_config(ModelConfig, read_yaml(RECIPES / "models" / f"{FILES[name]}.yaml")["model"], name)


def test_every_model_of_the_recipes_is_here():
    assert {path.stem for path in (RECIPES / "models").glob("*.yaml")} == set(FILES.values())


@pytest.mark.parametrize("name", PUBLISHED)
def test_the_recipe_is_the_published_model(name):
    values, count = PUBLISHED[name]
    assert recipe(name) == from_hf_config(values)
    assert f"{count:,} parameters" in (RECIPES / "models" / f"{FILES[name]}.yaml").read_text()


@pytest.mark.parametrize("name", PUBLISHED)
def test_parameters_are_the_published_ones(name):
    """By arithmetic, and by megatron-core's own layers, which nothing here multiplies out."""
    model, count = recipe(name), PUBLISHED[name][1]
    assert parameter_count(model) == count
    with standing_at(ParallelConfig(), rank=0):
        (built,) = build_chunks(model, ParallelConfig(), "bf16", None)
    assert {weight.device.type for weight in built.parameters()} == {"meta"}
    rows = padded_vocabulary(model.vocabulary) - model.vocabulary
    assert rows == 0, "every published vocabulary is a multiple of 128"
    assert sum(weight.numel() for weight in built.parameters()) == count


@pytest.mark.parametrize("name", PUBLISHED)
def test_rows_that_pad_the_vocabulary_are_all_that_differs(name):
    model = recipe(name).model_copy(update={"vocabulary": 128_100})
    with standing_at(ParallelConfig(), rank=0):
        (built,) = build_chunks(model, ParallelConfig(), "bf16", None)
    padding = (128_128 - 128_100) * model.hidden * (1 if model.tied_embeddings else 2)
    assert sum(weight.numel() for weight in built.parameters()) == parameter_count(model) + padding


@pytest.mark.parametrize("name", PUBLISHED)
def test_what_is_written_means_the_same_to_transformers(name):
    """Settings that shape the computation, and every parameter of the model that transformers builds from it."""
    values, count = PUBLISHED[name]
    written = to_hf_config(from_hf_config(values), "bfloat16")
    theirs, ours = (AutoConfig.for_model(**each) for each in (values, written))
    told = ("rope_parameters", "layer_types", "rms_norm_eps", "max_position_embeddings", "tie_word_embeddings", "dtype")
    for key in told:
        assert getattr(ours, key, None) == getattr(theirs, key, None), key
    with torch.device("meta"):
        shapes, expected = (
            {key: weight.shape for key, weight in AutoModelForCausalLM.from_config(each).named_parameters()}
            for each in (ours, theirs)
        )
    assert shapes == expected
    assert sum(shape.numel() for shape in shapes.values()) == count


@pytest.mark.parametrize("name", PUBLISHED)
def test_both_majors_of_transformers_are_read(name):
    """As published, by transformers 4; and as transformers 5 saves it, with RoPE and dtype under other names."""
    values, _ = PUBLISHED[name]
    saved = AutoConfig.for_model(**values).to_dict()
    assert "rope_theta" not in saved
    assert "torch_dtype" not in saved
    assert from_hf_config(saved) == from_hf_config(values)
