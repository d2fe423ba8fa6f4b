"""Checkpoints as other trainers lay them out, so that their own loaders read what is written here.

The weights are the same torch_dist files everywhere. A layout says in which folder they lie, whether layers are stacked
in one tensor, and which files around them say what the trainer wants to know: Megatron-LM's arguments in `common.pt`,
Megatron-Bridge's `run_config.yaml`, NeMo's `context`. Checked with Megatron-LM core_v0.16.1 and Megatron-Bridge 0.3.1.
"""

from __future__ import annotations

import argparse
import io
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from megatron_octo.config.model import VOCABULARY_MULTIPLE, ModelConfig
from megatron_octo.convert import nemo
from megatron_octo.convert.foreign import BUILDER_FACTOR, COMMON, CONTEXT, RUN_CONFIG, TRACKER, WEIGHTS
from megatron_octo.errors import ConfigError
from megatron_octo.model.translate import padded_vocabulary

if TYPE_CHECKING:
    from megatron_octo.checkpoint.dist import Place

_LAYER = "decoder.layers."
_EXTRA_STATE = "_extra_state"
_ITERATION = "iter_0000000"
_STATEFUL = (
    "self_attention.linear_qkv", "self_attention.core_attention", "self_attention.linear_proj",
    "self_attention.q_layernorm", "self_attention.k_layernorm", "mlp.linear_fc1", "mlp.linear_fc2",
)  # fmt: skip
"""Modules of a layer that TransformerEngine gives a state of their own, in one version or another."""


@dataclass(frozen=True)
class Layout:
    """How one trainer's checkpoints are laid out.

    Args:
        name: what a user asks for.
        into: folder for the torch_dist files, "" for the directory itself.
        prefix: put in front of every tensor's name.
        stacked: all layers of a kind lie in one tensor, `[layers, ...]`, as megatron-core does it by default.
        describe: writes the files around the weights.
    """

    name: str
    into: str
    prefix: str
    stacked: bool
    describe: Callable[[Path, ModelConfig, str, str | None], None]

    def places(self, names: Iterable[str]) -> dict[str, Place]:
        """Where the tensors of these megatron-core names are kept."""
        from megatron_octo.checkpoint.dist import Place

        return {name: Place(self.prefix + stored, layer) for name in names for stored, layer in [self._stored(name)]}

    def objects(self, model: ModelConfig) -> dict[str, bytes]:
        """What a model built with TransformerEngine asks for beside its weights: a state for each module, all empty.

        Without FP8 there is nothing to keep, yet the loader stops at a key that is missing.

        Returns:
            Content by the key of the stored object; nothing for our own layout, whose loader asks for none.
        """
        if not self.stacked:
            return {}
        layers = range(model.layers)
        inner = [f"{_LAYER}{module}.{_EXTRA_STATE}/shard_{n}_{model.layers}" for module in _STATEFUL for n in layers]
        keys = [*inner, f"decoder.final_layernorm.{_EXTRA_STATE}/shard_0_1"]
        return {self.prefix + key: _nothing() for key in keys}

    def refuse(self, model: ModelConfig) -> None:
        """Stop before anything is written where this trainer cannot express a model.

        Raises:
            ConfigError: names the setting.
        """
        scaling = model.rope_scaling
        if self.name == "megatron-lm" and scaling is not None and scaling.factor != BUILDER_FACTOR:
            raise ConfigError(
                f"layout 'megatron-lm': rope_scaling.factor = {scaling.factor:g}",
                f"Megatron-LM's model builder always scales by {BUILDER_FACTOR:g}: positions would be rotated wrongly",
                "use --layout megatron-bridge or nemo",
            )
        if self.name == "nemo":
            nemo.refuse(model)

    def to_state(self, model: ModelConfig) -> list[str]:
        """Arguments this trainer must be given, because it does not take them over from a checkpoint."""
        if self.name != "megatron-lm":
            return []
        return ["--use-rope-scaling"] * (model.rope_scaling is not None) + ["--qk-layernorm"] * model.qk_norm

    def write(self, directory: Path, model: ModelConfig, dtype: str, assets: str | None = None) -> None:
        """Write the files around the weights.

        Args:
            directory: of the checkpoint, the weights already in their folder.
            model: the architecture.
            dtype: torch's name of the weights' dtype.
            assets: where the tokenizer will lie for good, if it is carried along.
        """
        import torch

        torch.save(_common(model, dtype, self.stacked), directory / self.into / COMMON)
        self.describe(directory, model, dtype, assets)

    def _stored(self, name: str) -> tuple[str, int | None]:
        number, _, rest = name.removeprefix(_LAYER).partition(".")
        if not self.stacked or not name.startswith(_LAYER):
            return name, None
        return _LAYER + rest, int(number)


def layout_of(name: str) -> Layout:
    """A layout by its name.

    Raises:
        ConfigError: no such layout.
    """
    if name not in LAYOUTS:
        raise ConfigError(f"layout {name!r}", f"known are {', '.join(LAYOUTS)}")
    return LAYOUTS[name]


def architecture(model: ModelConfig) -> dict[str, Any]:
    """A model in megatron-core's argument names, as Megatron-Bridge and NeMo write them down."""
    return {
        "num_layers": model.layers,
        "hidden_size": model.hidden,
        "ffn_hidden_size": model.ffn,
        "num_attention_heads": model.heads,
        "num_query_groups": model.kv_groups,
        "kv_channels": model.dim,
        "normalization": "RMSNorm",
        "layernorm_epsilon": model.norm_epsilon,
        "gated_linear_unit": True,
        "activation_func": {"_target_": "torch.nn.functional.silu", "_call_": False},
        "add_bias_linear": False,
        "add_qkv_bias": model.qkv_bias,
        "qk_layernorm": model.qk_norm,
        "share_embeddings_and_output_weights": model.tied_embeddings,
        "position_embedding_type": "rope",
        "rotary_base": _whole(model.rope_theta),
        "rotary_percent": 1.0,
        "hidden_dropout": 0.0,
        "attention_dropout": 0.0,
        "init_method_std": model.init_std,
        "seq_length": model.max_positions,
        "vocab_size": model.vocabulary,
        "make_vocab_size_divisible_by": VOCABULARY_MULTIPLE,
    }


def content_metadata(stacked: bool) -> dict[str, Any]:
    """What Megatron's loaders hand to the model when they ask it for the names of its tensors."""
    return {
        "distrib_optim_sharding_type": "fully_reshardable",
        "singleton_local_shards": False,
        "chained_optim_avoid_prefix": True,
        "non_homogeneous_layers": not stacked,
    }


def arguments(model: ModelConfig, dtype: str) -> dict[str, Any]:
    """A model in the names of Megatron-LM's command line, as it keeps them in a checkpoint."""
    return {
        "num_layers": model.layers,
        "hidden_size": model.hidden,
        "ffn_hidden_size": model.ffn,
        "num_attention_heads": model.heads,
        "group_query_attention": True,
        "num_query_groups": model.kv_groups,
        "kv_channels": model.dim,
        "normalization": "RMSNorm",
        "norm_epsilon": model.norm_epsilon,
        "layernorm_epsilon": model.norm_epsilon,
        "swiglu": True,
        "add_bias_linear": False,
        "add_qkv_bias": model.qkv_bias,
        "qk_layernorm": model.qk_norm,
        "untie_embeddings_and_output_weights": not model.tied_embeddings,
        "position_embedding_type": "rope",
        "add_position_embedding": False,
        "use_rotary_position_embeddings": True,
        "rotary_base": _whole(model.rope_theta),
        "rotary_percent": 1.0,
        "rotary_interleaved": False,
        "use_rope_scaling": model.rope_scaling is not None,
        "rope_scaling_factor": model.rope_scaling.factor if model.rope_scaling else BUILDER_FACTOR,
        "hidden_dropout": 0.0,
        "attention_dropout": 0.0,
        "init_method_std": model.init_std,
        "seq_length": model.max_positions,
        "max_position_embeddings": model.max_positions,
        "vocab_size": model.vocabulary,
        "padded_vocab_size": padded_vocabulary(model.vocabulary),
        "make_vocab_size_divisible_by": VOCABULARY_MULTIPLE,
        "tensor_model_parallel_size": 1,
        "pipeline_model_parallel_size": 1,
        "ckpt_format": "torch_dist",
        "bf16": dtype == "bfloat16",
        "fp16": dtype == "float16",
        "no_save_optim": True,
        "no_save_rng": True,
        "consumed_train_samples": 0,
        "consumed_valid_samples": 0,
    }


def _common(model: ModelConfig, dtype: str, stacked: bool) -> dict[str, Any]:
    return {
        "args": argparse.Namespace(**arguments(model, dtype)),
        "checkpoint_version": 3.0,
        "iteration": 0,
        "num_floating_point_operations_so_far": 0,
        "content_metadata": content_metadata(stacked),
    }


def _describe_nothing(directory: Path, model: ModelConfig, dtype: str, assets: str | None) -> None:
    """Our own layout: `run.json` says it all."""


def _describe_megatron_lm(directory: Path, model: ModelConfig, dtype: str, assets: str | None) -> None:
    # A "release" is weights to start from: its loader asks for no optimizer, no random state and no iteration.
    (directory / TRACKER).write_text("release", encoding="utf-8")


def _describe_bridge(directory: Path, model: ModelConfig, dtype: str, assets: str | None) -> None:
    import torch

    kind = {"_target_": f"torch.{dtype}", "_call_": False}
    scaling = model.rope_scaling
    provider = {
        "_target_": "megatron.bridge.models.gpt_provider.GPTModelProvider",
        **architecture(model),
        "rope_scaling": scaling is not None,
        "rope_scaling_factor": scaling.factor if scaling else 1.0,
        "should_pad_vocab": True,
        "params_dtype": kind,
        "bf16": dtype == "bfloat16",
        "fp16": dtype == "float16",
        "tensor_model_parallel_size": 1,
        "pipeline_model_parallel_size": 1,
    }
    saved = {"ckpt_format": "torch_dist", "save_optim": False, "save_rng": False, "fully_parallel_save": True}
    tokenizer = {
        "_target_": "megatron.bridge.training.tokenizers.config.TokenizerConfig",
        "tokenizer_type": "HuggingFaceTokenizer",
        "tokenizer_model": assets,
    }
    config = {
        "model": provider,
        "checkpoint": {"_target_": "megatron.bridge.training.config.CheckpointConfig", **saved},
        "tokenizer": tokenizer if assets else None,
    }
    (directory / _ITERATION / RUN_CONFIG).write_text(yaml.safe_dump(config), encoding="utf-8")
    counts = ("step", "consumed_train_samples", "skipped_train_samples", "consumed_valid_samples")
    state = {name: torch.tensor(0, dtype=torch.int32) for name in counts}
    state["floating_point_operations_so_far"] = torch.tensor(0.0, dtype=torch.float64)
    state |= {name: torch.tensor(False) for name in ("do_train", "do_valid", "do_test")}
    for path in (directory / "latest_train_state.pt", directory / _ITERATION / "train_state.pt"):
        torch.save(state, path)
    (directory / TRACKER).write_text("0", encoding="utf-8")


def _describe_nemo(directory: Path, model: ModelConfig, dtype: str, assets: str | None) -> None:
    nemo.write_context(directory / CONTEXT, architecture(model), model, dtype, assets)


LAYOUTS: dict[str, Layout] = {
    layout.name: layout
    for layout in (
        Layout("octo", "", "", False, _describe_nothing),
        Layout("megatron-lm", "release", "", True, _describe_megatron_lm),
        Layout("megatron-bridge", _ITERATION, "", True, _describe_bridge),
        Layout("nemo", WEIGHTS, "module.", True, _describe_nemo),
    )
}
"""The layouts a checkpoint can be written in."""


def _nothing() -> bytes:
    import torch

    stream = io.BytesIO()
    torch.save([torch.empty(0, dtype=torch.uint8)], stream)  # megatron-core keeps a list of one object per shard
    return stream.getvalue()


def _whole(number: float) -> float | int:
    """Without a decimal point where it needs none: RoPE's base is an integer to all of them."""
    return int(number) if float(number).is_integer() else number
