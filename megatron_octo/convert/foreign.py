"""Checkpoints of Megatron-LM, Megatron-Bridge and NeMo 2.x: which of them it is, and what it says about its model.

All three keep weights as torch_dist under megatron-core's names and differ in where they describe the model:
Megatron-LM in the arguments of `common.pt`, Megatron-Bridge in `run_config.yaml`, NeMo in `context/model.yaml`. Each is
put into one vocabulary, the argument names of megatron-core, and read there. Nothing they name is imported or run.
"""

from __future__ import annotations

import os
import re
import reprlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from megatron_octo.config.load import parse_config
from megatron_octo.config.model import ModelConfig
from megatron_octo.convert.inert import Inert, read_inert
from megatron_octo.errors import CheckpointError, ConfigError
from megatron_octo.files import read_json
from megatron_octo.locations import Location

TRACKER = "latest_checkpointed_iteration.txt"
"""Names the newest checkpoint of a Megatron-LM or Megatron-Bridge directory: an iteration, or "release"."""
LIST, FORMATS, COMMON = ".metadata", "metadata.json", "common.pt"
"""Files of every torch_dist checkpoint."""
RUN_CONFIG = "run_config.yaml"
WEIGHTS, CONTEXT = "weights", "context"

_MUST_BE: dict[str, Any] = {
    "normalization": "RMSNorm",
    "gated_linear_unit": True,
    "activation_func": "silu",
    "add_bias_linear": False,
    "position_embedding_type": "rope",
}
_MUST_BE_IF_SAID: dict[str, Any] = {
    "rotary_percent": 1.0,
    "rotary_interleaved": False,
    "seq_len_interpolation_factor": None,
    "no_rope_freq": None,
    "multi_latent_attention": False,
    "num_moe_experts": None,
    "mtp_num_layers": None,
    "layernorm_zero_centered_gamma": False,
    "apply_residual_connection_post_layernorm": False,
    "window_size": None,
    "softmax_scale": None,
    "softmax_type": "vanilla",
    "qk_l2_norm": False,
    "attention_output_gate": False,
    "experimental_attention_variant": None,
    "heterogeneous_block_specs": False,
    "activation_func_clamp_value": None,
    "glu_linear_offset": 0.0,
}
_SIZES = {
    "layers": "num_layers",
    "hidden": "hidden_size",
    "heads": "num_attention_heads",
    "ffn": "ffn_hidden_size",
    "norm_epsilon": "layernorm_epsilon",
    "rope_theta": "rotary_base",
    "tied_embeddings": "share_embeddings_and_output_weights",
}
_FAMILIES = {(False, False): "llama", (True, False): "qwen2", (False, True): "qwen3"}
_TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json")
BUILDER_FACTOR = 8.0
"""By which Megatron-LM's model builder scales Llama 3's RoPE, whatever its arguments say."""


class Described(NamedTuple):
    """What a checkpoint says about itself, beside its weights.

    Args:
        architecture: by megatron-core's argument names; `vocab_size` is None where nobody wrote it down.
        tokenizer: directory of its tokenizer, where it names one that is there.
        step: optimizer steps it was trained for.
    """

    architecture: dict[str, Any]
    tokenizer: Location | None
    step: int


def layout_at(directory: Location) -> str | None:
    """Whose checkpoint a directory is, by the files it holds; None where it is nobody's we know.

    Args:
        directory: one checkpoint: an `iter_*` or `release` folder, or NeMo's folder with `weights` in it.
    """
    if (directory / WEIGHTS / LIST).is_file():
        return "nemo"
    if not (directory / LIST).is_file() or not (directory / FORMATS).is_file():
        return None
    return "megatron-bridge" if (directory / RUN_CONFIG).is_file() else "megatron-lm"


def describe(directory: Location, layout: str) -> Described:
    """Read what a checkpoint says about its model.

    Args:
        directory: as for `layout_at`.
        layout: what `layout_at` said.

    Raises:
        CheckpointError: the file that should say it is missing or damaged.
        ConfigError: a setting that cannot be read for sure.
    """
    return _READERS[layout](directory)


def model_of(architecture: Mapping[str, Any], rows: int, where: str) -> ModelConfig:
    """Read a model from megatron-core's argument names.

    Args:
        architecture: the arguments.
        rows: rows of the stored embedding; the vocabulary if nobody says how many of them are padding.
        where: file to name in messages.

    Raises:
        CheckpointError: a vocabulary that is no number.
        ConfigError: an architecture that is not one of ours, named by the argument that says so.
    """
    _refuse_other_architectures(architecture, where)
    missing = [name for name in _SIZES.values() if architecture.get(name) is None]
    if missing:
        raise ConfigError(f"{where}: says nothing about {missing[0]}", "the model's sizes are needed to convert")
    kinds = bool(architecture.get("add_qkv_bias")), bool(architecture.get("qk_layernorm"))
    if kinds not in _FAMILIES:
        raise ConfigError(f"{where}: add_qkv_bias and qk_layernorm are both on", "no family we know has both")
    vocabulary = whole(architecture.get("vocab_size"), f"{where}: vocab_size") or rows
    if vocabulary > rows:
        raise ConfigError(f"{where}: vocab_size = {vocabulary}", f"the stored embedding has {rows} rows")
    values = {
        **{ours: architecture[theirs] for ours, theirs in _SIZES.items()},
        "family": _FAMILIES[kinds],
        "kv_groups": architecture.get("num_query_groups") or architecture["num_attention_heads"],
        "head_dim": architecture.get("kv_channels"),
        "vocabulary": vocabulary,
        "rope_scaling": _rope_scaling(architecture),
        "init_std": architecture.get("init_method_std") or 0.02,
        "max_positions": architecture.get("max_position_embeddings") or architecture.get("seq_length"),
    }
    return parse_config(ModelConfig, values, where)


def section(content: Mapping[str, Any], name: str, where: object, needed: bool = False) -> Mapping[str, Any]:
    """A part of a description that has parts of its own; empty where it is not there.

    Raises:
        CheckpointError: it is something else, or is needed and not there.
    """
    found = content.get(name)
    if needed and not found:
        raise CheckpointError(f"{where}: has no section '{name}'", "it says which model the weights are of")
    if found is not None and not isinstance(found, Mapping):
        raise CheckpointError(f"{where}: {name} = {reprlib.repr(found)}", "it is a section with fields of its own")
    return found or {}


def whole(value: Any, field: str) -> int:
    """A number a description states; 0 where it states none.

    Raises:
        CheckpointError: no whole number, or a negative one.
    """
    if value is not None and (type(value) is not int or value < 0):
        raise CheckpointError(f"{field} = {reprlib.repr(value)}", "it is a whole number")
    return value or 0


def named_directory(value: Any, field: str) -> Path | None:
    """A directory that a checkpoint names; None where it is not there.

    It is taken for a path on this machine, whatever it says: no address is visited because a file from elsewhere
    names it. Who wants one visited can name it.

    Raises:
        CheckpointError: what it names is no text.
    """
    if value is not None and not isinstance(value, str):
        raise CheckpointError(f"{field} = {reprlib.repr(value)}", "it is a path")
    return Path(value) if value and os.path.isdir(value) else None


def _refuse_other_architectures(architecture: Mapping[str, Any], where: str) -> None:
    said = {name: value for name, value in _MUST_BE_IF_SAID.items() if architecture.get(name) is not None}
    for name, wanted in (_MUST_BE | said).items():
        found = _plain(architecture.get(name))
        if found != wanted and (found or wanted):
            raise ConfigError(
                f"{where}: {name} = {found!r}",
                f"only {wanted!r} is converted: the model would compute something else",
                "convert it with the tool of the trainer that made it",
            )


def _plain(value: Any) -> Any:
    """A value as it is; of a function or an enumeration that a YAML file describes, its bare name or value."""
    if isinstance(value, Inert):
        return value.arguments[0] if value.arguments else value.named.rpartition(".")[2]
    if isinstance(value, Mapping) and "_target_" in value:
        arguments = value.get("_args_")
        plain = isinstance(arguments, list) and arguments
        return arguments[0] if plain else str(value["_target_"]).rpartition(".")[2]
    return value


def _rope_scaling(architecture: Mapping[str, Any]) -> dict[str, Any] | None:
    if (factor := architecture.get("scale_factor")) is not None:
        return {
            "factor": factor,
            "low_freq_factor": architecture.get("low_freq_factor"),
            "high_freq_factor": architecture.get("high_freq_factor"),
            "original_max_position_embeddings": architecture.get("old_context_len"),
        }
    return {"factor": architecture.get("rope_scaling_factor")} if architecture.get("rope_scaling") else None


def _describe_megatron_lm(directory: Location) -> Described:
    path = directory / COMMON
    common = read_inert(path)
    found = common.get("args") if isinstance(common, dict) else None
    if not isinstance(found, Inert) or not found.values:
        raise CheckpointError(f"{path}: holds no arguments", "they say which model the weights are of")
    arguments = {name: _plain(value) for name, value in found.values.items()}
    scaled, factor = bool(arguments.get("use_rope_scaling")), arguments.get("rope_scaling_factor", BUILDER_FACTOR)
    if scaled and factor != BUILDER_FACTOR:
        raise ConfigError(
            f"{path}: rope_scaling_factor = {factor!r}",
            f"Megatron-LM's model builder does not pass it on and scales by {BUILDER_FACTOR:g}: "
            "which of the two the weights were trained with is not known",
            "convert it with the tool of the trainer that made it",
        )
    tokenizer = _first_tokenizer(named_directory(arguments.get("tokenizer_model"), f"{path}: tokenizer_model"))
    architecture = {
        **arguments,
        "gated_linear_unit": bool(arguments.get("swiglu")),
        "activation_func": "silu" if arguments.get("swiglu") else "not swiglu",
        "add_bias_linear": arguments.get("add_bias_linear", not arguments.get("disable_bias_linear", False)),
        "layernorm_epsilon": arguments.get("norm_epsilon") or arguments.get("layernorm_epsilon"),
        "num_query_groups": arguments.get("num_query_groups") if arguments.get("group_query_attention") else None,
        "share_embeddings_and_output_weights": not arguments.get("untie_embeddings_and_output_weights", False),
        "num_moe_experts": arguments.get("num_experts"),
        "layernorm_zero_centered_gamma": arguments.get("apply_layernorm_1p"),
        "seq_len_interpolation_factor": arguments.get("rotary_seq_len_interpolation_factor"),
        "heterogeneous_block_specs": bool(arguments.get("heterogeneous_layers_config_path")),
        "rope_scaling": scaled,
        "rope_scaling_factor": factor,
        "vocab_size": arguments.get("vocab_size") or _tokens(tokenizer),
    }
    return Described(architecture, tokenizer, whole(common.get("iteration"), f"{path}: iteration"))


def _describe_bridge(directory: Location) -> Described:
    path = directory / RUN_CONFIG
    config = _read_yaml(path)
    architecture = section(config, "model", path, needed=True)
    named = section(config, "tokenizer", path).get("tokenizer_model")
    tokenizer = _first_tokenizer(directory / "tokenizer", named_directory(named, f"{path}: tokenizer_model"))
    digits = re.fullmatch(r"iter_(\d+)", directory.name)
    known = {**architecture, "vocab_size": architecture.get("vocab_size") or _tokens(tokenizer)}
    return Described(known, tokenizer, int(digits[1]) if digits else 0)


def _describe_nemo(directory: Location) -> Described:
    path = directory / CONTEXT / "model.yaml"
    content = _read_yaml(path)
    architecture = section(content, "config", path, needed=True)
    named = section(content, "tokenizer", path).get("pretrained_model_name")
    carried = sorted(path for path in (directory / CONTEXT).iterdir() if path.is_dir())
    outside = named_directory(named, f"{path}: pretrained_model_name")
    tokenizer = _first_tokenizer(*carried, directory / CONTEXT, outside)
    digits = re.search(r"step=(\d+)", directory.name)
    known = {**architecture, "vocab_size": architecture.get("vocab_size") or _tokens(tokenizer)}
    return Described(known, tokenizer, int(digits[1]) if digits else 0)


_READERS: dict[str, Callable[[Location], Described]] = {
    "megatron-lm": _describe_megatron_lm,
    "megatron-bridge": _describe_bridge,
    "nemo": _describe_nemo,
}


def _read_yaml(path: Location) -> Mapping[str, Any]:
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise CheckpointError(f"{path}: no such file", "it says which model the weights are of") from None
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: is not YAML ({' '.join(str(error).split())[:120]})") from None
    if not isinstance(content, Mapping):
        raise CheckpointError(f"{path}: holds no sections", "it says which model the weights are of")
    return content


def _first_tokenizer(*directories: Location | None) -> Location | None:
    for directory in directories:
        if directory is not None and any((directory / name).is_file() for name in _TOKENIZER_FILES):
            return directory
    return None


def _tokens(tokenizer: Location | None) -> int | None:
    """How many ids a tokenizer has, by its `tokenizer.json`; None where that does not say."""
    try:
        content = read_json(tokenizer / "tokenizer.json") if tokenizer is not None else None
        if not isinstance(content, dict):
            return None
        vocabulary = (content.get("model") or {}).get("vocab") or {}
        ids = vocabulary.values() if isinstance(vocabulary, Mapping) else range(len(vocabulary))
        return max([*ids, *(token["id"] for token in content.get("added_tokens") or ())], default=-1) + 1 or None
    except (AttributeError, LookupError, RecursionError, TypeError):
        path = f"{tokenizer}/tokenizer.json"
        raise CheckpointError(f"{path}: its vocabulary is damaged", "it says how many tokens the model has") from None
