"""Norm, rotation and gated activation with backward passes of their own: few passes over memory, few temporaries.

On a CPU these cost as much as small matrix products when autograd records them operation by operation. Each function
is the same mathematics as the plain expression in its docstring, and is tested against it.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.autograd.function import once_differentiable
from torch.nn import functional


def rms_norm(hidden: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """weight * (hidden / sqrt(mean(hidden^2) + eps)), the quotient computed in fp32.

    Args:
        hidden: [..., h], normalised over h.
        weight: [h].
        eps: added to the mean square.

    Returns:
        [..., h] in the type of `hidden`, as `weight` is.
    """
    return _RMSNorm.apply(hidden, weight, eps)


def rotate(heads: torch.Tensor, angles: torch.Tensor) -> torch.Tensor:
    """RoPE: heads * cos + [-second half, first half] * sin.

    Args:
        heads: [s, b, n, d].
        angles: [s, 1, 1, d], both halves alike, as megatron-core makes them.

    Returns:
        [s, b, n, d], contiguous.
    """
    half = angles.shape[-1] // 2
    sin = angles.sin()
    sin[..., :half].neg_()
    return _Rotate.apply(heads, angles.cos().to(heads.dtype), sin.to(heads.dtype))


def swiglu(gate_and_up: torch.Tensor) -> torch.Tensor:
    """silu(gate) * up.

    Args:
        gate_and_up: [..., 2 f], gate first.

    Returns:
        [..., f].
    """
    return _SwiGLU.apply(gate_and_up)


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
        exact = hidden.float()
        scale = torch.linalg.vector_norm(exact, dim=-1, keepdim=True)
        scale = scale.square_().div_(hidden.shape[-1]).add_(eps).rsqrt_()
        ctx.save_for_backward(hidden, weight, scale)
        return (exact * scale).to(hidden.dtype).mul_(weight)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, None]:
        hidden, weight, scale = ctx.saved_tensors
        exact, weight_exact = gradient.float(), weight.float()
        normed = hidden.float() * scale
        product = exact * normed
        to_weight = product.flatten(0, -2).sum(0).to(weight.dtype)
        mean = (product @ weight_exact).div_(hidden.shape[-1]).unsqueeze(-1)
        to_hidden = torch.addcmul(exact * weight_exact, normed, mean, value=-1).mul_(scale)
        return to_hidden.to(hidden.dtype), to_weight, None


class _Rotate(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, heads: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(cos, sin)
        return _turn(heads, cos, sin)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        cos, sin = ctx.saved_tensors
        return _turn(gradient, cos, -sin), None, None


def _turn(heads: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """The halves of a head are the two coordinates of its points; `sin` carries the sign of each."""
    return heads.roll(heads.shape[-1] // 2, -1).mul_(sin).addcmul_(heads, cos)


class _SwiGLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gate_and_up: torch.Tensor) -> torch.Tensor:
        gate, up = gate_and_up.chunk(2, dim=-1)
        activated = functional.silu(gate)
        ctx.save_for_backward(gate_and_up, activated)
        return activated * up

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: torch.Tensor) -> torch.Tensor:
        gate_and_up, activated = ctx.saved_tensors
        gate, up = gate_and_up.chunk(2, dim=-1)
        both = torch.empty_like(gate_and_up)
        to_gate, to_up = both.chunk(2, dim=-1)
        torch.mul(gradient, activated, out=to_up)
        torch.ops.aten.silu_backward.grad_input(gradient * up, gate, grad_input=to_gate)
        return both
