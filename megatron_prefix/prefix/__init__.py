"""The prefix engine: how long a prefix is at each step, and what it costs. Pure: no torch."""

from megatron_prefix.prefix.cutoff import CutOff, CutOffRule, SampledToken, build_cut_off
from megatron_prefix.prefix.flops import ModelShape, model_shape, rollout_flops, step_flops
from megatron_prefix.prefix.ledger import Ledger, StepCost
from megatron_prefix.prefix.policy import (
    PrefixObservation,
    PrefixPolicy,
    ProbeObservation,
    loss_start,
    observe_probe,
)
from megatron_prefix.prefix.registry import build_policy, is_scheduled

__all__ = [
    "CutOff",
    "CutOffRule",
    "Ledger",
    "ModelShape",
    "PrefixObservation",
    "PrefixPolicy",
    "ProbeObservation",
    "SampledToken",
    "StepCost",
    "build_cut_off",
    "build_policy",
    "is_scheduled",
    "loss_start",
    "model_shape",
    "observe_probe",
    "rollout_flops",
    "step_flops",
]
