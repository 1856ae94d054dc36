"""Rotary angles of packed tokens for machines without Transformer Engine."""

from typing import Any

from megatron.core.models.common.embeddings.rotary_pos_embedding import RotaryEmbedding
from torch import Tensor


class PackedRotaryEmbedding(RotaryEmbedding):
    """Rotary angles of the packed tokens themselves, one row a token.

    Megatron rotates packed sequences one by one in Python unless the angles already run along the
    pack; ``position_ids`` is set before each forward: by ``model.forward_trunk``, and where a
    layer makes its own angles, by the layer (``LocalLatentAttention``).
    """

    position_ids: Tensor | None = None

    def forward(
        self, max_seq_len: int, offset: int = 0, packed_seq: bool = False, cp_group: Any = None
    ) -> Tensor:
        angles = super().forward(max_seq_len, offset, packed_seq, cp_group)
        if not packed_seq:
            return angles
        assert self.position_ids is not None, "position_ids were not set before a packed forward"
        return angles[self.position_ids]
