"""How far the outputs of two sides agree: RoPE frequencies and logits, in figures and in the name of a fault."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

from megatron_octo.config.model import ModelConfig
from megatron_octo.convert.forward import Outputs, Probe

if TYPE_CHECKING:
    from torch import Tensor

Facts = dict[str, Any]

LOGIT_TOLERANCE = 1e-4
"""Largest difference of a logit allowed, relative to the largest logit (at least 1). Tiny models show 1e-6."""
KL_TOLERANCE = 1e-6
"""Largest KL divergence of a position allowed, in nats."""
PHASE_TOLERANCE = 0.05
"""Largest RoPE angle difference allowed at the last position, in radians; two fp32 roundings at 2^17 make 0.02."""

_PART_TOLERANCE = 1e-3
"""Difference of a layer's output, relative to its largest value, that is more than rounding."""
_FREQUENCY_TOLERANCE = 1e-3
"""Relative difference of frequencies below which a fault is taken for explained."""


def facts_of(faults: list[str], **figures: Any) -> Facts:
    """What every check answers: whether it passed, its faults in words, and its figures."""
    return {"passed": not faults, "faults": faults, **figures}


def check_rope(ours: Tensor, theirs: Tensor, model: ModelConfig) -> Facts:
    """The two RoPE tables agree up to the last position a model may use.

    Args:
        ours: Megatron's inverse frequencies, `[dim / 2]`.
        theirs: transformers', `[dim / 2]`.
        model: for the number of positions.
    """
    same_length = ours.shape == theirs.shape
    phase = float((ours.double() - theirs.double()).abs().max()) * model.max_positions if same_length else math.inf
    return facts_of(
        [] if phase <= PHASE_TOLERANCE else [_name_rope(ours, theirs, model)],
        phase_difference=phase if same_length else None,
        tolerance=PHASE_TOLERANCE,
        at_position=model.max_positions,
        frequencies=ours.tolist(),
    )


def check_logits(ours: Outputs, theirs: Outputs, batches: list[Probe]) -> Facts:
    """The same prompts give the same logits on both sides.

    The prediction of a position may differ only where the two best tokens are closer than the tolerance.

    Args:
        ours: Megatron's.
        theirs: transformers'.
        batches: the prompts.
    """
    pairs = list(zip(ours.logits, theirs.logits, strict=True))
    scale = max(1.0, *(float(a.abs().max()) for a, _ in pairs))
    tolerance = LOGIT_TOLERANCE * scale
    worst = [float((a - b).abs().max()) for a, b in pairs]
    divergence = [_kl(a, b) for a, b in pairs]
    same = [a.argmax(-1) == b.argmax(-1) for a, b in pairs]
    decided = [_gap(a) > 2 * tolerance for a, _ in pairs]
    contradicted = [int((d & ~s).sum()) for s, d in zip(same, decided, strict=True)]
    prompts = [(len(row), probe.positions[len(row) - 1]) for probe in batches for row in probe.rows]
    wrong = [
        index
        for index, (_, kl, against) in enumerate(zip(worst, divergence, contradicted, strict=True))
        if not (worst[index] <= tolerance and kl <= KL_TOLERANCE and not against)
    ]
    faults = []
    if wrong:
        most = max(wrong, key=lambda index: (math.isnan(worst[index]), worst[index]))
        length, last = prompts[most]
        faults.append(
            f"{len(wrong)} of {len(prompts)} prompts give other logits, most of all the one of {length} tokens up to "
            f"position {last}: by {worst[most]:.3g} ({tolerance:.3g} allowed), KL {divergence[most]:.3g} "
            f"({KL_TOLERANCE} allowed), {contradicted[most]} clear predictions differ{_parting(ours, theirs)}"
        )
    positions = sum(len(s) for s in same)
    return facts_of(
        faults,
        max_abs_difference=_largest(worst),
        tolerance=tolerance,
        largest_logit=scale,
        kl=_largest(divergence),
        kl_tolerance=KL_TOLERANCE,
        greedy_match=sum(int(s.sum()) for s in same) / positions,
        contradicted_predictions=sum(contradicted),
        positions=positions,
        prompt_lengths=[length for length, _ in prompts],
        last_positions=[last for _, last in prompts],
        reference=[_sample(a) for a in ours.logits],
    )


def check_reference(theirs: Outputs, reference: list[list[float]]) -> Facts:
    """Logits of a directory against those its certificate recorded from the trainer.

    The tolerance is this version's own, not the one recorded.
    """
    recorded = [value for sample in reference for value in sample]
    now = [value for tensor in theirs.logits for value in _sample(tensor)]
    same_number = len(now) == len(recorded)
    worst = _largest([abs(a - b) for a, b in zip(now, recorded, strict=True)]) if same_number else math.inf
    tolerance = LOGIT_TOLERANCE * max(1.0, *(float(tensor.abs().max()) for tensor in theirs.logits))
    faults = [] if worst <= tolerance else [f"logits differ by {worst:.3g} from the recorded ({tolerance:.3g} allowed)"]
    return facts_of(faults, max_abs_difference=worst if same_number else None, tolerance=tolerance)


def _parting(ours: Outputs, theirs: Outputs) -> str:
    """The first part of the model whose output differs by more than rounding: where a wrong mapping is to be sought."""
    for index, (one, other) in enumerate(zip(ours.parts, theirs.parts, strict=False)):
        if not float((one - other).abs().max()) <= _PART_TOLERANCE * float(one.abs().max()):
            return f"; the sides part at the {('attention', 'MLP')[index % 2]} of layer {index // 2}"
    return "; the layers agree"


def _name_rope(ours: Tensor, theirs: Tensor, model: ModelConfig) -> str:
    """Which setting of RoPE, changed, makes the frequencies that were found."""
    if ours.shape != theirs.shape:
        return f"RoPE rotates {2 * len(theirs)} dimensions of a head instead of {2 * len(ours)}"
    plain = [model.rope_theta ** (-2 * k / model.dim) for k in range(model.dim // 2)]
    found = theirs.tolist()
    if model.rope_scaling is not None and _close(found, plain):
        return f"the RoPE scaling by factor {model.rope_scaling.factor} is lost"
    if len(found) > 1 and not _close(found[:2], ours.tolist()[:2]):
        theta = found[1] ** (-model.dim / 2) if 0 < found[1] < 1 else math.nan
        return f"RoPE theta is {theta:.6g} instead of {model.rope_theta:.6g}"
    # The slowest frequency is divided by the whole factor.
    factor = plain[-1] / found[-1] if found[-1] else math.inf
    wanted = f"{model.rope_scaling.factor:g}" if model.rope_scaling else "none"
    return f"the RoPE scaling factor is {factor:.6g} instead of {wanted}"


def _close(some: list[float], others: list[float]) -> bool:
    return all(math.isclose(a, b, rel_tol=_FREQUENCY_TOLERANCE) for a, b in zip(some, others, strict=True))


def _largest(values: list[float]) -> float:
    """The largest value; NaN if any is, so that no comparison with a limit passes."""
    return math.nan if any(math.isnan(value) for value in values) else max(values)


def _kl(ours: Tensor, theirs: Tensor) -> float:
    """Largest KL(ours || theirs) of a position, in nats; rounding may bring it just below 0."""
    from torch.nn import functional

    worst = []
    for one, other in zip(ours, theirs, strict=True):  # by position: in float64, all at once would be gigabytes
        p, q = functional.log_softmax(one.double(), -1), functional.log_softmax(other.double(), -1)
        worst.append(float((p.exp() * (p - q)).sum().clamp(min=0)))
    return _largest(worst)


def _gap(logits: Tensor) -> Tensor:
    """Distance of the best logit to the second best, by position."""
    best = logits.topk(2, dim=-1).values
    return best[:, 0] - best[:, 1]


def _sample(logits: Tensor) -> list[float]:
    """Sixteen logits of a prompt's last position, evenly spread over the vocabulary."""
    last = logits[-1]
    return [float(value) for value in last[:: max(1, len(last) // 16)][:16]]
