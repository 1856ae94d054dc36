"""DDP, Megatron's optimizer and its learning-rate schedule for the student."""

import math
from dataclasses import dataclass
from typing import Any

import torch
from megatron.core.distributed import (
    DistributedDataParallel,
    DistributedDataParallelConfig,
    finalize_model_grads,
)
from megatron.core.optimizer import OptimizerConfig as MegatronOptimizerConfig
from megatron.core.optimizer import get_megatron_optimizer
from megatron.core.optimizer.clip_grads import clip_grad_by_total_norm_fp32
from megatron.core.optimizer.optimizer import MegatronOptimizer
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler

from megatron_prefix.config import OptimizerConfig
from megatron_prefix.mcore.model import MegatronModel


@dataclass(frozen=True)
class UpdateResult:
    grad_norm: float  # global, before clipping
    updated: bool  # False: a non-finite norm, the weights are as they were


@dataclass(frozen=True)
class TrainableStudent:
    """The student with its gradient buffers, optimizer and learning-rate schedule."""

    model: MegatronModel
    ddp: DistributedDataParallel
    optimizer: MegatronOptimizer
    scheduler: OptimizerParamScheduler

    def zero_grad(self) -> None:
        self.ddp.zero_grad_buffer()
        self.optimizer.zero_grad()

    def update(self) -> UpdateResult:
        """Clip, step and advance the schedule; nothing but the schedule moves on a bad gradient.

        The parts of Megatron's ``step``, which would move the weights whatever the norm is.
        """
        self.optimizer.prepare_grads()
        given = self.optimizer.get_grad_norm()
        norm = float(given)
        updated = math.isfinite(norm)
        if updated:
            self._clip(given)
            updated = bool(self.optimizer.step_with_ready_grads())
        self.scheduler.step(increment=1)
        return UpdateResult(norm, updated)

    def _clip(self, norm: float | torch.Tensor) -> None:
        """``norm``: of all gradients together, as Megatron gives it: on a GPU a tensor."""
        for inner in self.inner_optimizers:
            parameters, limit = inner.get_parameters(), inner.config.clip_grad
            if parameters and limit > 0.0:
                clip_grad_by_total_norm_fp32(parameters, limit, norm)

    def skip(self) -> None:
        """Advance the schedule alone: the loss was not finite."""
        self.scheduler.step(increment=1)

    @property
    def inner_optimizers(self) -> list[MegatronOptimizer]:
        """One for dense parameters and one for experts, where Megatron chains two."""
        return list(getattr(self.optimizer, "chained_optimizers", [self.optimizer]))

    @property
    def lr(self) -> float:
        return float(self.optimizer.param_groups[0]["lr"])


def make_trainable(
    model: MegatronModel, config: OptimizerConfig, total_steps: int
) -> TrainableStudent:
    """Wrap ``model`` for training. Collective over its data-parallel group."""
    ddp = DistributedDataParallel(
        model.config,
        DistributedDataParallelConfig(
            use_distributed_optimizer=config.use_distributed_optimizer,
            grad_reduce_in_fp32=True,
            overlap_grad_reduce=config.overlap_grad_reduce,
        ),
        model.module,
        pg_collection=model.groups.pg,
    )
    optimizer = get_megatron_optimizer(
        MegatronOptimizerConfig(
            optimizer="adam",
            lr=config.lr,
            min_lr=config.min_lr,
            weight_decay=config.weight_decay,
            adam_beta1=config.adam_beta1,
            adam_beta2=config.adam_beta2,
            adam_eps=config.adam_eps,
            clip_grad=config.clip_grad,
            use_distributed_optimizer=config.use_distributed_optimizer,
            params_dtype=model.config.params_dtype,
            bf16=model.config.params_dtype == torch.bfloat16,
            fp8_recipe=model.config.fp8_recipe if model.config.fp8 else None,
        ),
        [ddp],
        use_gloo_process_groups=False,
        pg_collection=model.groups.pg,
    )
    model.config.finalize_model_grads_func = _finalize_gradients
    if config.overlap_grad_reduce:
        model.config.no_sync_func = ddp.no_sync
    return TrainableStudent(model, ddp, optimizer, _scheduler(optimizer, config, total_steps))


def _finalize_gradients(
    modules: list[torch.nn.Module], num_tokens: torch.Tensor | None = None, **groups: Any
) -> None:
    """Megatron's reduction without its division: the loss weights hold the one denominator."""
    finalize_model_grads(modules, None, **groups)


def _scheduler(
    optimizer: MegatronOptimizer, config: OptimizerConfig, total_steps: int
) -> OptimizerParamScheduler:
    scheduler = OptimizerParamScheduler(
        optimizer,
        init_lr=0.0,
        max_lr=config.lr,
        min_lr=config.min_lr,
        lr_warmup_steps=config.lr_warmup_steps,
        lr_decay_steps=max(total_steps, config.lr_warmup_steps + 1),
        lr_decay_style=config.lr_decay_style,
        start_wd=config.weight_decay,
        end_wd=config.weight_decay,
        wd_incr_steps=0,
        wd_incr_style="constant",
        # The recipe's schedule, not the checkpoint's: it stretches where a resumed run has more
        # steps. Whatever else it is made of identifies the run.
        use_checkpoint_opt_param_scheduler=False,
        override_opt_param_scheduler=True,
    )
    # Megatron starts warm-up at 0: the first update would be thrown away.
    scheduler.step(increment=1)
    return scheduler
