"""SORT-CHAIN learnt with no server: the student's own forward samples its prefixes.

A CPU runs the same in the distributed tests. Legend: B prompts, L tokens of each answer, V
vocabulary.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_prefix.batch import pack, plan_microbatches
from megatron_prefix.config import Fp8Config, LossConfig, ModelConfig, OptimizerConfig
from megatron_prefix.mcore.fp8 import SEQUENCE_MULTIPLE
from megatron_prefix.mcore.model import MegatronModel
from megatron_prefix.mcore.optimizer import TrainableStudent, make_trainable
from megatron_prefix.mcore.schedule import run_schedule
from megatron_prefix.student import Objective, forward_backward
from megatron_prefix.tasks import sort_chain
from megatron_prefix.teacher import ColocatedTeacher, load_teacher_head
from megatron_prefix.types import PrefixBatch, Rollout
from tests.distributed.world import build

SHORT, EVERY = 9, 8  # the recipe of ``make quickstart``: every eighth step at full length
ROLLOUTS = 32
LEARNING_RATE = 1e-3


@dataclass(frozen=True)
class Lesson:
    """Models of the task on this rank, ready to step; in a world of one rank."""

    student: TrainableStudent
    teacher: ColocatedTeacher
    objective: Objective
    device: torch.device

    @classmethod
    def build(
        cls, device: torch.device, steps: int, params_dtype: str, fp8: Fp8Config | None = None
    ) -> "Lesson":
        learner, master = (
            build(
                ModelConfig(
                    str(sort_chain.model_folder(name)),
                    params_dtype=params_dtype,
                    fp8=(fp8 if owner == "student" else None) or Fp8Config(),
                ),
                1,
                owner=owner,
            )
            for owner, name in (("student", "student_a"), ("teacher", "teacher"))
        )
        head = load_teacher_head(learner, master.hf, master.config.params_dtype, device)
        optimizer = OptimizerConfig(
            lr=LEARNING_RATE, min_lr=0.1 * LEARNING_RATE, lr_warmup_steps=10
        )
        return cls(
            make_trainable(learner, optimizer, steps),
            ColocatedTeacher(master, learner.groups.layout, device),
            Objective(LossConfig(), head),
            device,
        )

    def step(self, rollouts: Sequence[Rollout]) -> float:
        """Of one microbatch; the loss before its update."""
        plan = plan_microbatches(rollouts, 1, multiple=SEQUENCE_MULTIPLE)
        batches = [pack(rollouts, plan, 0, self.device)]
        targets = self.teacher.targets(rollouts, plan)
        length = max(len(rollout.prefix_ids) for rollout in rollouts)
        sums = forward_backward(self.student, batches, targets, self.objective, length)
        assert self.student.update().updated
        return sums.loss


@torch.no_grad()
def sample(
    model: MegatronModel,
    prompts: Sequence[str],
    length: int,
    device: torch.device,
    generator: torch.Generator | None = None,
) -> list[Rollout]:
    """Answers of at most ``length`` tokens, at temperature 1, or greedy without a ``generator``.

    Every forward is of whole answers, later tokens zeros that causality hides: one shape.
    """
    ids = torch.zeros(len(prompts), length, dtype=torch.int64)
    logprobs = torch.zeros(len(prompts), length)
    for at in range(length):
        told = _next_logprobs(model, _rollouts(prompts, ids, logprobs), at, device)
        drawn = told.argmax(1) if generator is None else _draw(told, generator)
        ids[:, at] = drawn
        logprobs[:, at] = told.gather(1, drawn[:, None])[:, 0]
    return [_until_its_end(rollout) for rollout in _rollouts(prompts, ids, logprobs)]


def _draw(logprobs: Tensor, generator: torch.Generator) -> Tensor:
    return torch.multinomial(logprobs.exp(), 1, generator=generator)[:, 0]


def _rollouts(prompts: Sequence[str], ids: Tensor, logprobs: Tensor) -> list[Rollout]:
    rows = zip(prompts, ids.tolist(), logprobs.tolist(), strict=True)
    return [
        Rollout(sort_chain.encode(prompt), tuple(row), tuple(likely), "length", 0, index)
        for index, (prompt, row, likely) in enumerate(rows)
    ]


def _until_its_end(rollout: Rollout) -> Rollout:
    if sort_chain.EOS_ID not in rollout.prefix_ids:
        return rollout
    end = rollout.prefix_ids.index(sort_chain.EOS_ID) + 1
    told = rollout.prefix_ids[:end], rollout.rollout_logprobs[:end]
    return Rollout(rollout.prompt_ids, *told, "stop", 0, rollout.prompt_index)


def _next_logprobs(
    model: MegatronModel, rollouts: Sequence[Rollout], at: int, device: torch.device
) -> Tensor:
    """fp32 [B, V] on the host, of each answer's token ``at``."""
    vocabulary = model.hf.shape.vocab_size

    def of_last(batch: PrefixBatch, hidden: Tensor, head: Tensor | None) -> Tensor:
        assert head is not None
        last = hidden.unflatten(0, (len(rollouts), -1))[:, at]
        return (last.float() @ head[:vocabulary].float().T).log_softmax(-1)

    plan = plan_microbatches(rollouts, 1, multiple=SEQUENCE_MULTIPLE)
    batch = pack(rollouts, plan, 0, device)
    (told,) = run_schedule(model, model.module, [batch], of_last, forward_only=True)
    return told.cpu()


def accuracy(model: MegatronModel, problems: int, device: torch.device) -> float:
    """Of greedy answers to held-out problems."""
    held_out = sort_chain.make_problems(problems, sort_chain.HELD_OUT_SEED)
    prompts = [problem.prompt for problem in held_out]
    answers = sample(model, prompts, sort_chain.RESPONSE_LENGTH, device)
    pairs = zip(held_out, answers, strict=True)
    right = [sort_chain.score(problem, answer.prefix_ids).accuracy for problem, answer in pairs]
    return sum(right) / problems


def learn(
    lesson: Lesson, steps: int, *, rollouts: int = ROLLOUTS, every: int = EVERY
) -> list[float]:
    """The loss of each step; every ``every``-th is at full length."""
    problems = sort_chain.make_problems(steps * rollouts, sort_chain.TRAIN_SEED)
    generator = torch.Generator().manual_seed(1)
    losses = []
    for step in range(steps):
        prompts = [each.prompt for each in problems[step * rollouts : (step + 1) * rollouts]]
        length = SHORT if (step + 1) % every else sort_chain.RESPONSE_LENGTH
        model = lesson.student.model
        losses.append(lesson.step(sample(model, prompts, length, lesson.device, generator)))
    return losses
