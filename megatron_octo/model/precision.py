"""Which layers compute in BF16 although the run is in FP8: the one place that moves a layer, for good or for a while.

TransformerEngine decides per call whether a layer is in FP8, by a context around it; an inner context that switches
FP8 off holds inside an outer one that switches it on, for every recipe. A layer moved to BF16 multiplies in BF16; if
its weights are kept in FP8 (`fp8.parameters`) they stay rounded as they are, and are dequantised for the product.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch

Switch = Callable[[], AbstractContextManager[Any]]


class Precision:
    """The layers of this rank by their number in the whole model, and which of them are in BF16.

    Args:
        models: this rank's model chunks without wrappers; their layers are given a forward of ours, once.
        switch: makes a context in which a layer computes in BF16.
    """

    def __init__(self, models: list[torch.nn.Module], switch: Switch) -> None:
        layers = [layer for model in models for layer in model.decoder.layers]
        self.layers: dict[int, torch.nn.Module] = {layer.layer_number - 1: layer for layer in layers}
        self._switch, self._models = switch, models
        self._bf16: set[int] = set()
        for number, layer in self.layers.items():
            layer.forward = self._guarded(number, layer.forward)

    def keep_in_bf16(self, numbers: Iterable[int]) -> None:
        """Compute these layers, and no others, in BF16 from now on; numbers of other ranks' layers do no harm."""
        self._bf16 = set(numbers)

    @contextmanager
    def replay(self, numbers: Iterable[int]) -> Iterator[None]:
        """Compute these layers in BF16 inside, forward and backward, and leave no trace of what was computed.

        The delayed recipe remembers maxima of what it saw and changes its scales at the end of every pass: both are
        put back, so a pass that is only looked at does not change those that count. The other recipes remember
        nothing but copies of weights, which are made anew in each step.
        """
        before, scales = self._bf16, _scales(self._models)
        kept = [scale.clone() for scale in scales]
        self._bf16 = before | set(numbers)
        try:
            yield
        finally:
            self._bf16 = before
            for scale, value in zip(scales, kept, strict=True):
                scale.copy_(value)

    def _guarded(self, number: int, forward: Callable[..., Any]) -> Callable[..., Any]:
        def guarded(*arguments: Any, **options: Any) -> Any:
            if number not in self._bf16:
                return forward(*arguments, **options)
            with self._switch():
                return forward(*arguments, **options)

        return guarded


def engine_switch() -> AbstractContextManager[Any]:
    """TransformerEngine's context without FP8."""
    from transformer_engine.pytorch import autocast

    return autocast(enabled=False)


def _scales(models: list[torch.nn.Module]) -> list[torch.Tensor]:
    """What the delayed recipe remembers of each matrix product, forward and backward: scales and past maxima."""
    metas = [getattr(module, "fp8_meta", None) or {} for model in models for module in model.modules()]
    states = [meta.get(key) for meta in metas for key in ("scaling_fwd", "scaling_bwd")]
    tensors = [getattr(state, name, None) for state in states for name in ("scale", "amax_history")]
    return [tensor for tensor in tensors if torch.is_tensor(tensor)]
