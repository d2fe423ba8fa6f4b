"""A run on paper: resolved, checked, built without memory and counted. No process, no GPU, nothing written."""

from __future__ import annotations

import os
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from megatron_octo.checkpoint.retain import Policy, Saved, removable
from megatron_octo.checkpoint.store import has_checkpoint
from megatron_octo.config.run import RunConfig
from megatron_octo.model.facts import FLOPS_CONVENTION, flops_per_token
from megatron_octo.model.memory import ACTIVATIONS, ELEMENT, activation_bytes, logit_bytes, micro_batches, stored
from megatron_octo.train.needs import Need, is_there, needs, remarks
from megatron_octo.train.start import Start, check_made_with, check_place, check_tokenizer_directory, origin, plan_start

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class Stage:
    """What each rank of one pipeline stage holds, in bytes; weights to FP8 copies are exact, the rest estimates.

    Args:
        stage: of the pipeline, from 0.
        layers: of this stage.
        parameters: of one rank, padding and a tied output layer's copy included.
        weights: as the model computes with them.
        gradients: their fp32 sums.
        optimizer: this rank's share of main weights and moments.
        fp8_copies: of the weights that are cast for FP8 products, as they are and transposed.
        activations: kept for the backward pass.
        logits: of the last stage's losses.
    """

    stage: int
    layers: int
    parameters: int
    weights: int
    gradients: int
    optimizer: int
    fp8_copies: int
    activations: int
    logits: int

    @property
    def total(self) -> int:
        """All of it together."""
        return self.weights + self.gradients + self.optimizer + self.fp8_copies + self.activations + self.logits


def dry_run(run: RunConfig) -> dict[str, Any]:
    """Find out everything about a run that can be known without starting it.

    GPUs are hidden from this process first, and stay so.

    Args:
        run: the checked configuration (`train.api.load_run`).

    Returns:
        Facts in JSON's types; `not_checked` lists what is not there yet and so was left alone.

    Raises:
        OctoError: whatever training would refuse before its first step, but for missing files.
    """
    os.environ["CUDA_VISIBLE_DEVICES"] = ""
    start, beginning, missing = _start(run)
    run = start.run if start else run
    read = needs(run, start, lacking=True)
    stages, built = _stages(run)
    heaviest = max(stages, key=lambda stage: stage.total)
    padding = _padding(run)
    return {
        "run": run.name,
        "layout": run.parallel.label,
        "processes": run.parallel.processes,
        "parameters": {"published": built - padding, "padding": padding, "heaviest_rank": heaviest.parameters},
        "stages": [asdict(stage) | {"total": stage.total} for stage in stages],
        "heaviest_stage": heaviest.stage,
        "flops_per_token": flops_per_token(run.model, run.data.sequence_length),
        "tokens_per_step": run.tokens_per_step,
        "steps": run.steps,
        "tokens": run.steps * run.tokens_per_step,
        "micro_batches": micro_batches(run),
        "checkpoints": _checkpoints(run, built),
        "sources": [asdict(need) | {"path": str(need.path)} for need in read],
        "remarks": remarks(run, start, read),
        "start": beginning,
        "not_checked": [*missing, *_unread(run, read), *_machine(run)],
        "conventions": {"flops": FLOPS_CONVENTION, "activations": ACTIVATIONS},
        "config": run.model_dump(mode="json"),
    }


def _stages(run: RunConfig) -> tuple[list[Stage], int]:
    """Build a rank of every pipeline stage; also the parameters of the whole model, each counted once.

    The layers are the local ones, whose parameters are those of TransformerEngine's.
    """
    from megatron_octo.model.build import build_chunks
    from megatron_octo.runtime.rehearsal import first_rank_of_stage, standing_at

    _translate(run)
    stages, built = [], 0
    for number in range(run.parallel.pipeline):
        with standing_at(run.parallel, first_rank_of_stage(run.parallel, number)):
            chunks = build_chunks(run.model, run.parallel, run.dtype, None, run.recompute)
        stages.append(_stage(run, number, chunks))
        built += sum(_whole(run, weight) for chunk in chunks for weight in _own(chunk))
    return stages, built


def _translate(run: RunConfig) -> None:
    """Let megatron-core's configuration classes see the whole run, FP8 too: they refuse what does not go together.

    Only the names of fused operations are left out: megatron-core looks for TransformerEngine at each of them.
    """
    from megatron_octo.model.translate import Kernels, ddp_config, optimizer_config, transformer_config
    from megatron_octo.runtime import cpu_twin

    cpu_twin.install()
    transformer_config(run.model, run.parallel, run.dtype, run.recompute, Kernels("local", run.fp8))
    ddp_config(run.parallel, run.fp8)
    optimizer_config(run.optimizer, run.schedule.learning_rate or 0.0, run.dtype, run.parallel, run.fp8)


def _stage(run: RunConfig, number: int, chunks: list[Any]) -> Stage:
    parameters = sum(weight.numel() for chunk in chunks for weight in chunk.parameters())
    last = number == run.parallel.pipeline - 1
    return Stage(
        stage=number,
        layers=sum(len(chunk.decoder.layers) for chunk in chunks),
        parameters=parameters,
        **asdict(stored(run, parameters)),
        fp8_copies=_fp8_copies(run, chunks),
        activations=activation_bytes(run, number),
        logits=logit_bytes(run) if last else 0,
    )


def _own(chunk: Any) -> list[torch.nn.Parameter]:
    """A chunk's parameters, but for the last stage's copy of a tied embedding."""
    copied = chunk.share_embeddings_and_output_weights and not chunk.pre_process
    return [weight for name, weight in chunk.named_parameters() if not (copied and name == "output_layer.weight")]


def _whole(run: RunConfig, weight: torch.nn.Parameter) -> int:
    """Parameters of the weight that this rank's share is of."""
    return weight.numel() * (run.parallel.tensor if getattr(weight, "tensor_model_parallel", False) else 1)


def _padding(run: RunConfig) -> int:
    """Parameters that stand for no token: rows that fill up the embedding, and an output layer of its own."""
    from megatron_octo.model.translate import padded_vocabulary

    rows = padded_vocabulary(run.model.vocabulary) - run.model.vocabulary
    return rows * run.model.hidden * (1 if run.model.tied_embeddings else 2)


def _fp8_copies(run: RunConfig, chunks: list[Any]) -> int:
    """Bytes of what FP8 products read instead of BF16 weights: one byte a weight as it is, one transposed (Hopper)."""
    if run.fp8 is None or run.fp8.parameters:
        return 0
    first, last = run.fp8.bf16_first_layers, run.model.layers - run.fp8.bf16_last_layers
    layers = [layer for chunk in chunks for layer in chunk.decoder.layers if first < layer.layer_number <= last]
    return 2 * sum(weight.numel() for layer in layers for weight in layer.parameters() if weight.dim() == 2)


def _checkpoints(run: RunConfig, parameters: int) -> dict[str, Any]:
    """How many are saved, which stay, and their bytes: weights, and main weights and moments in fp32."""
    every, step = run.checkpoint.every, run.tokens_per_step
    end = run.steps * step
    positions = sorted({-(-mark // step) * step for mark in range(every, end + 1, max(every, step))} | {end})
    saved = [Saved(str(position), position) for position in positions]
    gone = removable(saved, Policy(run.checkpoint.keep, run.checkpoint.keep_every), {saved[-1].name})
    kept = len(saved) - len(gone)
    each = parameters * (12 + ELEMENT[run.dtype])
    return {"saved": len(saved), "kept": kept, "bytes_each": each, "bytes_kept": each * kept}


def _start(run: RunConfig) -> tuple[Start | None, str, list[str]]:
    """Where the run would begin, if what it begins from is there; the same in words; and what is not there."""
    check_place(run.out)
    check_made_with(run)
    if has_checkpoint(run.out):
        begin = plan_start(run)
        return begin, f"goes on after step {begin.step}, from {begin.checkpoint}", []
    missing = []
    if run.data.tokenizer.exists():
        check_tokenizer_directory(run)
    else:
        missing.append(f"data.tokenizer = {run.data.tokenizer}: not there")
    named = run.start.fork.parent if run.start.fork else run.start.checkpoint
    field = "start.fork.parent" if run.start.fork else "start.checkpoint"
    if named is not None and not named.exists():
        return None, f"{field} = {named}", [*missing, f"{field} = {named}: not there"]
    begin = origin(run)
    return begin, _in_words(begin), missing


def _in_words(begin: Start) -> str:
    if begin.checkpoint is None:
        return f"random weights, seed {begin.run.seed}"
    if begin.lineage is None:
        return f"weights of {begin.checkpoint}"
    carried = "with" if begin.moments else "without"
    return (
        f"forks from {begin.checkpoint} at {begin.root_tokens} tokens, {carried} moments, at learning rate "
        f"{begin.lineage['learning_rate']:g}"
    )


def _unread(run: RunConfig, read: list[Need]) -> list[str]:
    missing = [f"data.mixture.{need.source}.path = {need.path}: not there" for need in read if need.passes is None]
    heldout = run.validation.sources if run.validation else {}
    missing += [
        f"validation.sources.{name} = {path}: not there" for name, path in heldout.items() if not is_there(path)
    ]
    unseen = [need.source for need in read if need.passes is not None and not need.scanned]
    return missing + [f"tokens of data.mixture.{name}: large, each window is checked as it is read" for name in unseen]


def _machine(run: RunConfig) -> list[str]:
    asked = [f"a machine with {run.parallel.processes} processes, and its network"]
    return [*asked, "fp8: would need Hopper GPUs and TransformerEngine"] if run.fp8 else asked
