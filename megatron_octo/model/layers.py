"""Layers of the local (non-TransformerEngine) spec, and the mask over padded vocabulary rows.

Dimensions: s sequence, b batch, n heads, g KV groups, d head dimension, h hidden, v vocabulary.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from megatron.core.transformer import attention
from torch.nn import functional

from megatron_octo.model import pointwise

if TYPE_CHECKING:
    from megatron.core.transformer import TransformerConfig


class RMSNorm(torch.nn.Module):
    """Root-mean-square norm, computed in fp32.

    megatron-core's own torch norm refuses sequence parallelism; this one marks its weight so that
    the gradient is summed over the tensor-parallel group. Also the norm of query and key heads, whose gradients
    megatron-core sums over that group by their names.

    Args:
        config: megatron-core's configuration.
        hidden_size: width h of the input [..., h]; the head dimension for queries and keys.
        eps: added to the mean square.
    """

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float = 1e-5) -> None:
        super().__init__()
        self.eps = eps
        self.weight = torch.nn.Parameter(torch.ones(hidden_size, dtype=config.params_dtype))
        self.weight.sequence_parallel = config.sequence_parallel

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        """Normalise [..., h] over h."""
        return pointwise.rms_norm(hidden, self.weight, self.eps)


class SelfAttention(attention.SelfAttention):
    """megatron-core's, its forward pass for training alone: no key-value cache, no packed sequences."""

    def forward(
        self, hidden: torch.Tensor, attention_mask: None, *, rotary_pos_emb: torch.Tensor, **others: Any
    ) -> tuple[torch.Tensor, None]:
        """Attend.

        Args:
            hidden: [s, b, h]; under sequence parallelism this rank's part of s.
            attention_mask: must be None; the mask is causal.
            rotary_pos_emb: [s, 1, 1, d], angles of this rank's positions.

        Returns:
            ([s, b, h], no bias).

        Raises:
            ValueError: something is asked for that this pass would leave out.
        """
        asked = [name for name, value in others.items() if value is not None]
        if asked:
            raise ValueError(f"SelfAttention is for training: it takes no {', '.join(asked)}")
        query, key, value = self.get_query_key_value_tensors(hidden)
        heads = [pointwise.rotate(query, rotary_pos_emb), pointwise.rotate(key, rotary_pos_emb), value]
        if self.checkpoint_core_attention and self.training:
            attended = self._checkpointed_attention_forward(*heads, attention_mask)
        else:
            attended = self.core_attention(*heads, attention_mask)
        return self.linear_proj(attended)


class CausalAttention(torch.nn.Module):
    """Causal softmax(q k^T) v by torch's scaled dot product, with grouped KV heads.

    Under context parallelism each rank holds two slices of the sequence (megatron-core's balanced
    order: slice r and slice 2 CP - 1 - r); keys and values are gathered, their gradients reduce-scattered.
    """

    def __init__(self, config: TransformerConfig, *, pg_collection: Any, softmax_scale: float | None, **_: Any) -> None:
        super().__init__()
        self.scale = softmax_scale
        self.context_group = pg_collection.cp
        self.width = config.kv_channels

    def forward(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, attention_mask: torch.Tensor | None, **_: Any
    ) -> torch.Tensor:
        """Attend.

        Args:
            query: [s, b, n, d], this rank's part of the sequence.
            key: [s, b, g, d].
            value: [s, b, g, d].
            attention_mask: must be None; the mask is causal.

        Returns:
            [s, b, n d].
        """
        if attention_mask is not None:
            raise ValueError("CausalAttention takes no mask: attention is causal over the whole sequence")
        if self.context_group.size() == 1:
            attended = self._attend(query, key, value, None)
        else:
            attended = self._attend_sliced(query, *self._gather(key, value))
        return attended.flatten(2)

    def _attend(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: torch.Tensor | None
    ) -> torch.Tensor:
        heads_first = [tensor.permute(1, 2, 0, 3) for tensor in (query, key, value)]
        attended = functional.scaled_dot_product_attention(
            *heads_first, attn_mask=mask, is_causal=mask is None, scale=self.scale, enable_gqa=True
        )
        return attended.permute(2, 0, 1, 3)

    def _gather(self, key: torch.Tensor, value: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """[s, b, g, d] of this rank -> the whole sequence in its true order."""
        from megatron.core.tensor_parallel import gather_from_sequence_parallel_region

        both = torch.stack([key, value], dim=1)
        gathered = gather_from_sequence_parallel_region(both, group=self.context_group)
        slices = gathered.chunk(2 * self.context_group.size())
        # Rank r contributed slices 2r and 2r + 1, which are r-th from the front and from the back.
        ordered = torch.cat(slices[0::2] + slices[1::2][::-1])
        return ordered[:, 0], ordered[:, 1]

    def _attend_sliced(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        rank, size = self.context_group.rank(), self.context_group.size()
        length = query.shape[0] // 2
        attended = []
        for part, position in zip(query.chunk(2), (rank, 2 * size - 1 - rank), strict=True):
            end = (position + 1) * length
            mask = torch.ones(length, end, dtype=torch.bool, device=query.device).tril(end - length)
            attended.append(self._attend(part, key[:end], value[:end], mask))
        return torch.cat(attended)


def mask_padding(output_layer: torch.nn.Module, vocabulary: int) -> None:
    """Keep padded vocabulary rows out of the softmax: their logits become a very large negative number.

    So the loss equals that of the unpadded model, whatever the padding, and padded rows get no gradient.
    Works on this rank's columns of [s, b, v / TP] and on gathered logits [s, b, v].

    Args:
        output_layer: megatron-core's column-parallel output layer.
        vocabulary: rows that are real tokens.
    """
    rank = output_layer.tp_group.rank()
    share = output_layer.output_size_per_partition

    def mask(_layer: torch.nn.Module, _inputs: Any, output: tuple[torch.Tensor, Any]) -> tuple[torch.Tensor, Any]:
        logits, bias = output
        first = rank * share if logits.shape[-1] == share else 0
        real = max(vocabulary - first, 0)
        if real < logits.shape[-1]:
            # Not infinity: a rank whose columns are all padding takes differences of its own maximum.
            logits[..., real:] = torch.finfo(logits.dtype).min / 2
        return logits, bias

    output_layer.register_forward_hook(mask)
