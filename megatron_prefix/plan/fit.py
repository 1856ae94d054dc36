"""Whether a plan fits into its cards, and the smallest change of the recipe that would."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import reduce
from itertools import combinations
from typing import Any

from megatron_prefix.config import Recipe
from megatron_prefix.modes import needs_servers, section_of, teachers_of
from megatron_prefix.plan.memory import RankPlan, arithmetic, model_sizes, on_gpus, plan_ranks
from megatron_prefix.plan.sizes import ModelSizes
from megatron_prefix.plan.teachers import teachers_that_score
from megatron_prefix.validate import ValidRun, validate

GIB = 1024**3
CARDS_A_NODE = 8  # tensor parallel beyond them would cross nodes
MOST_CHANGES = 3
SERVER_SHARE = "--mem-fraction-static"


@dataclass(frozen=True)
class Change:
    """One setting at another value."""

    key: str
    value: Any

    def __str__(self) -> str:
        value = str(self.value).lower() if isinstance(self.value, bool) else self.value
        return f"{self.key}={value}"

    def of(self, recipe: Recipe) -> Recipe:
        section, _, name = self.key.rpartition(".")
        if section.startswith("teachers."):
            domain = section.removeprefix("teachers.")
            teacher = replace(recipe.teachers[domain], **{name: self.value})
            return replace(recipe, teachers={**recipe.teachers, domain: teacher})
        changed = replace(getattr(recipe, section), **{name: self.value})
        return replace(recipe, **{section: changed})


@dataclass(frozen=True)
class Fit:
    """Bytes on the fullest rank against those of a card."""

    card: int
    server: int  # of SGLang, where its servers share the cards
    reserve: int  # of context, NCCL and fragments
    rank: int  # the fullest
    needs: int
    changes: tuple[Change, ...] = ()  # smallest that fit; empty where it fits, or none was found
    needs_then: int = 0

    @property
    def free(self) -> int:
        return self.card - self.server - self.reserve

    @property
    def fits(self) -> bool:
        return self.needs <= self.free


def measure_fit(
    recipe: Recipe, ranks: Sequence[RankPlan], *, servers_elsewhere: bool = False
) -> Fit | None:
    """None where the recipe does not say how much a card holds."""
    if not on_gpus(recipe):
        return None
    card = round(recipe.run.gpu_memory_gib * GIB)
    fullest = max(ranks, key=lambda rank: rank.total)
    return Fit(
        card=card,
        server=0 if servers_elsewhere else round(card * _server_share(recipe)),
        reserve=round(recipe.run.gpu_reserve_gib * GIB),
        rank=fullest.rank,
        needs=fullest.total,
    )


def free_for_servers(recipe: Recipe) -> int:
    """Bytes of a card that a teacher's server may have; 0 where the recipe names no card."""
    run = recipe.run
    return round((run.gpu_memory_gib - run.gpu_reserve_gib) * GIB) if on_gpus(recipe) else 0


def _server_share(recipe: Recipe) -> float:
    rollout = recipe.rollout
    if rollout.server_urls or not needs_servers(recipe):
        return 0.0
    words = _server_words(recipe)
    if not server_share_stated(recipe):
        raise ValueError(
            f"rollout.server_args has no {SERVER_SHARE}, so a server on the trainer's cards would "
            f'take nearly all of them; add "{SERVER_SHARE}", "0.4"'
        )
    share = words[words.index(SERVER_SHARE) + 1]
    try:
        return float(share)
    except ValueError as error:
        raise ValueError(f"rollout.server_args: {SERVER_SHARE} {share} is no number") from error


def _server_words(recipe: Recipe) -> list[str]:
    return [part for argument in recipe.rollout.server_args for part in argument.split("=", 1)]


def server_share_stated(recipe: Recipe) -> bool:
    """Whether the recipe says how much of a card a server takes."""
    return SERVER_SHARE in _server_words(recipe)[:-1]


def with_remedy(
    fit: Fit, run: ValidRun, read: ModelSizes, count: Callable[[ValidRun], Sequence[RankPlan]]
) -> Fit:
    """``fit`` with the smallest change that fits, if there is one.

    Smallest is the fewest settings, and among as many, what costs least: :func:`single_changes`
    is in that order. Candidates are judged by arithmetic; ``count`` plans the one that is named.
    """
    sizes = model_sizes(run)
    # On the cards that are there: a larger layout must not bring more of them along.
    recipe = Change("run.world_size", run.world_size).of(run.recipe)
    for changes in _by_size(single_changes(run)):
        changed = _changed(recipe, changes, read)
        if changed is None or _needs(plan_ranks(changed, arithmetic(changed, sizes))) > fit.free:
            continue
        needs = _needs(count(changed))
        if needs <= fit.free:
            return replace(fit, changes=changes, needs_then=needs)
    return fit


def _needs(ranks: Sequence[RankPlan]) -> int:
    return max(rank.total for rank in ranks)


def _changed(recipe: Recipe, changes: Sequence[Change], read: ModelSizes) -> ValidRun | None:
    """None where the changed recipe is refused."""
    try:
        return validate(_apply(recipe, changes), read, sizes_only=True)
    except ValueError:
        return None


def _apply(recipe: Recipe, changes: Sequence[Change]) -> Recipe:
    return reduce(lambda changed, change: change.of(changed), changes, recipe)


def _by_size(changes: Sequence[Change]) -> Iterator[tuple[Change, ...]]:
    """One change, then two, then three, of unlike settings; cheaper ones first."""
    cost = {change: place for place, change in enumerate(changes)}
    for count in range(1, MOST_CHANGES + 1):
        sets = [
            each for each in combinations(changes, count) if len({c.key for c in each}) == count
        ]
        yield from sorted(sets, key=lambda each: sum(cost[change] for change in each))


def single_changes(run: ValidRun) -> list[Change]:
    """What may make room, from what costs nothing to what costs cards."""
    return [
        *_free_changes(run.recipe),
        *_offloads(run),
        *_halvings("train.micro_batch_size", run.recipe.train.micro_batch_size),
        *_recompute(run.recipe),
        *(
            change
            for name in teachers_that_score(run)
            for change in _layouts(run, section_of(name))
        ),
        *_layouts(run, "student"),
        *_doublings("run.world_size", run.world_size, 4 * run.world_size),
    ]


def _free_changes(recipe: Recipe) -> Iterator[Change]:
    teachers = {section_of(name): model for name, model in teachers_of(recipe).items()}
    for owner, model in {"student": recipe.student, **teachers}.items():
        if model.tensor_model_parallel_size > 1 and not model.sequence_parallel:
            yield Change(f"{owner}.sequence_parallel", True)
    if not recipe.optimizer.use_distributed_optimizer:
        yield Change("optimizer.use_distributed_optimizer", True)


def _offloads(run: ValidRun) -> Iterator[Change]:
    """Of colocated teachers. On a GPU it costs the copy's time where sampling is shorter."""
    for domain, teacher in teachers_that_score(run).items():
        if not teacher.layout.first_rank and not teacher.config.offload:
            yield Change(f"{section_of(domain)}.offload", True)


def _recompute(recipe: Recipe) -> Iterator[Change]:
    if recipe.student.recompute_granularity != "full":
        yield Change("student.recompute_granularity", "full")


def _layouts(run: ValidRun, owner: str) -> Iterator[Change]:
    models = {section_of(name): model for name, model in teachers_that_score(run).items()}
    valid = {"student": run.student, **models}[owner]
    model = valid.config
    bounds = {
        "expert_model_parallel_size": valid.hf.shape.num_experts,
        "tensor_model_parallel_size": CARDS_A_NODE,
        "context_parallel_size": run.world_size,
        "pipeline_model_parallel_size": run.world_size,
    }
    for name, most in bounds.items():
        yield from _doublings(f"{owner}.{name}", getattr(model, name), most)
    if model.tensor_model_parallel_size == 1:
        yield Change(f"{owner}.sequence_parallel", True)  # beside a larger tensor parallel


def _halvings(key: str, value: int) -> Iterator[Change]:
    while value % 2 == 0:
        value //= 2
        yield Change(key, value)


def _doublings(key: str, value: int, most: int) -> Iterator[Change]:
    while 2 * value <= most:
        value *= 2
        yield Change(key, value)


def refusal(fit: Fit) -> str:
    """A user's error in one line."""
    taken = f"{_gib(fit.reserve)} are reserved"
    if fit.server:
        taken += f", {_gib(fit.server)} SGLang's"
    what = (
        f"does not fit: rank {fit.rank} needs {_gib(fit.needs)} GiB, and {_gib(fit.free)} of the "
        f"card's {_gib(fit.card)} are free ({taken})"
    )
    if not fit.changes:
        return f"{what}; no {MOST_CHANGES} settings were found that make it fit: give more cards"
    words = " ".join(map(str, fit.changes))
    return f"{what}; the smallest change that fits is {words} ({_gib(fit.needs_then)} GiB)"


def _gib(size: int) -> str:
    return f"{size / GIB:.1f}"
