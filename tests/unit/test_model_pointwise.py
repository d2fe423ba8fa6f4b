"""Operations with backward passes of their own, against the plain expressions they stand for."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch.nn import functional

from megatron_octo.model import pointwise

ROWS, BATCH, HEADS, DIM = 5, 2, 3, 8


def plain_norm(hidden: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    return weight * functional.rms_norm(hidden.float(), (hidden.shape[-1],), eps=1e-5).to(hidden.dtype)


def plain_rotation(heads: torch.Tensor, angles: torch.Tensor) -> torch.Tensor:
    first, second = heads.chunk(2, dim=-1)
    return heads * angles.cos().to(heads.dtype) + torch.cat([-second, first], dim=-1) * angles.sin().to(heads.dtype)


def plain_swiglu(both: torch.Tensor) -> torch.Tensor:
    gate, up = both.chunk(2, dim=-1)
    return functional.silu(gate) * up


def angles() -> torch.Tensor:
    half = torch.rand(ROWS, 1, 1, DIM // 2) * 40
    return torch.cat([half, half], dim=-1)


def case(name: str) -> tuple[Callable[..., torch.Tensor], Callable[..., torch.Tensor], list[torch.Tensor], list]:
    """Ours, the plain one, what is differentiated, what is not."""
    torch.manual_seed(3)
    if name == "norm":
        inputs = [torch.randn(ROWS, BATCH, DIM) * torch.logspace(-4, 3, ROWS)[:, None, None], torch.randn(DIM)]
        return lambda x, w: pointwise.rms_norm(x, w, 1e-5), plain_norm, inputs, []
    if name == "rotation":
        return pointwise.rotate, plain_rotation, [torch.randn(ROWS, BATCH, HEADS, DIM)], [angles()]
    if name == "rotation of a part of a tensor":

        def part(rotation: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
            return lambda whole, turns: rotation(whole[..., 1 : 1 + DIM], turns)

        inputs = [torch.randn(ROWS, BATCH, HEADS, DIM + 5)]
        return part(pointwise.rotate), part(plain_rotation), inputs, [angles()]
    return pointwise.swiglu, plain_swiglu, [torch.randn(ROWS, BATCH, 2 * DIM) * 4], []


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ["norm", "rotation", "rotation of a part of a tensor", "swiglu"])
def test_same_values_and_gradients_as_the_plain_expression(name: str, dtype: torch.dtype) -> None:
    ours, plain, tensors, fixed = case(name)
    results = []
    for function in (ours, plain):
        inputs = [tensor.to(dtype, copy=True).requires_grad_() for tensor in tensors]
        result = function(*inputs, *fixed)
        slope = torch.linspace(-1, 2, result.numel()).view_as(result).to(dtype)
        result.backward(slope)
        results.append([result, *(tensor.grad for tensor in inputs)])
    for found, expected in zip(*results, strict=True):
        assert found.dtype == dtype and expected.abs().max() > 0.1
        torch.testing.assert_close(found, expected, **({} if dtype == torch.float32 else {"rtol": 2e-2, "atol": 2e-2}))


@pytest.mark.parametrize("name", ["rotation", "swiglu"])  # the norm is computed in fp32, too coarse for differences
def test_gradients_are_those_of_the_values(name: str) -> None:
    ours, _, tensors, fixed = case(name)
    inputs = [tensor[:2].double().requires_grad_() for tensor in tensors]
    assert torch.autograd.gradcheck(lambda *given: ours(*given, *(one[:2].double() for one in fixed)), inputs)


def test_a_rotation_keeps_lengths_and_turns_back() -> None:
    heads, turns = torch.randn(ROWS, BATCH, HEADS, DIM), angles()
    turned = pointwise.rotate(heads, turns)
    torch.testing.assert_close(turned.norm(dim=-1), heads.norm(dim=-1))
    torch.testing.assert_close(pointwise.rotate(turned, -turns), heads)
    assert (turned - heads).abs().max() > 0.5
