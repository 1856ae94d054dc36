"""The loss under Megatron's own DDP: what the forward put into main_grad is reduced, once."""

from dataclasses import dataclass

import pytest
import torch
import torch.distributed as dist
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
from megatron.core.transformer import TransformerConfig
from torch import Tensor

from megatron_prefix.layout import Layout
from megatron_prefix.loss import vocab_parallel_kl
from megatron_prefix.mcore.groups import build_groups, initialize_megatron
from tests.distributed.ranks import run_ranks
from tests.unit.loss.reference import Case, make_case, relative_error

RANKS = 2
MICROBATCHES = 2
REAL = 199  # of 203 rows
TOKENS = torch.arange(37) % 11


class Student(torch.nn.Module):
    """An embedding, a nonlinearity and a head, which is the embedding itself where tied."""

    def __init__(self, weight: Tensor, tied: bool) -> None:
        super().__init__()
        self.embedding = torch.nn.Parameter(weight.clone())
        if tied:
            # As LanguageModule.setup_embeddings_and_output_layer does with one pipeline stage.
            self.embedding.zero_out_wgrad = True
        self.head = self.embedding if tied else torch.nn.Parameter(weight.flip(0).clone())

    def forward(self, case: Case, divergence: str) -> Tensor:
        hidden = torch.nn.functional.embedding(TOKENS, self.embedding).tanh()
        heads = hidden, self.head, *case.inputs[2:]
        loss, _ = vocab_parallel_kl(*heads, divergence, vocab_size=REAL, chunk_size=10)
        return loss


@dataclass(frozen=True)
class Settings:
    tied: bool
    overlap: bool
    divergence: str = "reverse_kl"


def microbatch(rank: int, index: int) -> Case:
    return make_case(seed=10 * rank + index)


def gradients(settings: Settings) -> dict[str, Tensor]:
    """What the optimizer would see after one step's microbatches."""
    initialize_megatron(seed=1)
    groups = build_groups(Layout(tp=1, dp=RANKS, pp=1))
    config = TransformerConfig(
        num_layers=1, hidden_size=24, num_attention_heads=1, calculate_per_token_loss=True
    )
    ddp = DistributedDataParallel(
        config,
        DistributedDataParallelConfig(
            grad_reduce_in_fp32=True, overlap_grad_reduce=settings.overlap
        ),
        Student(make_case().student_weight, settings.tied),
        pg_collection=groups.pg,
    )
    ddp.zero_grad_buffer()
    for index in range(MICROBATCHES):
        case = microbatch(dist.get_rank(), index)
        if index < MICROBATCHES - 1:
            with ddp.no_sync():
                ddp(case, settings.divergence).backward()
        else:
            ddp(case, settings.divergence).backward()
    ddp.finish_grad_sync()
    return {name: value.main_grad.clone() for name, value in ddp.module.named_parameters()}


def reference(tied: bool) -> dict[str, Tensor]:
    """Dense fp64 autograd over all microbatches of all ranks."""
    start = make_case().student_weight.double()
    embedding = start.clone().requires_grad_()
    head = embedding if tied else start.flip(0).clone().requires_grad_()
    for rank in range(RANKS):
        for index in range(MICROBATCHES):
            case = microbatch(rank, index)
            student = (embedding[TOKENS].tanh() @ head[:REAL].T).log_softmax(-1)
            teacher = case.teacher_hidden.double() @ case.teacher_weight[:REAL].double().T
            kl = (student.exp() * (student - teacher.log_softmax(-1))).sum(-1)
            (kl * case.token_weight).sum().backward()
    names = {"embedding": embedding} if tied else {"embedding": embedding, "head": head}
    return {name: value.grad for name, value in names.items() if value.grad is not None}


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("overlap", [True, False])
def test_gradients_after_reduction(tied: bool, overlap: bool) -> None:
    expected = reference(tied)
    for rank in run_ranks(RANKS, gradients, Settings(tied, overlap)):
        assert rank.keys() == expected.keys()
        for name, gradient in rank.items():
            assert relative_error(gradient, expected[name]) < 2e-6, name
