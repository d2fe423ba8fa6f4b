"""FP8: which recipe of TransformerEngine, what stays in BF16, and the sentinel that watches it."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from megatron_octo.config.base import Strict


class SentinelConfig(Strict):
    """Every few steps one micro-batch is computed again in BF16 and compared with FP8.

    The first `warmup` comparisons make the envelope. Later ones outside it are strikes; `patience` strikes in a row
    lead to the action.
    """

    every: int = Field(default=100, gt=0, description="steps between comparisons")
    warmup: int = Field(default=8, gt=0, description="comparisons that record the envelope")
    loss_tolerance: float = Field(default=0.01, gt=0, description="relative loss difference never allowed")
    grad_tolerance: float = Field(default=0.25, gt=0, description="same for a layer's gradient norm")
    sigma: float = Field(default=6.0, gt=0, description="standard deviations of the envelope that are normal")
    patience: int = Field(default=3, gt=0)
    action: Literal["warn", "layer", "run"] = Field(
        default="layer", description="move nothing, the one layer that explains it (else the run), or the run to BF16"
    )


class Fp8Config(Strict):
    """TransformerEngine's FP8 recipes for the layers' matrix products; everything else stays in BF16."""

    recipe: Literal["delayed", "tensorwise", "blockwise"] = Field(
        default="tensorwise", description="scales from past maxima, from the tensor itself, or from its blocks"
    )
    format: Literal["hybrid", "e4m3"] = Field(default="hybrid", description="hybrid: gradients in e5m2")
    margin: int = Field(default=0, ge=0, description="delayed only: scales are lowered by 2 to this power")
    amax_history: int = Field(default=1024, gt=0, description="delayed only: steps of maxima that are kept")
    amax: Literal["max", "most_recent"] = Field(default="max", description="delayed only: which of them counts")
    wgrad: bool = Field(default=True, description="weight gradients in FP8 too; TransformerEngine 2 knows no other way")
    bf16_first_layers: int = Field(default=0, ge=0, description="layers at the start that stay in BF16; not delayed")
    bf16_last_layers: int = Field(default=0, ge=0, description="layers at the end that stay in BF16; not delayed")
    parameters: bool = Field(default=False, description="weights are kept, and gathered, in FP8")
    attention: bool = Field(default=False, description="attention in FP8 too; not blockwise")
    sentinel: SentinelConfig | None = None
