"""The stand-in engine's model: evaluation's own generation, with weights that OpenRLHF may overwrite."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Response:
    """One generated continuation.

    Args:
        tokens: its ids, the end-of-text token included where it ended by itself.
        stopped: whether it did.
    """

    tokens: list[int]
    stopped: bool


class Decoder:
    """Draws responses in fp32, as `octo eval` does.

    Args:
        model: Hugging Face directory.
        seed: of all draws; call number n of `generate` uses seed + n.
    """

    def __init__(self, model: str, seed: int) -> None:
        import torch

        from megatron_octo.evaluate.generate import TransformersEngine

        self._engine = TransformersEngine(Path(model), device="cpu", batch_size=_BATCH)
        self._weights = self._engine.model.state_dict()
        self._seed = seed
        self.dtype = torch.float32

    def load_weights(self, weights: list[tuple[str, Any]]) -> None:
        """Overwrite parameters by name; what OpenRLHF's worker extension calls."""
        for name, tensor in weights:
            self._weights[name].copy_(tensor)

    def generate(self, prompts: list[list[int]], most_tokens: int, temperature: float) -> list[Response]:
        """Draw one response for each prompt of token ids."""
        self._seed += 1
        found = self._engine.generate(prompts, most_tokens, temperature, self._seed)
        end = self._engine.ends[0]
        return [Response([*one.token_ids, end] if one.stopped else list(one.token_ids), one.stopped) for one in found]


_BATCH = 128
"""Responses decoded together; a rollout of 16 prompts x 8 samples."""
