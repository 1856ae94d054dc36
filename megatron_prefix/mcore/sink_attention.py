"""Attention with a sink per head for machines without Transformer Engine.

A sink is a learned logit that takes part in the softmax of every query and has no value (GPT-OSS,
arXiv 2508.10925, section 2.3). Legend: B sequences, S the longest, h heads, g key-value groups,
d head size; heads are this rank's.
"""

from typing import Any

import torch
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.utils import (
    is_layer_window_attention,
    make_sharded_tensors_for_checkpoint,
)
from torch import Tensor, nn

from megatron_prefix.mcore.local_spec import PackedAttention


class SinkAttention(PackedAttention):
    """Causal, in some layers within a window of the last tokens; weights are taken in fp32."""

    def __init__(
        self,
        config: TransformerConfig,
        layer_number: int,
        *args: Any,
        pg_collection: ProcessGroupCollection,
        **kwargs: Any,
    ) -> None:
        super().__init__(config, layer_number, *args, pg_collection=pg_collection, **kwargs)
        self._tp_group = pg_collection.tp
        heads = config.num_attention_heads // self._tp_group.size()
        self.softmax_offset = nn.Parameter(torch.zeros(heads, dtype=config.params_dtype))
        windowed = is_layer_window_attention(
            config.window_size, config.window_attn_skip_freq, layer_number
        )
        self._before = config.window_size[0] if windowed and config.window_size else -1

    def attend(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """query [B, h, S, d], key and value [B, g, S, d] -> [B, h, S, d]."""
        groups, length = key.shape[1], key.shape[2]
        grouped = query.unflatten(1, (groups, -1))
        scale = self.softmax_scale or query.shape[-1] ** -0.5
        scores = grouped @ key[:, :, None].mT * scale
        scores = scores.masked_fill(self._hidden(length, scores.device), -torch.inf)
        sinks = self.softmax_offset.view(1, groups, -1, 1, 1).expand(*scores.shape[:-1], 1)
        weights = torch.cat([scores, sinks], dim=-1).softmax(-1, dtype=torch.float32)
        return (weights[..., :-1].type_as(value) @ value[:, :, None]).flatten(1, 2)

    def _hidden(self, length: int, device: torch.device) -> Tensor:
        """bool [S, S]: keys after a query, and those before its window."""
        steps = torch.arange(length, device=device)
        back = steps[:, None] - steps
        return (back < 0) | (back > self._before) if self._before >= 0 else back < 0

    def sharded_state_dict(
        self, prefix: str = "", sharded_offsets: Any = (), metadata: Any = None
    ) -> Any:
        """As Transformer Engine's module says it: heads are cut over tensor-parallel ranks."""
        return make_sharded_tensors_for_checkpoint(
            self.state_dict(prefix="", keep_vars=True),
            prefix,
            {"softmax_offset": 0},
            sharded_offsets,
            tp_group=self._tp_group,
            dp_cp_group=metadata["dp_cp_group"],
        )
