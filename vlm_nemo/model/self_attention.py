"""Self-attention of a layer: products, the turn of rotary positions, core attention, product."""

from __future__ import annotations

from typing import Any

from megatron.core.transformer.attention import SelfAttention
from torch import Tensor

from vlm_nemo.model.cache import CachedStep
from vlm_nemo.model.rope import turn
from vlm_nemo.model.segments import Segments

IDLE = (
    "attention_output_gate",
    "fine_grained_activation_offloading",
    "flash_decode",
    "fused_single_qkv_rope",
    "no_rope_freq",
    "rotary_interleaved",
)
"""Fields of megatron's config that its own forward pass reads, and this one does not."""


class RotarySelfAttention(SelfAttention):
    """megatron's weights and products, with the forward pass that training and generation here need.

    megatron's own takes angles and makes their cosines and sines anew in every layer, for queries and for keys, and
    turns in six passes over memory. This one takes the row's table (rope.py).
    """

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: None = None,
        *,
        rotary_pos_emb: Tensor | None = None,
        packed_seq_params: Segments | CachedStep | Any = None,
        **_: Any,
    ) -> tuple[Tensor, Tensor | None]:
        """[T, B, D] (this rank's part of it under sequence parallelism) -> the same, and a bias that is not added yet.

        rotary_pos_emb: [T, B, 1, d]; None = positions do not turn.
        """
        q, k, v = self.get_query_key_value_tensors(hidden_states)
        if rotary_pos_emb is not None:
            q, k = turn(q, k, rotary_pos_emb)
        again = self.checkpoint_core_attention and self.training
        attend = self._checkpointed_attention_forward if again else self.core_attention
        return self.linear_proj(attend(q, k, v, None, packed_seq_params=packed_seq_params))
