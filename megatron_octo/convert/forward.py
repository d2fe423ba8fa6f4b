"""Logits of one model from both sides: Megatron's forward pass of a checkpoint, transformers' of a directory.

Both run in fp32, whatever the weights' dtype, one after the other and layer by layer (`streamed`): so rounding in
matrix products hides no fault, and a model need not fit into memory. Dimensions: b batch, s sequence, h hidden,
v vocabulary.
"""

from __future__ import annotations

import random
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

from megatron_octo.checkpoint.tensors import TensorSource
from megatron_octo.config.layout import ParallelConfig
from megatron_octo.config.model import ModelConfig
from megatron_octo.convert.hf_io import CONFIG_FILE
from megatron_octo.convert.streamed import empty_parameters, needed_shapes, streaming
from megatron_octo.convert.tables import cover
from megatron_octo.errors import DataError, OctoError
from megatron_octo.locations import Location, local_copy

if TYPE_CHECKING:
    from torch import Tensor
    from torch.nn import Module

SHORT_LENGTHS = (1, 7, 33, 64)
"""Lengths of the short prompts, which run as one batch, padded on the right (causal attention never sees it)."""
JUMP = 32
"""Index from which on the tokens of the short prompts sit at far positions."""
FAR = 24_576
"""The first far position: three times the 8192 from which on Llama 3's scaling tells."""
POSITIONS_COMPARED = 32
"""Last tokens of each prompt whose logits are compared."""

_LONGEST = 2048
_LONG_COST = 2e12
"""Floating-point operations the long prompt may cost: 2048 tokens up to 0.5B parameters, 800 at 1B, 128 at 8B."""


@dataclass(frozen=True, slots=True)
class Probe:
    """Prompts that run as one batch: token ids of each row, and the positions all rows share `[longest row]`."""

    rows: list[list[int]]
    positions: list[int]

    @property
    def first(self) -> int:
        """Index of the first token of any row whose logits are compared."""
        return max(0, min(len(row) for row in self.rows) - POSITIONS_COMPARED)

    def tokens(self) -> Tensor:
        """The rows as `[b, s]`, shorter ones padded with token 0."""
        import torch

        return torch.tensor([row + [0] * (len(self.positions) - len(row)) for row in self.rows])

    def compared(self, logits: Tensor, vocabulary: int) -> Iterator[Tensor]:
        """Cut logits `[b, s - first, v or padded v]` to each row's compared tokens `[tokens, v]`, fp32 on CPU."""
        for row, values in zip(self.rows, logits, strict=True):
            start = max(0, len(row) - POSITIONS_COMPARED)
            yield values[start - self.first : len(row) - self.first, :vocabulary].float().cpu()


@dataclass(frozen=True, slots=True)
class Outputs:
    """What one side says.

    Args:
        logits: `[tokens compared, v]` of each prompt.
        frequencies: of RoPE, `[dim / 2]`.
        parts: what the attention and the MLP of each layer, in turn, add for the last token of the first batch, `[h]`.
    """

    logits: list[Tensor]
    frequencies: Tensor
    parts: list[Tensor]


def probes(model: ModelConfig) -> list[Probe]:
    """The batches a model is probed with: a function of its sizes alone, so that anyone can draw them again.

    The first holds short prompts, the longest of which goes on at far positions; the second a prompt as long
    as is cheap.
    """
    from megatron_octo.model.facts import parameter_count

    affordable = int(_LONG_COST / (2 * parameter_count(model)))
    long = min(max(affordable, 2 * SHORT_LENGTHS[-1]), _LONGEST, model.max_positions)
    lengths = sorted({min(length, model.max_positions) for length in SHORT_LENGTHS})
    far = max(JUMP, min(FAR, model.max_positions - (SHORT_LENGTHS[-1] - JUMP)))
    jumping = [*range(JUMP), *range(far, far + SHORT_LENGTHS[-1] - JUMP)][: lengths[-1]]
    draw = random.Random(20506)

    def row(length: int) -> list[int]:
        return [draw.randrange(model.vocabulary) for _ in range(length)]

    return [Probe([row(length) for length in lengths], jumping), Probe([row(long)], list(range(long)))]


@contextmanager
def single_process() -> Iterator[None]:
    """A Megatron world of one process; one that exists already is used and left alone."""
    from megatron.core import parallel_state

    from megatron_octo.runtime.groups import initialize_single, shutdown

    if parallel_state.model_parallel_is_initialized():
        yield
        return
    initialize_single(seed=0)
    try:
        yield
    finally:
        shutdown()


def megatron_outputs(model: ModelConfig, weights: TensorSource, batches: list[Probe]) -> Outputs:
    """Run the trainer's own model on a checkpoint's tensors.

    Args:
        model: the architecture.
        weights: the checkpoint; must hold exactly the model's tensors.
        batches: what to run.

    Raises:
        DataError: the checkpoint lacks a tensor of the model, has one too many, or one of another shape.
    """
    import torch

    from megatron_octo.model.build import build_gpt

    with single_process(), torch.no_grad():
        with empty_parameters():
            gpt = build_gpt(model, ParallelConfig(), "fp32", pre_process=True, post_process=True, seed=None).eval()
        names = _checkpoint_names(gpt)
        cover(needed_shapes(gpt, names), weights.shapes()).require(weights.where)
        # The output layer of a tied model is handed the embedding's weight from outside.
        kept = [name for name in names if model.tied_embeddings and name.startswith("embedding.")]
        with streaming(gpt, names, weights, _device(), kept):
            parts = _record(part for layer in gpt.decoder.layers for part in (layer.self_attention, layer.mlp))
            logits = [row for probe in batches for row in _run_megatron(gpt, probe, model.vocabulary)]
        return Outputs(logits, gpt.rotary_pos_emb.inv_freq.detach().float().cpu(), parts)


def transformers_outputs(
    directory: Location, model: ModelConfig, weights: TensorSource, batches: list[Probe]
) -> Outputs:
    """Run transformers on a directory: its configuration and modules, with the weights `from_pretrained` would load.

    Args:
        directory: holds `config.json`; nothing in it is executed.
        model: the architecture, for the width of the vocabulary.
        weights: the directory's tensors.
        batches: what to run.

    Raises:
        DataError: transformers cannot build the model, or the files do not hold exactly its tensors.
    """
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    try:
        with local_copy(directory, (CONFIG_FILE,)) as here:
            config = AutoConfig.from_pretrained(str(here), local_files_only=True, trust_remote_code=False)
        with empty_parameters():
            loaded = AutoModelForCausalLM.from_config(config, dtype=torch.float32, trust_remote_code=False).eval()
        loaded.tie_weights()
    except OctoError:
        raise
    except Exception as error:  # noqa: BLE001 - whatever a faulty configuration makes transformers raise
        raise DataError(f"{directory}: transformers cannot load it ({' '.join(str(error).split())[:300]})") from None
    names = _transformers_names(loaded)
    cover(needed_shapes(loaded, names), weights.shapes()).require(weights.where)
    with torch.no_grad(), streaming(loaded, names, weights, _device()):
        parts = _record(part for layer in loaded.model.layers for part in (layer.self_attn, layer.mlp))
        logits = [row for probe in batches for row in _run_transformers(loaded, probe, model.vocabulary)]
    return Outputs(logits, loaded.model.rotary_emb.inv_freq.detach().float().cpu(), parts)


def _checkpoint_names(gpt: Any) -> dict[str, str]:
    """The key megatron-core saves each parameter under, by the parameter's name in the model."""
    saved = gpt.sharded_state_dict(metadata={"non_homogeneous_layers": True})
    return {name: saved[name].key for name, _ in gpt.named_parameters()}


def _transformers_names(loaded: Any) -> dict[str, str]:
    """The tensor `from_pretrained` takes each parameter from: its own name, or that of what it is tied to."""
    first: dict[int, str] = {}
    return {
        name: first.setdefault(id(parameter), name)
        for name, parameter in loaded.named_parameters(remove_duplicate=False)
    }


def _record(modules: Iterable[Module]) -> list[Tensor]:
    """Fill the list with what each module gives for the last token of the last, longest row, the first time it runs."""
    given: list[Tensor] = []

    def note(_module: Module, _given: Any, output: Any) -> None:
        # `[s, b, h]` here, `[b, s, h]` there: the last of both is the same token.
        hidden = output[0] if isinstance(output, tuple) else output
        if len(given) < len(watched):
            given.append(hidden[-1, -1].float().cpu().clone())

    watched = [module.register_forward_hook(note) for module in modules]
    return given


def _run_megatron(gpt: Any, probe: Probe, vocabulary: int) -> Iterator[Tensor]:
    import torch

    tokens, first = probe.tokens(), probe.first
    with ExitStack() as hooks:
        at = partial(_angles_at, probe.positions)
        hooks.callback(gpt.rotary_pos_emb.register_forward_hook(at).remove)
        # Of hidden [s, b, h], only what is compared goes through the output layer: it is the largest product.
        hooks.callback(gpt.output_layer.register_forward_pre_hook(lambda _, given: (given[0][first:],)).remove)
        positions = torch.tensor([probe.positions]).expand_as(tokens)
        logits = gpt(tokens.to(_device()), positions.to(_device()), None)
    return probe.compared(logits, vocabulary)


def _angles_at(positions: list[int], rope: Any, _given: Any, _angles: Tensor) -> Tensor:
    """Rotary angles `[s, 1, 1, dim]` of the given positions, from megatron-core's own table, in place of 0 to s - 1."""
    import torch

    ends = [i for i in range(1, len(positions)) if positions[i] != positions[i - 1] + 1]
    runs = zip([0, *ends], [*ends, len(positions)], strict=True)
    return torch.cat([rope.get_emb(end - start, offset=positions[start]) for start, end in runs])


def _run_transformers(loaded: Any, probe: Probe, vocabulary: int) -> Iterator[Tensor]:
    import torch

    tokens = probe.tokens().to(_device())
    # With a mask given, a jump of the positions is not taken for the start of another text.
    logits = loaded(
        tokens,
        attention_mask=torch.ones_like(tokens),
        position_ids=torch.tensor([probe.positions], device=_device()).expand_as(tokens),
        use_cache=False,
        logits_to_keep=len(probe.positions) - probe.first,
    ).logits
    return probe.compared(logits, vocabulary)


def _device() -> str:
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"
