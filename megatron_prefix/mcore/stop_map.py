"""Tokens that change places in the teacher's distribution."""

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from megatron_prefix.mcore.hf_map import HfModel
from megatron_prefix.mcore.weights import HfReader


@torch.no_grad()
def exchange_rows(weight: Tensor, teacher: HfModel, rank: int, mapping: Mapping[int, int]) -> None:
    """Exchanges, for each pair of ``mapping``, two tokens' rows of a teacher's LM head.

    ``weight`` [V/tp, d_t] is shard ``rank`` of it, from ``teacher``'s folder; it is changed in
    place. A token's logit is its row's, so the teacher then gives the one token the probability
    that it had given the other; its distribution stays one. The two may lie in two shards.
    """
    name = "model.embed_tokens.weight" if teacher.shape.tied else "lm_head.weight"
    reader, first = HfReader(Path(teacher.path)), rank * weight.shape[0]
    for pair in mapping.items():
        for place, source in (pair, pair[::-1]):
            if first <= place < first + weight.shape[0]:
                weight[place - first].copy_(reader.rows(name, source, source + 1)[0])
