"""Tokens and FLOPs of a whole run, by its policy's lengths and its mode's steps."""

from collections import Counter
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field

from megatron_prefix.config import Recipe
from megatron_prefix.modes import (
    evaluation_due,
    is_supervised,
    more_passes,
    probe_due,
    written_count,
)
from megatron_prefix.plan.seen import Seen
from megatron_prefix.prefix import (
    ModelShape,
    StepCost,
    build_policy,
    is_scheduled,
    loss_start,
    model_shape,
    rollout_flops,
)
from megatron_prefix.prefix.flops import BACKWARD, head_flops
from megatron_prefix.prefix.policy import PrefixPolicy
from megatron_prefix.types import Flops
from megatron_prefix.validate import ValidRun


@dataclass(frozen=True)
class CostPlan:
    """Tokens and FLOPs where every rollout fills its prefix length: none ends by itself."""

    steps: int
    rollouts_a_step: int
    microbatches_a_replica: int
    prompt_tokens: int  # a rollout
    prompt_tokens_from: str  # where that number comes from
    lengths_known: bool  # False: the policy moves with the data, and its shortest is taken
    shortest_prefix: int
    longest_prefix: int
    mean_prefix: float
    run: StepCost
    domain_shares: dict[str, float] = field(default_factory=dict)  # by domain, of the rollouts
    supervised_steps: int = 0  # that no teacher scores
    written_rollouts: int = 0  # that no server samples
    # Beside training, and no part of ``run``: full-length rollouts, and answers at their bound.
    probes: int = 0
    probe_flops: float = 0.0
    evaluations: int = 0
    answers: int = 0  # of one evaluation; 0 where how many there are is not known
    evaluation_flops: float = 0.0

    @property
    def mean_step_flops(self) -> float:
        return self.run.flops.total / self.steps


@dataclass(frozen=True)
class _Kind:
    """What steps of one cost have in common."""

    length: int
    start: int  # of the loss
    written: int  # rollouts
    supervised: bool
    more_passes: tuple[frozenset[str], int]  # as modes.more_passes


@dataclass(frozen=True)
class _Costs:
    """FLOPs of one rollout, in the mean over the domains."""

    student: ModelShape
    teachers: tuple[tuple[str, ModelShape, float], ...]  # with their domains and shares
    prompt: int
    teacher_prompt: int

    def rollout(self, length: int, start: int = 0, again: Collection[str] = ()) -> Flops:
        """``again``: the domains whose teacher's LM head is applied twice."""
        total = Flops()
        for domain, teacher, share in self.teachers:
            cost = rollout_flops(self.student, teacher, self.prompt, length, start)
            own = rollout_flops(self.student, teacher, self.teacher_prompt, length, start).teacher
            own += (domain in again) * head_flops(teacher, max(length - start, 0))
            total += _times(Flops(cost.rollout, own, cost.student), share)
        return total


def plan_cost(run: ValidRun, seen: Seen) -> CostPlan:
    """``seen``: what is known of the run's prompts."""
    recipe, steps = run.recipe, range(run.recipe.train.steps)
    policy = build_policy(recipe.prefix, recipe.train.steps)
    kinds = Counter(_kind(recipe, policy, step) for step in steps)
    lengths = [kind.length for kind in kinds.elements()]
    costs, batch = _costs(run, seen), recipe.train.global_batch_size
    probes = [step for step in range(len(steps) + 1) if probe_due(recipe, step)]
    evaluations = sum(evaluation_due(recipe, step) for step in range(len(steps) + 1))
    answers = len(seen.evaluated) or recipe.eval.samples
    return CostPlan(
        steps=len(steps),
        rollouts_a_step=batch,
        microbatches_a_replica=batch // recipe.train.micro_batch_size // run.student.layout.dp,
        prompt_tokens=costs.prompt,
        prompt_tokens_from=_source(seen),
        lengths_known=is_scheduled(policy),
        shortest_prefix=min(lengths),
        longest_prefix=max(lengths),
        mean_prefix=sum(lengths) / len(steps),
        run=_run_cost(recipe, costs, kinds),
        domain_shares=seen.shares(["", *run.more_teachers]) if run.more_teachers else {},
        supervised_steps=sum(kind.supervised for kind in kinds.elements()),
        written_rollouts=sum(kind.written for kind in kinds.elements()),
        probes=len(probes),
        probe_flops=sum(_probe_flops(recipe, costs, policy, step) for step in probes),
        evaluations=evaluations,
        answers=answers if evaluations else 0,
        evaluation_flops=evaluations * _answers_flops(recipe, costs, seen),
    )


def _kind(recipe: Recipe, policy: PrefixPolicy, step: int) -> _Kind:
    return _Kind(
        policy.length(step),
        loss_start(policy, step),
        written_count(recipe, step),
        is_supervised(recipe, step),
        more_passes(recipe, step),
    )


def _costs(run: ValidRun, seen: Seen) -> _Costs:
    most = run.recipe.data.max_prompt_length
    prompt = _mean(seen.lengths, most)
    own = run.recipe.mode.teacher_prompt.max_length or prompt
    teachers = {"": run.teacher, **run.more_teachers}
    shares = seen.shares(list(teachers))
    return _Costs(
        student=model_shape(run.student.hf.config),
        teachers=tuple((n, model_shape(t.hf.config), shares[n]) for n, t in teachers.items()),
        prompt=prompt,
        teacher_prompt=_mean(seen.teacher_lengths, own),
    )


def _mean(lengths: Sequence[int], unknown: int) -> int:
    return round(sum(lengths) / len(lengths)) if lengths else unknown


def _source(seen: Seen) -> str:
    if not seen.lengths:
        return "data.max_prompt_length, an upper bound"
    return f"mean of the first {len(seen.lengths)} prompts"


def _run_cost(recipe: Recipe, costs: _Costs, kinds: Counter[_Kind]) -> StepCost:
    batch, full = recipe.train.global_batch_size, recipe.prefix.max_length
    rollouts = kinds.total() * batch
    return StepCost(
        flops=sum((_times(_step(recipe, costs, k), n) for k, n in kinds.items()), Flops()),
        flops_full=_times(costs.rollout(full), rollouts),
        prompt_tokens=costs.prompt * rollouts,
        prefix_tokens=sum(kind.length * count for kind, count in kinds.items()) * batch,
        full_tokens=full * rollouts,
    )


def _step(recipe: Recipe, costs: _Costs, kind: _Kind) -> Flops:
    """As the ledger counts it: what was written costs no sampling, cross-entropy no teacher."""
    batch = recipe.train.global_batch_size
    again, forwards = kind.more_passes
    one = costs.rollout(kind.length, kind.start, again)
    passes = 1.0 if kind.supervised else 1.0 + forwards / BACKWARD
    return Flops(
        rollout=one.rollout * (batch - kind.written),
        teacher=0.0 if kind.supervised else one.teacher * batch,
        student=one.student * passes * batch,
    )


def _probe_flops(recipe: Recipe, costs: _Costs, policy: PrefixPolicy, finished: int) -> float:
    """Of one: two passes forward and backward where it compares gradients, else one forward."""
    length = recipe.prefix.max_length
    gradients = 2 if recipe.log.probe_agreement and policy.length(finished) < length else 0
    one = costs.rollout(length)
    student = one.student / BACKWARD * (BACKWARD * gradients or 1)
    return recipe.log.probe_rollouts * (one.rollout + one.teacher + student)


def _answers_flops(recipe: Recipe, costs: _Costs, seen: Seen) -> float:
    """Of one evaluation: the sampler's part, every answer at its bound."""
    prompts = Counter(seen.evaluated) or Counter({costs.prompt: recipe.eval.samples})
    models, longest = (costs.student, costs.teachers[0][1]), recipe.eval.max_new_tokens
    return sum(count * rollout_flops(*models, p, longest).rollout for p, count in prompts.items())


def _times(flops: Flops, count: float) -> Flops:
    return Flops(flops.rollout * count, flops.teacher * count, flops.student * count)
