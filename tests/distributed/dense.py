"""The reference of what ranks compute: both models whole, by transformers, in fp64."""

from dataclasses import dataclass
from pathlib import Path
from typing import Self

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

from megatron_prefix.types import Rollout


@dataclass(frozen=True)
class Dense:
    student: PreTrainedModel
    teacher: PreTrainedModel

    @classmethod
    def load(cls, folders: tuple[Path, Path], dtype: torch.dtype = torch.float64) -> Self:
        return cls(*(AutoModelForCausalLM.from_pretrained(each, dtype=dtype) for each in folders))

    def logprobs(self, rollout: Rollout) -> tuple[Tensor, Tensor]:
        """[L, V] of the student's and the teacher's distributions over a rollout's tokens; the
        teacher's has no gradient, and is after its own prompt where it has one."""
        student = _logprobs(self.student, rollout.prompt_ids, rollout)
        with torch.no_grad():
            own = rollout.teacher_prompt_ids or rollout.prompt_ids
            return student, _logprobs(self.teacher, own, rollout)

    def kl(self, rollout: Rollout) -> Tensor:
        """KL(student||teacher) [L] of a rollout's tokens."""
        return reverse_kl(*self.logprobs(rollout))


def reverse_kl(log_p: Tensor, log_q: Tensor) -> Tensor:
    """KL(p||q) [L] out of log-probabilities [L, V]."""
    return (log_p.exp() * (log_p - log_q)).sum(-1)


def _logprobs(model: PreTrainedModel, prompt_ids: tuple[int, ...], rollout: Rollout) -> Tensor:
    ids = torch.tensor([(*prompt_ids, *rollout.prefix_ids)[:-1]])
    return model(ids).logits[0, len(prompt_ids) - 1 :].log_softmax(-1)
