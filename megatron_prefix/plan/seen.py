"""What is known of a run's texts before it starts: lengths and domains of its first prompts."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from megatron_prefix.data.written import written_data
from megatron_prefix.modes import needs_prompts
from megatron_prefix.preflight import open_prompts
from megatron_prefix.validate import ValidRun
from megatron_prefix.validate.data import is_local

PROMPTS_LOOKED_AT = 256


@dataclass(frozen=True)
class Seen:
    """Some of a run's prompts; nothing where they are not here."""

    lengths: tuple[int, ...] = ()  # tokens
    teacher_lengths: tuple[int, ...] = ()  # where the teacher reads another prompt
    domains: tuple[str, ...] = ()
    # Of the evaluation's; nothing where it is not here, or there is none.
    evaluated: tuple[int, ...] = ()

    def shares(self, domains: Sequence[str]) -> dict[str, float]:
        """How much of the prompts each teacher has; unseen, all as much."""
        if not self.domains:
            return {domain: 1 / len(domains) for domain in domains}
        counted = Counter(self.domains)
        return {domain: counted[domain] / len(self.domains) for domain in domains}


def look_at_prompts(run: ValidRun) -> Seen:
    """The first prompts of a data set on this machine; none of a hub id or a replay."""
    recipe = run.recipe
    data = recipe.data if needs_prompts(recipe) else written_data(recipe)
    evaluated = _evaluated(run)
    if recipe.rollout.replay or not is_local(data.path):
        return Seen(evaluated=evaluated)
    prompts = open_prompts(recipe).take(PROMPTS_LOOKED_AT)
    return Seen(
        lengths=tuple(len(prompt.input_ids) for prompt in prompts),
        teacher_lengths=tuple(len(prompt.teacher_ids or prompt.input_ids) for prompt in prompts),
        domains=tuple(prompt.domain for prompt in prompts),
        evaluated=evaluated,
    )


def _evaluated(run: ValidRun) -> tuple[int, ...]:
    from megatron_prefix.data.tokenizers import load_tokenizer
    from megatron_prefix.evaluation.evaluate import load_eval_set

    recipe = run.recipe
    if not recipe.eval.path or not is_local(recipe.eval.path):
        return ()
    tokenizer = load_tokenizer(recipe.student.hf_path)
    found = load_eval_set(recipe.eval, tokenizer, recipe.data)
    return tuple(len(prompt.input_ids) for prompt in found.prompts)
