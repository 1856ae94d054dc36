"""What a recipe asks of cards that nobody knows before it starts."""

from megatron_prefix.config import Recipe
from megatron_prefix.modes import section_of, teachers_of


def asked_of_cards(recipe: Recipe) -> list[str]:
    """A sentence for each setting that some cards refuse; ``check_machine`` asks those it finds."""
    from megatron_prefix.mcore.fp8 import BLACKWELL_ONLY

    teachers = {section_of(domain): model for domain, model in teachers_of(recipe).items()}
    return [
        f"{owner}.fp8.recipe={model.fp8.recipe} needs Blackwell cards, on others the run ends at "
        "its start; take 'blockwise' or 'tensorwise' there"
        for owner, model in {"student": recipe.student, **teachers}.items()
        if model.fp8.format != "off" and model.fp8.recipe in BLACKWELL_ONLY
    ]
