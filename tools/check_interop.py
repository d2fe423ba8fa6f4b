"""Exchange checkpoints with Megatron-LM and Megatron-Bridge through their own code, here, without a GPU.

For a tiny model of each family: what we write is loaded by their loader into a model built by their builder from what
we wrote about it, and compared bit for bit; then they save that model, and we read it back. `--inventory` records the
names and shapes their code stores, which the test suite holds ours against where no checkout is given.

    python tools/check_interop.py --megatron-lm ~/Megatron-LM
    python tools/check_interop.py --megatron-bridge ~/Megatron-Bridge

Tried with Megatron-LM core_v0.16.1, which needs no more than megatron_octo does, and with Megatron-Bridge v0.3.1, which
also needs omegaconf, hydra-core, nvidia-modelopt, scipy and triton.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import types
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import MagicMock

import torch

from megatron_octo.checkpoint.dist import read_metadata, stored_names
from megatron_octo.checkpoint.dist_write import write_model
from megatron_octo.checkpoint.tensors import read
from megatron_octo.config.model import ModelConfig, RopeScaling
from megatron_octo.convert.layouts import layout_of
from megatron_octo.convert.megatron_io import find_checkpoint, geometry, read_origin, weights_of
from megatron_octo.convert.tables import megatron_shapes, table_of

SIZES = {"layers": 3, "hidden": 32, "heads": 4, "kv_groups": 2, "head_dim": 16, "ffn": 48, "vocabulary": 130}
MODELS = {
    "llama": ModelConfig(family="llama", **SIZES, rope_scaling=RopeScaling(factor=8.0)),
    "qwen2": ModelConfig(family="qwen2", **SIZES),
    "qwen3": ModelConfig(family="qwen3", **SIZES, tied_embeddings=False),
}
DTYPE = "bfloat16"
LOCAL_NAMES = {
    "input_layernorm.weight": "self_attention.linear_qkv.layer_norm_weight",
    "pre_mlp_layernorm.weight": "mlp.linear_fc1.layer_norm_weight",
}
"""Without TransformerEngine a module has these names; what it stores has the others."""
NEED_GPU = {
    "megatron-lm": ("megatron.core.transformer.custom_layers.batch_invariant_kernels",),
    "megatron-bridge": ("megatron.bridge.peft.lora", "megatron.bridge.peft.lora_layers"),
}
"""Modules that import triton or TransformerEngine and have no part in checkpoints: they are replaced by nothing."""


class Random:
    """Random weights of a model, under megatron-core's names."""

    where = "random weights"

    def __init__(self, model: ModelConfig) -> None:
        generator = torch.Generator().manual_seed(0)
        shapes = megatron_shapes(table_of(model.family), geometry(model))
        self.tensors = {
            name: torch.randn(shape, generator=generator).to(getattr(torch, DTYPE)) for name, shape in shapes.items()
        }
        for name in ("embedding.word_embeddings.weight", "output_layer.weight"):
            if name in self.tensors:
                self.tensors[name][model.vocabulary :] = 0  # as our trainer pads it

    def shapes(self) -> dict[str, tuple[int, ...]]:
        return {name: tuple(tensor.shape) for name, tensor in self.tensors.items()}

    def dtype(self, name: str) -> str:
        return DTYPE

    def fill(self, name: str, start: int, out: torch.Tensor) -> None:
        out.copy_(self.tensors[name][start : start + len(out)])


def main() -> int:
    """Check whatever checkouts are given; 1 if anything differs."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--megatron-lm", type=Path, metavar="CHECKOUT")
    parser.add_argument("--megatron-bridge", type=Path, metavar="CHECKOUT")
    parser.add_argument("--inventory", type=Path, help="JSON file to record the names and shapes they store in")
    given = parser.parse_args()
    checkouts = {name: getattr(given, name.replace("-", "_")) for name in EXCHANGES}
    if not any(checkouts.values()):
        parser.error("name a checkout")
    from megatron_octo.runtime import groups

    groups.initialize_single(seed=0)
    report = {name: check(name, path) for name, path in checkouts.items() if path is not None}
    if given.inventory is not None:
        known = json.loads(given.inventory.read_text()) if given.inventory.is_file() else {}
        recorded = {name: {family: found.pop("stored") for family, found in report[name].items()} for name in report}
        given.inventory.write_text(json.dumps(known | recorded, indent=1, sort_keys=True) + "\n")
    for found in (entry for families in report.values() for entry in families.values()):
        found.pop("stored", None)
    print(json.dumps(report))
    return int(any(found["differences"] for families in report.values() for found in families.values()))


def check(trainer: str, checkout: Path) -> dict[str, dict[str, Any]]:
    """Exchange a model of each family with one trainer: differences found (none means bitwise equal) and its files."""
    source = checkout / "src" if trainer == "megatron-bridge" else checkout
    sys.path.append(str(source))
    import megatron

    megatron.__path__.append(str(source / "megatron"))
    for name in NEED_GPU[trainer]:
        sys.modules[name] = _Nothing(name)
    found = {}
    for family, model in MODELS.items():
        with tempfile.TemporaryDirectory(prefix="interop-") as scratch:
            found[family] = _check_family(trainer, model, Path(scratch))
        print(f"{trainer} {family}: {found[family]['differences'] or 'bitwise equal both ways'}", flush=True)
    return found


def _check_family(trainer: str, model: ModelConfig, scratch: Path) -> dict[str, Any]:
    layout, weights, ours, theirs = layout_of(trainer), Random(model), scratch / "ours", scratch / "theirs"
    write_model(
        ours,
        weights,
        {"model": model.model_dump(mode="json"), "layout": trainer},
        {"family": model.family},
        places=layout.places(weights.shapes()),
        extras=lambda directory: layout.write(directory, model, DTYPE),
        into=layout.into,
        objects=layout.objects(model),
    )
    with _quiet():
        loaded = EXCHANGES[trainer](model, ours, theirs)
    differences = [f"loaded: {name}" for name in _differing(_as_stored(loaded), weights.tensors)]
    origin = read_origin(find_checkpoint(theirs))
    tensors = origin.tensors()
    saved = {name: read(tensors, name) for name in tensors.shapes()}
    differences += [f"saved: {name}" for name in _differing(saved, weights.tensors)]
    differences += [f"model: {key} = {value!r}" for key, value in origin.model if getattr(model, key) != value]
    return {
        "differences": differences,
        "compared": len(weights.tensors),
        "stored": _inventory(weights_of(find_checkpoint(theirs))),
    }


def _with_megatron_lm(model: ModelConfig, ours: Path, theirs: Path) -> dict[str, torch.Tensor]:
    """Load with `megatron.training.checkpointing.load_checkpoint`, save with its `save_checkpoint`."""
    import gpt_builders
    from megatron.core import num_microbatches_calculator
    from megatron.training import arguments, checkpointing, global_vars

    words = ["--load", str(ours), "--save", str(theirs), "--use-checkpoint-args", "--transformer-impl", "local"]
    words += ["--micro-batch-size", "1", "--no-save-optim", "--no-save-rng", "--bf16"]
    words += ["--vocab-size", str(model.vocabulary)]  # it would count its tokenizer
    # These two are not among the arguments that Megatron-LM takes over from a checkpoint: its user states them.
    words += ["--use-rope-scaling"] * (model.rope_scaling is not None) + ["--qk-layernorm"] * model.qk_norm
    sys.argv[1:] = words
    args = arguments.parse_args()
    args.rank, args.world_size, args.use_dist_ckpt, args.params_dtype = 0, 1, True, torch.bfloat16
    args, _ = checkpointing.load_args_from_checkpoint(args)
    fused = ("bias_swiglu_fusion", "bias_dropout_fusion", "gradient_accumulation_fusion", "apply_rope_fusion")
    vars(args).update(dict.fromkeys((*fused, "masked_softmax_fusion", "fp8_param_gather"), False))
    args.use_cpu_initialization = args.no_persist_layer_norm = True
    global_vars.set_args(args)
    num_microbatches_calculator.unset_num_microbatches_calculator()
    num_microbatches_calculator.init_num_microbatches_calculator(0, None, 1, 1, 1)
    chunk = gpt_builders.gpt_builder(args, True, True).bfloat16()
    checkpointing.load_checkpoint([chunk], None, None)
    checkpointing.save_checkpoint(5, [chunk], None, None, 0)
    return chunk.state_dict()


def _with_megatron_bridge(model: ModelConfig, ours: Path, theirs: Path) -> dict[str, torch.Tensor]:
    """Load with `megatron.bridge.training.model_load_save`, save with its `save_megatron_model`."""
    from megatron.bridge.models.gpt_provider import local_layer_spec
    from megatron.bridge.training import model_load_save

    directory = str(weights_of(ours))
    provider, _ = model_load_save.load_model_config(directory)
    fused = ("bias_activation_fusion", "bias_dropout_fusion", "gradient_accumulation_fusion", "apply_rope_fusion")
    for name in (*fused, "masked_softmax_fusion", "persist_layer_norm"):
        setattr(provider, name, False)
    provider.transformer_layer_spec = local_layer_spec
    chunks = model_load_save.build_and_load_model(directory, provider, use_cpu_init=True, skip_temp_dist_context=True)
    model_load_save.save_megatron_model(chunks, theirs)
    inner = chunks[0].module if hasattr(chunks[0], "module") else chunks[0]
    return inner.state_dict()


EXCHANGES: dict[str, Callable[[ModelConfig, Path, Path], dict[str, torch.Tensor]]] = {
    "megatron-lm": _with_megatron_lm,
    "megatron-bridge": _with_megatron_bridge,
}
"""From a model, our checkpoint and an empty place to the weights they loaded, having saved them there."""


def _as_stored(state: dict[str, Any]) -> dict[str, torch.Tensor]:
    found = {}
    for name, value in state.items():
        if isinstance(value, torch.Tensor) and not name.endswith("_extra_state"):
            for local, stored in LOCAL_NAMES.items():
                name = name.replace(local, stored)
            found[name] = value
    return found


def _differing(found: dict[str, torch.Tensor], wanted: dict[str, torch.Tensor]) -> list[str]:
    both = found.keys() & wanted.keys()
    return sorted(
        (found.keys() ^ wanted.keys()) | {name for name in both if not torch.equal(found[name], wanted[name])}
    )


def _inventory(weights: Path) -> dict[str, Any]:
    """What a checkpoint of theirs stores: shapes of tensors, and keys of the states of modules."""
    tensors = {name: list(facts.shape) for name, facts in read_metadata(weights).items()}
    objects = sorted(name for name in stored_names(weights) - tensors.keys() if "_extra_state" in name)
    return {"tensors": tensors, "objects": objects}


@contextmanager
def _quiet() -> Iterator[None]:
    """Their loaders tell every argument they take over: on standard error, so that our report stands alone."""
    before, sys.stdout = sys.stdout, sys.stderr
    arguments = list(sys.argv)
    try:
        yield
    finally:
        sys.stdout, sys.argv = before, arguments


class _Nothing(types.ModuleType):
    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return MagicMock()


if __name__ == "__main__":
    sys.exit(main())
