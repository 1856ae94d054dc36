"""From a recipe's name to settings, and their record in the run's folder. Imports config alone."""

from megatron_prefix.recipe.load import NoRecipe, factory_beside, load_recipe, write_own_data
from megatron_prefix.recipe.record import (
    OUTSIDE_IDENTITY,
    RECORD_NAME,
    check_run_folder,
    fingerprint,
    identity,
    load_record,
    save_record,
)

__all__ = [
    "OUTSIDE_IDENTITY",
    "RECORD_NAME",
    "NoRecipe",
    "check_run_folder",
    "factory_beside",
    "fingerprint",
    "identity",
    "load_recipe",
    "load_record",
    "save_record",
    "write_own_data",
]
