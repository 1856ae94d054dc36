"""What ``plan`` says does not fit is refused where a run would start, before a model is built."""

from dataclasses import replace

from megatron_prefix.config import Recipe
from megatron_prefix.plan.fit import (
    free_for_servers,
    measure_fit,
    refusal,
    server_share_stated,
    with_remedy,
)
from megatron_prefix.plan.memory import plan_ranks
from megatron_prefix.plan.servers import refuse_servers, teacher_servers
from megatron_prefix.plan.sizes import ModelSizes
from megatron_prefix.validate import validate


def refuse_what_does_not_fit(
    recipe: Recipe, *, servers_elsewhere: bool = False, card_gib: float = 0.0
) -> None:
    """ValueError with the figure, the limit and the smallest change that would fit.

    The limit is the smaller of ``run.gpu_memory_gib`` and of this machine's card, ``card_gib``;
    nothing is refused where neither is known. Bytes are by arithmetic, as of ``plan --quick``.
    """
    limits = [limit for limit in (recipe.run.gpu_memory_gib, card_gib) if limit > 0]
    if not recipe.run.check_memory or not limits:
        return
    # SGLang's own default depends on what is free when it starts: a card that the recipe says
    # nothing of is not refused for it.
    guessed = not recipe.run.gpu_memory_gib and not server_share_stated(recipe)
    recipe = replace(recipe, run=replace(recipe.run, gpu_memory_gib=min(limits)))
    read = ModelSizes()
    run = validate(recipe, read, sizes_only=True)
    refuse_servers(teacher_servers(run), free_for_servers(recipe))
    fit = measure_fit(recipe, plan_ranks(run), servers_elsewhere=servers_elsewhere or guessed)
    if fit is None or fit.fits:
        return
    words = refusal(with_remedy(fit, run, read, plan_ranks))
    raise ValueError(f"{words}; run.check_memory=false starts it all the same")


def card_gib() -> float:
    """Memory of the smallest GPU of this machine; 0 where it has none."""
    import torch

    if not torch.cuda.is_available():
        return 0.0
    cards = [torch.cuda.get_device_properties(card) for card in range(torch.cuda.device_count())]
    return float(min(card.total_memory for card in cards)) / 1024**3
