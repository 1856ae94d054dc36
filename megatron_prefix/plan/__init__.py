"""What a recipe comes to: sizes, bytes a rank, tokens and FLOPs, and whether it fits. No torch at
import; Megatron's modules are built by ``mcore/census.py``, in a process of its own."""

from megatron_prefix.plan.build import count_held
from megatron_prefix.plan.command import plan_recipe, run_plan
from megatron_prefix.plan.cost import CostPlan
from megatron_prefix.plan.fit import Change, Fit, measure_fit, with_remedy
from megatron_prefix.plan.gate import card_gib, refuse_what_does_not_fit
from megatron_prefix.plan.make import ModelPlan, Plan, make_plan, rank_groups
from megatron_prefix.plan.memory import RankPlan, Stage, arithmetic
from megatron_prefix.plan.seen import Seen, look_at_prompts
from megatron_prefix.plan.sizes import ModelSizes

__all__ = [
    "Change",
    "CostPlan",
    "Fit",
    "ModelPlan",
    "ModelSizes",
    "Plan",
    "RankPlan",
    "Seen",
    "Stage",
    "arithmetic",
    "card_gib",
    "count_held",
    "look_at_prompts",
    "make_plan",
    "measure_fit",
    "plan_recipe",
    "rank_groups",
    "refuse_what_does_not_fit",
    "run_plan",
    "with_remedy",
]
