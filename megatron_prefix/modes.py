"""What a recipe's mode asks for at each step: pure functions of settings and step.

Steps count from 0. Every rank and the launcher ask these same functions, so that all agree on who
samples, who scores and when weights travel without a word between them.
"""

from megatron_prefix.config import ModelConfig, Recipe

MODES = ("on_policy", "off_policy", "mixed", "sft")


def is_supervised(recipe: Recipe, step: int) -> bool:
    """Whether step ``step`` is cross-entropy on written prefixes, without a teacher."""
    return recipe.mode.name == "sft" or step < recipe.mode.warmup_steps


def written_count(recipe: Recipe, step: int) -> int:
    """Rollouts of step ``step`` that are written ones; the others are sampled.

    In ``mixed`` the share holds over the steps so far to within one prompt's samples, for a batch
    need not divide by it: whole groups of ``rollout.samples_per_prompt`` are written or sampled.
    """
    batch, mode = recipe.train.global_batch_size, recipe.mode
    if is_supervised(recipe, step) or mode.name == "off_policy":
        return batch
    if mode.name == "on_policy":
        return 0
    samples = recipe.rollout.samples_per_prompt
    groups, done = batch // samples, step - mode.warmup_steps
    # Rounded, for a share like 0.7 is a little below itself in binary.
    until, before = (int(round(n * groups * mode.written_share, 6)) for n in (done + 1, done))
    return (until - before) * samples


def needs_written(recipe: Recipe) -> bool:
    """Whether any step trains on written prefixes."""
    mode = recipe.mode
    mixed = mode.name == "mixed" and mode.written_share > 0
    return mode.name in ("off_policy", "sft") or mixed or mode.warmup_steps > 0


def needs_prompts(recipe: Recipe) -> bool:
    """Whether ``data.path`` is read, by steps that sample or by probes."""
    return needs_rollouts(recipe) or (recipe.log.probe_interval > 0 and not recipe.rollout.replay)


def needs_rollouts(recipe: Recipe) -> bool:
    """Whether any step has prefixes sampled by a server."""
    mode = recipe.mode
    if recipe.rollout.replay or mode.warmup_steps >= recipe.train.steps:
        return False
    return mode.name == "on_policy" or (mode.name == "mixed" and mode.written_share < 1)


def needs_servers(recipe: Recipe) -> bool:
    """Whether the run asks servers for anything: rollouts, probes or evaluations."""
    if recipe.rollout.replay:
        return False
    return needs_rollouts(recipe) or bool(recipe.eval.path) or recipe.log.probe_interval > 0


def evaluates_aside(recipe: Recipe) -> bool:
    """Whether servers of their own answer evaluations, beside training."""
    return bool(recipe.eval.path) and recipe.eval.own_servers > 0 and not recipe.rollout.replay


def needs_shared_servers(recipe: Recipe) -> bool:
    """Whether the run asks the servers that get every step's weights for anything."""
    if not evaluates_aside(recipe):
        return needs_servers(recipe)
    return needs_rollouts(recipe) or recipe.log.probe_interval > 0


def check_own_servers(recipe: Recipe, servers: int) -> None:
    """ValueError where ``eval.own_servers`` are not among ``servers``, or leave none for what else
    the run asks."""
    own = recipe.eval.own_servers
    least = own + needs_shared_servers(recipe)
    if evaluates_aside(recipe) and servers < least:
        where = "rollout.server_urls" if recipe.rollout.server_urls else "rollout.num_servers"
        raise ValueError(
            f"eval.own_servers={own} of {servers} server(s) in all, and the run needs {least}: "
            f"raise {where}, or let eval.own_servers=0 share those of the rollouts"
        )


def teachers_of(recipe: Recipe) -> dict[str, ModelConfig]:
    """Every teacher by its domain, in the order in which all ranks go through them."""
    return {"": recipe.teacher, **dict(sorted(recipe.teachers.items()))}


def section_of(domain: str) -> str:
    """The recipe's section of a domain's teacher."""
    return f"teachers.{domain}" if domain else "teacher"


def served_teachers(recipe: Recipe) -> dict[str, ModelConfig]:
    """Those behind servers, by their domain."""
    found = teachers_of(recipe).items()
    return {domain: teacher for domain, teacher in found if teacher.placement == "server"}


def started_teachers(recipe: Recipe) -> dict[str, ModelConfig]:
    """Those whose servers start with the run, by their domain."""
    found = served_teachers(recipe).items()
    return {domain: teacher for domain, teacher in found if not teacher.server.urls}


def needs_teacher(recipe: Recipe) -> bool:
    """Whether the run ever scores with the teacher."""
    supervised = recipe.mode.name == "sft" or recipe.mode.warmup_steps >= recipe.train.steps
    return not supervised or (recipe.log.probe_interval > 0 and not recipe.rollout.replay)


def weight_rule(recipe: Recipe, step: int) -> str:
    """How the tokens of step ``step`` are weighed: ``reward`` while it explores."""
    weights = recipe.loss.weights
    return "reward" if step < weights.explore * recipe.train.steps else weights.rule


def more_passes(recipe: Recipe, step: int) -> tuple[frozenset[str], int]:
    """What token weights ask of step ``step``, if it has a teacher, besides its own passes: the
    domains whose teacher's LM head is applied once more, and how often the student is run forward.
    A server has named its likeliest tokens already."""
    rule = weight_rule(recipe, step)
    asked = teachers_of(recipe).keys() - served_teachers(recipe).keys()
    looks = rule not in ("uniform", "entropy")
    return frozenset(asked if looks else ()), int(rule == "entropy")


def probe_due(recipe: Recipe, finished: int) -> bool:
    """Whether a probe follows ``finished`` steps."""
    interval = recipe.log.probe_interval
    return interval > 0 and finished % interval == 0 and not recipe.rollout.replay


def evaluation_due(recipe: Recipe, finished: int) -> bool:
    """Whether an evaluation follows ``finished`` steps: at both ends and by its interval."""
    interval = recipe.eval.interval
    ends = finished in (0, recipe.train.steps)
    due = ends or (interval > 0 and finished % interval == 0)
    return bool(recipe.eval.path) and due and not recipe.rollout.replay


def asks_servers(recipe: Recipe, finished: int) -> bool:
    """Whether servers other than ``eval.own_servers`` are asked between step ``finished`` - 1 and
    the next weight update."""
    if not needs_shared_servers(recipe):
        return False
    steps, batch = recipe.train.steps, recipe.train.global_batch_size
    samples = finished < steps and written_count(recipe, finished) < batch
    evaluates = evaluation_due(recipe, finished) and not evaluates_aside(recipe)
    return samples or probe_due(recipe, finished) or evaluates


def last_evaluation_due(recipe: Recipe, finished: int) -> int:
    """The last step, up to ``finished``, after which an evaluation was due."""
    return max(step for step in range(finished + 1) if evaluation_due(recipe, step))
