"""Bytes a rank holds, by arithmetic: exact for what is stored, an estimate for what the backward pass needs.

Dimensions: s sequence, b batch, h hidden, n heads, g KV groups, d head dimension, f inner width, v vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass

from megatron_octo.config.run import RunConfig

ELEMENT = {"fp32": 4, "bf16": 2}
"""Bytes of one weight or activation."""

ACTIVATIONS = (
    "per token and layer 4 h (inputs and outputs of the two norms) + 2 n d + 2 g d (query, key, value, attention's "
    "result) + 3 f (gate, up, their product), times the element size; fused attention, so no s x s matrix; divided by "
    "TP (h only with sequence parallelism, g to no less than 1) and CP; times the micro-batches that wait for their "
    "backward pass"
)
"""How activations are estimated, for people. FP8 is not counted off: copies in FP8 come and go beside them."""


@dataclass(frozen=True)
class Stored:
    """Bytes that stay through a run on one rank: known exactly from its parameters."""

    weights: int
    gradients: int
    optimizer: int


def stored(run: RunConfig, parameters: int) -> Stored:
    """Bytes of weights, fp32 gradients and optimizer on a rank that holds this many parameters.

    AdamW keeps two moments in fp32 and, where weights are in bf16, a main weight in fp32. The distributed optimizer
    shares them out among the ranks that hold the same weights (data and context parallel).
    """
    adam = 8 if run.dtype == "fp32" else 12
    sharers = run.parallel.data * run.parallel.context if run.parallel.distributed_optimizer else 1
    return Stored(parameters * ELEMENT[run.dtype], parameters * 4, -(-parameters * adam // sharers))


def micro_batches(run: RunConfig) -> int:
    """Micro-batches of one rank in a step."""
    return run.batch.global_batch // (run.batch.micro_batch * run.parallel.data)


def activation_bytes(run: RunConfig, stage: int) -> int:
    """Estimate what a pipeline stage keeps for its backward passes at the fullest moment, see `ACTIVATIONS`.

    With full recomputation a layer group keeps its input alone, h a token, and one group at a time is there whole.
    Selective recomputation saves what fused attention does not store in the first place.
    """
    chunk = run.model.layers // (run.parallel.pipeline * (run.parallel.virtual_pipeline or 1))
    whole, entry = _layer_bytes(run)
    if run.recompute.kind != "full":
        return whole * chunk * _waiting(run, stage)
    if run.recompute.method == "uniform":
        kept, working = entry * (chunk // run.recompute.layers), whole * run.recompute.layers
    else:
        plain = chunk - run.recompute.layers
        kept, working = entry * run.recompute.layers + whole * plain, whole
    return kept * _waiting(run, stage) + working


def logit_bytes(run: RunConfig) -> int:
    """Estimate what the last stage needs for the losses of a micro-batch: logits, their softmax in fp32, gradients."""
    element = ELEMENT[run.dtype]
    return _tokens(run) * run.model.vocabulary * (2 * element + 4) // run.parallel.tensor


def _layer_bytes(run: RunConfig) -> tuple[int, int]:
    """Of one layer and micro-batch: everything the backward pass needs, and the layer's input alone."""
    model, parallel = run.model, run.parallel
    token = _tokens(run) * ELEMENT[run.dtype]
    residual = token * model.hidden // (parallel.tensor if parallel.sequence else 1)
    groups = max(model.kv_groups, parallel.tensor)  # a rank holds one at least
    heads = model.dim * (2 * model.heads + 2 * groups)
    if model.qk_norm:
        heads += model.dim * (model.heads + groups)
    return 4 * residual + token * (heads + 3 * model.ffn) // parallel.tensor, residual


def _tokens(run: RunConfig) -> int:
    """Tokens of a micro-batch on one rank."""
    return run.batch.micro_batch * run.data.sequence_length // run.parallel.context


def _waiting(run: RunConfig, stage: int) -> int:
    """Chunk passes of a stage that wait for their backward pass at the fullest moment: one forward, one backward."""
    parallel = run.parallel
    passes = micro_batches(run)
    behind = parallel.pipeline - 1 - stage
    if parallel.virtual_pipeline is None:
        return min(behind + 1, passes)
    chunks = parallel.virtual_pipeline
    return min(2 * behind + (chunks - 1) * parallel.pipeline + 1, passes * chunks)
