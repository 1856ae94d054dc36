"""What a server is compared with: transformers, one prompt at a time."""

import torch
from transformers import PreTrainedModel

from megatron_prefix.types import Prompt, Rollout


def greedy_rollout(model: PreTrainedModel, prompt: Prompt, most: int, end: int) -> Rollout:
    """At most ``most`` tokens, the end token included; its log-probabilities are not computed."""
    ids = torch.tensor([prompt.input_ids])
    whole = model.generate(ids, max_new_tokens=most, do_sample=False, eos_token_id=end)
    answer = tuple(whole[0, ids.shape[1] :].tolist())
    reason = "stop" if answer[-1] == end else "length"
    return Rollout(prompt.input_ids, answer, (0.0,) * len(answer), reason, 0, prompt.index)
