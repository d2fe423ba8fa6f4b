"""Random tiny models of every family as Hugging Face directories, with a real tokenizer, for the conversion tests."""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import AutoConfig, AutoModelForCausalLM

from megatron_octo.data.index.train_tokenizer import train_tokenizer

VOCABULARY = 312  # Megatron pads it to 384
FAMILIES = ("llama", "qwen2", "qwen3")
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
_DEFAULT_ROPE = {"rope_type": "default", "rope_theta": 1_000_000.0}
_OWN = {
    "llama": {"rope_parameters": LLAMA3, "rms_norm_eps": 1e-5},
    "qwen2": {"rope_parameters": _DEFAULT_ROPE, "rms_norm_eps": 1e-6},
    # As in Qwen3-0.6B the heads together are wider than the model.
    "qwen3": {"rope_parameters": _DEFAULT_ROPE, "rms_norm_eps": 1e-6, "head_dim": 16},
}


def write_tokenizer(out: Path) -> Path:
    """A byte-level tokenizer of 280 entries or fewer."""
    return train_tokenizer(["Question: 12 apples and 7 pears.\nAnswer: 19 fruits in all.\n"] * 3, 280, out)


def write_hf(
    out: Path, tokenizer: Path, family: str = "llama", *, dtype: torch.dtype = torch.float32, seed: int = 3, **changes
) -> Path:
    """A model with random weights everywhere, norms and biases included: nothing is hidden by ones and zeros."""
    values = {
        "hidden_size": 64,
        "num_attention_heads": 8,
        "num_key_value_heads": 2,
        "intermediate_size": 176,
        "vocab_size": VOCABULARY,
        "num_hidden_layers": 3,
        "max_position_embeddings": 16384,
        "tie_word_embeddings": True,
        **_OWN[family],
        **changes,
    }
    torch.manual_seed(seed)
    config = AutoConfig.for_model(family, **values, bos_token_id=1, eos_token_id=2, pad_token_id=0)
    model = AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name:
                parameter.add_(0.3 * torch.randn_like(parameter))
            else:
                parameter.normal_(0, 0.08)
    model.to(dtype).save_pretrained(out)
    for file in tokenizer.iterdir():
        (out / file.name).write_bytes(file.read_bytes())
    return out
