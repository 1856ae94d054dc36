"""TensorBoard's view of a run. ``torch.utils.tensorboard`` is imported only when it is used.

Legend: S steps in the heat map, L prefix positions.
"""

from collections import deque
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from megatron_prefix.config import LogConfig
from megatron_prefix.run_files.account import Account
from megatron_prefix.run_files.kl_grid import KL_CEILING, KL_FLOOR, mean_kl, shrink, stack_rows
from megatron_prefix.types import Flops, ProbeMetrics, StepMetrics

HEAT_MAP_STEPS = 128  # rows of the KL image
MAX_IMAGE_WIDTH = 1024  # pixels; longer prefixes are averaged down to this
MIN_IMAGE_SIDE = 256  # pixels; smaller images are enlarged by whole factors


class TensorBoardWriter:
    """Scalars every ``log_interval`` steps, images of the KL by position, rollouts as text."""

    def __init__(self, folder: Path, log: LogConfig, resume_step: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        # purge_step hides what an earlier try wrote of the steps that are taken again.
        self._writer = SummaryWriter(str(folder), purge_step=resume_step + 1)
        self._log = log
        self._recent: deque[np.ndarray] = deque(maxlen=HEAT_MAP_STEPS)

    def step(self, metrics: StepMetrics, spent: Account) -> None:
        """``spent`` counts the run from its first step on."""
        self._recent.append(metrics.kl_by_position)
        if metrics.step % max(self._log.log_interval, 1) == 0:
            values = scalars(metrics) | running_totals(spent)
            for tag, value in values.items():
                self._writer.add_scalar(tag, value, metrics.step)
        interval = self._log.kl_by_position_interval
        if interval and metrics.step % interval == 0:
            image = kl_heat_map(tuple(self._recent))
            self._writer.add_image(
                "kl_by_position/steps_down_positions_right", image, metrics.step, dataformats="HWC"
            )

    def rollouts(
        self,
        step: int,
        prompt_texts: Sequence[str],
        prefix_texts: Sequence[str],
        details: Sequence[Mapping[str, str | int | float]],
    ) -> None:
        parts = [
            f"{_inline(detail)}\n\n{_block(prompt)}\n\n{_block(prefix)}"
            for prompt, prefix, detail in zip(prompt_texts, prefix_texts, details, strict=True)
        ]
        self._writer.add_text("rollouts", "\n\n---\n\n".join(parts), step)

    def evaluation(self, step: int, accuracy: float) -> None:
        self._writer.add_scalar("evaluation/accuracy", accuracy, step)

    def probe(self, metrics: ProbeMetrics) -> None:
        values = {
            "probe/kl_prefix": metrics.kl_prefix,
            "probe/kl_tail": metrics.kl_tail,
            "probe/gradient_agreement": metrics.agreement,
            "probe/finished_fraction": metrics.finished / metrics.rollouts,
        }
        for tag, value in values.items():
            self._writer.add_scalar(tag, value, metrics.step)

    def event(self, step: int, kind: str, message: str) -> None:
        self._writer.add_text(f"events/{kind}", message, step)

    def close(self) -> None:
        self._writer.close()


def scalars(metrics: StepMetrics) -> dict[str, float]:
    """One step's values by tag."""
    values = {
        "loss/loss": metrics.loss,
        "loss/kl": mean_kl(metrics.kl_by_position, metrics.tokens_by_position),
        "optimizer/grad_norm": metrics.grad_norm,
        "optimizer/lr": metrics.lr,
        "optimizer/skipped": float(metrics.skipped),
        "prefix/length": metrics.prefix_length,
        "prefix/cut_fraction": metrics.cut_fraction,
        "prefix/cut_off_fraction": metrics.cut_off_fraction,
        "prefix/effective_token_share": metrics.effective_share,
        "prefix/prefix_tokens": metrics.prefix_tokens,
        "prefix/prompt_tokens": metrics.prompt_tokens,
        "rollout/policy_version": metrics.policy_version,
        "rollout/policy_lag": metrics.policy_lag,
        "rollout/written_fraction": metrics.written_fraction,
        "rollout/discarded_tokens": metrics.discarded_tokens,
        "loss/supervised": float(metrics.supervised),
        "rollout/logprob_diff_max": metrics.logprob_diff_max,
        "rollout/logprob_diff_mean": metrics.logprob_diff_mean,
        "flops/rollout": metrics.flops.rollout,
        "flops/teacher": metrics.flops.teacher,
        "flops/student": metrics.flops.student,
        "flops/of_full_length": flops_ratio(metrics.flops, metrics.flops_full),
        "seconds/step": sum(metrics.seconds.values()),
    }
    if metrics.stop_tokens:
        values["loss/stop_logprob_diff"] = metrics.stop_logprob_diff
    return values | {f"seconds/{phase}": value for phase, value in metrics.seconds.items()}


def running_totals(spent: Account) -> dict[str, float]:
    return {
        "total/flops": spent.flops.total,
        "total/flops_full_length": spent.flops_full.total,
        "total/flops_of_full_length": spent.ratio,
        "total/flops_probes": spent.probes,
        "total/flops_evaluation": spent.evaluation,
        "total/prefix_tokens": spent.prefix_tokens,
    }


def flops_ratio(flops: Flops, full: Flops) -> float:
    """The share of the full-length counterfactual's FLOPs; NaN where that counts none."""
    return flops.total / full.total if full.total else float("nan")


def kl_heat_map(rows: Sequence[np.ndarray]) -> np.ndarray:
    """Mean KL by step (down, the newest last) and position (right); ``rows``: S of [L_s], ragged.

    Returns uint8 [height, width, 3]: the logarithm of the KL from dark (KL_FLOOR) to bright
    (KL_CEILING), grey where no rollout reached. Drawn without matplotlib's figures, one of which
    would cost as much as a whole step of a small model.
    """
    from matplotlib import colormaps

    grid_SL = shrink(stack_rows(rows), MAX_IMAGE_WIDTH)
    held = np.clip(np.nan_to_num(grid_SL, nan=KL_FLOOR), KL_FLOOR, KL_CEILING)
    shade = np.log(held / KL_FLOOR) / np.log(KL_CEILING / KL_FLOOR)
    image = (colormaps["viridis"](shade)[..., :3] * 255).astype(np.uint8)
    image[np.isnan(grid_SL)] = 128
    down = max(MIN_IMAGE_SIDE // image.shape[0], 1)
    right = max(MIN_IMAGE_SIDE // image.shape[1], 1)
    return image.repeat(down, axis=0).repeat(right, axis=1)


def _inline(detail: Mapping[str, str | int | float]) -> str:
    return ", ".join(f"{name} {value}" for name, value in detail.items())


def _block(text: str) -> str:
    """``text`` as a Markdown code block: indented, so that no text of a model can end it."""
    return "\n".join("    " + line for line in text.split("\n"))
