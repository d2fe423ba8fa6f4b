"""The layout: how a run is split over processes, what overlaps, and what is recomputed."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from megatron_octo.config.base import Strict


class ParallelConfig(Strict):
    """How many ways each dimension is split; data parallelism takes what is left of the processes."""

    tensor: int = Field(default=1, gt=0)
    pipeline: int = Field(default=1, gt=0)
    virtual_pipeline: int | None = Field(default=None, gt=1, description="model chunks per pipeline stage")
    context: int = Field(default=1, gt=0)
    data: int = Field(default=1, gt=0)
    sequence: bool = Field(default=False, description="sequence parallelism inside the tensor-parallel group")
    distributed_optimizer: bool = True
    overlap_grad_reduce: bool = Field(default=False, description="reduce gradients while the backward pass goes on")
    overlap_param_gather: bool = Field(
        default=False, description="gather updated weights while the next forward pass goes on"
    )
    tp_comm_overlap: bool = Field(
        default=False, description="TransformerEngine overlaps tensor-parallel messages with matrix products"
    )

    @property
    def processes(self) -> int:
        """World size of the layout."""
        return self.tensor * self.pipeline * self.context * self.data

    @property
    def label(self) -> str:
        """Short name for people: 'TP2 PP2 SP'."""
        sizes = (("TP", self.tensor), ("PP", self.pipeline), ("CP", self.context), ("DP", self.data))
        parts = [f"{name}{size}" for name, size in sizes if size > 1]
        if self.virtual_pipeline:
            parts.append(f"VPP{self.virtual_pipeline}")
        return " ".join(parts + ["SP"] * self.sequence) or "single process"

    @model_validator(mode="after")
    def _sequence_needs_tensor(self) -> ParallelConfig:
        if self.sequence and self.tensor == 1:
            raise ValueError("sequence: true needs tensor > 1: it splits what the tensor-parallel group replicates")
        if self.virtual_pipeline and self.pipeline == 1:
            raise ValueError("virtual_pipeline needs pipeline > 1")
        return self


class RecomputeConfig(Strict):
    """Activations thrown away in the forward pass and computed again in the backward pass: memory for time.

    Losses do not change: the same operations run again on the same values.
    """

    kind: Literal["none", "selective", "full"] = Field(
        default="none", description="selective: the attention core only; full: whole layers"
    )
    method: Literal["uniform", "block"] = Field(
        default="uniform", description="full only; uniform: groups of `layers`; block: the first `layers` of a stage"
    )
    layers: int = Field(default=1, gt=0, description="full only; layers of a group, or of the block")


NO_RECOMPUTE = RecomputeConfig()
