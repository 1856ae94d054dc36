"""Trains the SORT-CHAIN teacher and students from scratch and writes them as Hugging Face folders.

The teacher learns true data, then how to go on from a plan that a student began badly. Student A
executes well and plans badly; student B plans well and executes badly. Plain PyTorch on a CPU.
"""

import argparse
import dataclasses
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table
from transformers import GenerationConfig, Qwen3Config, Qwen3ForCausalLM

from megatron_prefix.tasks import sort_chain

CLIP_GRAD = 1.0


@dataclass(frozen=True)
class Stage:
    """Supervised steps on one kind of data."""

    plan: sort_chain.PlanKind
    steps: int
    lr: float
    warmup_steps: int = 0
    final_lr: float = 1.0  # share of lr that a linear decay ends at
    batch_size: int = 32


@dataclass(frozen=True)
class ToyModel:
    """A model's shape, its training in stages, and the seed of weights and data."""

    hidden_size: int
    num_layers: int
    intermediate_size: int
    stages: tuple[Stage, ...]
    seed: int


TEACHER = ToyModel(
    96,
    3,
    256,
    (
        Stage("sorted", 1500, 3e-3, warmup_steps=20, final_lr=0.1),
        Stage("corrupt", 200, 2e-3, warmup_steps=20, final_lr=0.1),
    ),
    seed=100,
)
# Execution is learnt all at once and late, with some seeds only: this one does in 750 steps.
STUDENT_A = ToyModel(
    64,
    2,
    192,
    (Stage("random", 750, 4e-3, warmup_steps=50), Stage("sorted", 20, 5e-4)),
    seed=201,
)
STUDENT_B = ToyModel(
    64, 2, 192, (Stage("sorted", 300, 2e-3, warmup_steps=20, final_lr=0.15),), seed=300
)
MODELS = {"teacher": TEACHER, "student_a": STUDENT_A, "student_b": STUDENT_B}


def build_model(toy: ToyModel) -> Qwen3ForCausalLM:
    """A fresh Qwen3 in fp32 with the task's vocabulary and tied embeddings."""
    torch.manual_seed(toy.seed)
    num_heads = 4
    config = Qwen3Config(
        vocab_size=len(sort_chain.SYMBOLS),
        hidden_size=toy.hidden_size,
        intermediate_size=toy.intermediate_size,
        num_hidden_layers=toy.num_layers,
        num_attention_heads=num_heads,
        num_key_value_heads=num_heads,
        head_dim=toy.hidden_size // num_heads,
        max_position_embeddings=256,
        initializer_range=0.05,
        rope_parameters={"rope_theta": 10000.0, "rope_type": "default"},
        tie_word_embeddings=True,
        pad_token_id=sort_chain.PAD_ID,
        bos_token_id=sort_chain.BOS_ID,
        eos_token_id=sort_chain.EOS_ID,
        dtype="float32",
    )
    return Qwen3ForCausalLM(config)


def lr_at(stage: Stage, step: int) -> float:
    """The learning rate of a step, from 0."""
    warmup = min(1.0, (step + 1) / max(1, stage.warmup_steps))
    return stage.lr * warmup * (1.0 - (1.0 - stage.final_lr) * step / stage.steps)


def sft_loss(model: Qwen3ForCausalLM, rows: sort_chain.SftRows) -> torch.Tensor:
    """Mean cross-entropy over the tokens that the mask lets in."""
    ids = torch.from_numpy(rows.input_ids)
    labels = ids.masked_fill(~torch.from_numpy(rows.loss_mask), -100)[:, 1:]
    logits = model(input_ids=ids[:, :-1], use_cache=False).logits
    return F.cross_entropy(logits.flatten(0, 1), labels.flatten())


def train_stage(
    model: Qwen3ForCausalLM, stage: Stage, rng: np.random.Generator
) -> Iterator[tuple[int, float]]:
    """Trains in place; yields each step's number, from 1, and its loss."""
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=stage.lr, betas=(0.9, 0.95), weight_decay=0.0
    )
    for step in range(stage.steps):
        for group in optimizer.param_groups:
            group["lr"] = lr_at(stage, step)
        loss = sft_loss(model, sort_chain.make_sft_rows(stage.batch_size, rng, stage.plan))
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), CLIP_GRAD)
        optimizer.step()
        yield step + 1, loss.item()


def train_model(name: str, toy: ToyModel, progress: Progress) -> Qwen3ForCausalLM:
    """Builds a model and trains it through all of its stages."""
    model = build_model(toy).train()
    rng = np.random.default_rng(toy.seed)
    for number, stage in enumerate(toy.stages, 1):
        label = f"{name} {number}/{len(toy.stages)} ({stage.plan} plans)"
        task = progress.add_task(label, total=stage.steps, loss=float("nan"))
        for step, loss in train_stage(model, stage, rng):
            progress.update(task, completed=step, loss=loss)
    return model.eval()


@torch.no_grad()
def greedy(model: Qwen3ForCausalLM, problems: list[sort_chain.Problem]) -> list[list[int]]:
    """Greedy responses of at most 75 tokens, padded after the end symbol."""
    prompts = torch.tensor([sort_chain.encode(problem.prompt) for problem in problems])
    config = GenerationConfig(
        do_sample=False,
        max_new_tokens=sort_chain.RESPONSE_LENGTH,
        pad_token_id=sort_chain.PAD_ID,
        eos_token_id=sort_chain.EOS_ID,
    )
    mask = torch.ones_like(prompts)
    out = model.generate(prompts, attention_mask=mask, generation_config=config)  # type: ignore[misc]
    return out[:, sort_chain.PROMPT_LENGTH :].tolist()


def held_out_scores(model: Qwen3ForCausalLM, n: int) -> tuple[float, float, float]:
    """Accuracy, plan and execution in percent, greedy, on n problems of the held-out seed."""
    problems = sort_chain.make_problems(n, sort_chain.HELD_OUT_SEED)
    scored = [
        sort_chain.score(problem, generated)
        for problem, generated in zip(problems, greedy(model, problems), strict=True)
    ]
    executed = [answer.execution for answer in scored if answer.valid_plan]
    return (
        100.0 * float(np.mean([answer.accuracy for answer in scored])),
        100.0 * float(np.mean([answer.plan for answer in scored])),
        100.0 * float(np.mean(executed)) if executed else 0.0,
    )


def write_model(model: Qwen3ForCausalLM, folder: Path) -> None:
    """Writes config, generation config, fp32 safetensors and the tokenizer."""
    model.generation_config = GenerationConfig(
        do_sample=True,
        temperature=1.0,
        pad_token_id=sort_chain.PAD_ID,
        bos_token_id=sort_chain.BOS_ID,
        eos_token_id=sort_chain.EOS_ID,
    )
    model.save_pretrained(str(folder))
    sort_chain.write_tokenizer(folder)


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--output",
        type=Path,
        default=sort_chain.model_folder("teacher").parent,
        help="folder for teacher/, student_a/ and student_b/ (default: %(default)s)",
    )
    parser.add_argument("--only", choices=sorted(MODELS), help="make one of them")
    parser.add_argument(
        "--seed", type=int, help="of weights and data (default: each model's own); with --only"
    )
    parser.add_argument(
        "--held-out", type=int, default=sort_chain.NUM_HELD_OUT, help="problems to score them on"
    )
    args = parser.parse_args(argv)
    if args.seed is not None and not args.only:
        parser.error(f"--seed {args.seed} is for one model; name it with --only")
    return args


def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    torch.set_num_threads(1)  # sums in one order on any machine, so one seed gives one model
    console = Console()
    table = Table("model", "parameters", "accuracy %", "plan %", "execution %", "seconds")
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn("{task.completed} steps"),
    )
    loss_column = TextColumn("loss {task.fields[loss]:.3f}")
    with Progress(*columns, loss_column, TimeRemainingColumn(), console=console) as progress:
        for name in [args.only] if args.only else list(MODELS):
            start = time.monotonic()
            toy = MODELS[name]
            if args.seed is not None:
                toy = dataclasses.replace(toy, seed=args.seed)
            model = train_model(name, toy, progress)
            scores = held_out_scores(model, args.held_out)
            write_model(model, args.output / name)
            seconds = time.monotonic() - start
            cells = [f"{value:.1f}" for value in (*scores, seconds)]
            table.add_row(name, str(model.num_parameters()), *cells)
    console.print(table)
    console.print(f"written to {args.output}; scored greedily on {args.held_out} held-out problems")


if __name__ == "__main__":
    main()
