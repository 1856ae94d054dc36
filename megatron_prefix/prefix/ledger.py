"""The run's account: FLOPs and tokens spent, and what full-length distillation had spent.

The counterfactual asks of the same step: what if each rollout had been continued? One that ended
by itself keeps its length; one that the prefix length, a cut or an abort ended is continued to
``max_length``. That is an upper bound, since it might have ended by itself on the way.
"""

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field, replace

from megatron_prefix.prefix.flops import BACKWARD, ModelShape, head_flops, rollout_flops
from megatron_prefix.types import Flops, Rollout


@dataclass(frozen=True)
class StepCost:
    """What some rollouts cost. Costs of disjoint rollouts add up to the cost of all."""

    flops: Flops = field(default_factory=Flops)
    flops_full: Flops = field(default_factory=Flops)  # the counterfactual's
    prompt_tokens: int = 0
    prefix_tokens: int = 0
    full_tokens: int = 0  # prefix tokens of the counterfactual

    @property
    def ratio(self) -> float:
        """FLOPs as a share of the counterfactual's; 1 where nothing was spent yet."""
        return self.flops.total / self.flops_full.total if self.flops_full.total else 1.0

    def __add__(self, other: "StepCost") -> "StepCost":
        return StepCost(
            self.flops + other.flops,
            self.flops_full + other.flops_full,
            self.prompt_tokens + other.prompt_tokens,
            self.prefix_tokens + other.prefix_tokens,
            self.full_tokens + other.full_tokens,
        )


class Ledger:
    """Sums of the run so far. ``measure`` is pure; ``add`` enters a step, summed over all ranks."""

    def __init__(
        self,
        student: ModelShape,
        teacher: ModelShape,
        max_length: int,
        more_teachers: Mapping[str, ModelShape] | None = None,
    ) -> None:
        """``more_teachers``: by the domain of the rollouts that they score."""
        self._student, self._max_length = student, max_length
        self._teachers = {"": teacher, **(more_teachers or {})}
        self._total = StepCost()

    @property
    def total(self) -> StepCost:
        return self._total

    def measure(
        self,
        rollouts: Iterable[Rollout],
        loss_start: int = 0,
        *,
        supervised: bool = False,
        discarded: Iterable[tuple[int, int]] = (),
        more_passes: tuple[Collection[str], int] = ((), 0),
    ) -> StepCost:
        """The cost of these rollouts, scored from ``loss_start`` on; nothing entered.

        Written prefixes cost no sampling, a ``supervised`` step no teacher; tokens past a cut were
        sampled all the same, and so were ``discarded`` rollouts, given as (prompt, sampled) tokens.
        ``more_passes``: the domains whose teacher's LM head was applied once more, and how often
        the student was run forward, besides the step's own passes. The counterfactual is
        full-length on-policy distillation, with none of these.
        """
        again, forwards = ((), 0) if supervised else more_passes
        known = dict[tuple[object, ...], StepCost]()
        total = StepCost(self.measure_answers(discarded))
        for rollout in rollouts:
            alike = _what_counts(rollout)
            if alike not in known:  # most rollouts of a short prefix cost the same
                heads = 0 if supervised else 1 + (rollout.domain in again)
                known[alike] = self._cost(rollout, loss_start, heads, 1.0 + forwards / BACKWARD)
            total += known[alike]
        return total

    def _cost(self, rollout: Rollout, loss_start: int, heads: int, passes: float) -> StepCost:
        """``heads``: times that the teacher's is applied, behind a trunk where it is not 0;
        ``passes``: of the student."""
        prefix = len(rollout.prefix_ids)
        by_itself = rollout.finish_reason == "stop"
        full = prefix if by_itself else max(prefix, self._max_length)
        cost = self._flops(rollout, prefix, loss_start)
        head = head_flops(self._teachers[rollout.domain], max(prefix - loss_start, 0))
        sampled = self._flops(rollout, prefix + rollout.discarded, loss_start).rollout
        spent = Flops(
            rollout=0.0 if rollout.written else sampled,
            teacher=cost.teacher + (heads - 1) * head if heads else 0.0,
            student=cost.student * passes,
        )
        prompt = len(rollout.prompt_ids)
        return StepCost(spent, self._flops(rollout, full, 0), prompt, prefix, full)

    def _flops(self, rollout: Rollout, prefix_tokens: int, loss_start: int) -> Flops:
        """Of a rollout that is sampled, scored and trained on; the teacher may read a prompt of
        its own."""
        prompt = len(rollout.prompt_ids)
        own = len(rollout.teacher_prompt_ids) or prompt
        models = self._student, self._teachers[rollout.domain]
        cost = rollout_flops(*models, prompt, prefix_tokens, loss_start)
        if own == prompt:
            return cost
        teacher = rollout_flops(*models, own, prefix_tokens, loss_start).teacher
        return Flops(cost.rollout, teacher, cost.student)

    def measure_probe(self, rollouts: Iterable[Rollout], gradients: int = 0) -> Flops:
        """What rollouts cost that are scored and not trained on; never part of the total.

        ``gradients``: passes forward and backward that were made instead of the one forward.
        """
        total = Flops()
        for rollout in rollouts:
            total += self._flops(rollout, len(rollout.prefix_ids), 0)
        passes = BACKWARD * gradients or 1
        return replace(total, student=total.student / BACKWARD * passes)

    def measure_answers(self, lengths: Iterable[tuple[int, int]]) -> Flops:
        """What evaluated answers cost, given as (prompt, sampled) tokens: the sampler's part."""
        costs = (rollout_flops(self._student, self._teachers[""], *pair) for pair in lengths)
        return Flops(rollout=sum(cost.rollout for cost in costs))

    def add(self, cost: StepCost) -> None:
        self._total += cost

    def state_dict(self) -> dict[str, float]:
        """Flat and JSON-ready; Python's floats and ints come back from it exactly."""
        total = self._total
        return {
            "rollout": total.flops.rollout,
            "teacher": total.flops.teacher,
            "student": total.flops.student,
            "full_rollout": total.flops_full.rollout,
            "full_teacher": total.flops_full.teacher,
            "full_student": total.flops_full.student,
            "prompt_tokens": total.prompt_tokens,
            "prefix_tokens": total.prefix_tokens,
            "full_tokens": total.full_tokens,
        }

    def load_state_dict(self, state: Mapping[str, float]) -> None:
        """Goes on from a saved ledger; KeyError where a sum is missing."""
        self._total = StepCost(
            Flops(state["rollout"], state["teacher"], state["student"]),
            Flops(state["full_rollout"], state["full_teacher"], state["full_student"]),
            int(state["prompt_tokens"]),
            int(state["prefix_tokens"]),
            int(state["full_tokens"]),
        )


def _what_counts(rollout: Rollout) -> tuple[object, ...]:
    """What :meth:`Ledger._cost` reads of a rollout."""
    lengths = len(rollout.prompt_ids), len(rollout.teacher_prompt_ids), len(rollout.prefix_ids)
    by_itself = rollout.finish_reason == "stop"
    return (*lengths, rollout.discarded, by_itself, rollout.written, rollout.domain)
