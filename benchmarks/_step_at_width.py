"""A training step of real width with random weights: what ``gpu_step.py`` measures."""

import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
import transformers

from megatron_prefix.batch import pack, plan_microbatches
from megatron_prefix.config import Fp8Config, LossConfig, ModelConfig, OptimizerConfig
from megatron_prefix.layout import model_layout
from megatron_prefix.loss.task import GPU_LIMITS, chosen_chunk
from megatron_prefix.mcore.groups import build_groups
from megatron_prefix.mcore.hf_map import read_hf_model
from megatron_prefix.mcore.model import MegatronModel, build_model
from megatron_prefix.mcore.optimizer import TrainableStudent, make_trainable
from megatron_prefix.student import Objective, forward_backward
from megatron_prefix.teacher import ColocatedTeacher
from megatron_prefix.types import Rollout, TeacherHead

BYTES_A_PARAMETER = 18  # bf16 weight, fp32 gradient, fp32 copy and two moments
FP8_COPIES = 2  # bytes a trunk parameter: Transformer Engine's copy and its transpose
MOST_LAYERS = 36
FP8 = {
    "off": Fp8Config(),
    "blockwise": Fp8Config("e4m3", "blockwise"),
    "tensorwise": Fp8Config("hybrid", "tensorwise"),
    "delayed": Fp8Config("hybrid", "delayed", first_last_layers_bf16=False),
}


@dataclass(frozen=True)
class Width:
    hidden: int = 4096
    ffn: int = 12288
    heads: int = 32
    query_groups: int = 8
    head_dim: int = 128
    vocabulary: int = 151936

    @property
    def layer_parameters(self) -> int:
        attention = self.hidden * self.head_dim * (2 * self.heads + 2 * self.query_groups)
        return attention + 3 * self.hidden * self.ffn

    @property
    def vocabulary_parameters(self) -> int:
        """Embedding and head, untied."""
        return 2 * self.hidden * self.vocabulary

    @property
    def saved_bytes(self) -> int:
        """Of a token and layer, kept for the backward in bf16: two norms' inputs and outputs; what
        makes queries, keys and values before and after their own norm and rotation; attention's
        output; both halves that go into SwiGLU, and what comes out."""
        queries, keys = self.heads * self.head_dim, self.query_groups * self.head_dim
        attention = 3 * (queries + keys) + keys + queries
        return 2 * (4 * self.hidden + attention + 3 * self.ffn)


@dataclass(frozen=True)
class Load:
    """Of one step."""

    rollouts: int = 32
    microbatches: int = 4
    prompt: int = 512  # tokens at most; unlike
    prefix: int = 512

    @property
    def most_rollouts(self) -> int:
        """Of a microbatch, where they are spread evenly."""
        return -(-self.rollouts // self.microbatches)

    def rollouts_of(self, vocabulary: int, seed: int) -> list[Rollout]:
        draw = torch.Generator().manual_seed(seed)

        def ids(most: int) -> tuple[int, ...]:
            length = int(torch.randint(most // 2, most + 1, (1,), generator=draw))
            return tuple(torch.randint(vocabulary, (length,), generator=draw).tolist())

        result = []
        for index in range(self.rollouts):
            prefix = ids(self.prefix)
            logprobs = (0.0,) * len(prefix)
            result.append(Rollout(ids(self.prompt), prefix, logprobs, "length", 0, index))
        return result


@dataclass(frozen=True)
class Row:
    fp8: str
    layers: int
    teacher_layers: int
    parameters: int
    tokens: int  # packed, a step
    teacher_ms: float
    student_ms: float
    optimizer_ms: float
    tokens_a_second: float
    peak_gib: float
    first_loss: float
    last_loss: float


def teacher_layers_of(layers: int) -> int:
    return max(1, layers // 4)


def needed_bytes(layers: int, width: Width, load: Load) -> int:
    """What a step holds at its fullest, at most: student and teacher, a microbatch's activations
    at its longest, the loss of its prefixes.

    At hidden size 4096 in GB (1e9 bytes): 3.9 a student's layer with its FP8 copies, 0.4 for each
    four a teacher's, 1.2 of activations a layer (8,192 tokens); 22.4 for embedding and head, 2.5
    for the teacher's embedding and the head that it lends, 4.4 for the loss. 20 layers take 132.5.
    """
    trunk, ends = layers * width.layer_parameters, width.vocabulary_parameters
    student = (BYTES_A_PARAMETER + FP8_COPIES) * trunk + BYTES_A_PARAMETER * ends
    teacher = 2 * (teacher_layers_of(layers) * width.layer_parameters + ends)
    tokens = load.most_rollouts * (load.prompt + load.prefix)
    activations = tokens * layers * width.saved_bytes
    return student + teacher + activations + _loss_bytes(width, load)


def _loss_bytes(width: Width, load: Load) -> int:
    """Both models' logits of a chunk, their gradient, and the zeros that stand for dW."""
    positions = load.most_rollouts * load.prefix
    chunk = chosen_chunk(positions, 2 * width.vocabulary, GPU_LIMITS)
    return chunk * width.vocabulary * (2 * 4 + 2) + width.vocabulary_parameters


def layers_that_fit(free_bytes: int, width: Width, load: Load, share: float = 0.9) -> int:
    """Layers of the student, with a teacher of a quarter as many, in ``share`` of the memory; the
    rest is for libraries and for what lies in pieces. At least one, at most 36."""
    fitting = (
        layers
        for layers in range(MOST_LAYERS, 1, -1)
        if needed_bytes(layers, width, load) <= share * free_bytes
    )
    return next(fitting, 1)


def write_config(folder: Path, width: Width, layers: int) -> Path:
    config = transformers.Qwen3Config(
        vocab_size=width.vocabulary,
        hidden_size=width.hidden,
        intermediate_size=width.ffn,
        num_hidden_layers=layers,
        num_attention_heads=width.heads,
        num_key_value_heads=width.query_groups,
        head_dim=width.head_dim,
        max_position_embeddings=8192,
        tie_word_embeddings=False,
        architectures=["Qwen3ForCausalLM"],
    )
    config.save_pretrained(folder)
    return folder


def random_model(config: ModelConfig, owner: str) -> MegatronModel:
    """Megatron's own initialisation: no weights are read."""
    groups = build_groups(model_layout(config, 1))
    hf = read_hf_model(config.hf_path)
    return build_model(config, hf, groups, owner=owner, with_head=owner == "student")


@dataclass(frozen=True)
class Pair:
    """Student and teacher on one rank, ready to step."""

    student: TrainableStudent
    teacher: ColocatedTeacher
    objective: Objective
    device: torch.device

    @classmethod
    def build(
        cls, folders: tuple[Path, Path], fp8: Fp8Config, device: torch.device, params_dtype: str
    ) -> "Pair":
        student, teacher = (
            ModelConfig(hf_path=str(folder), params_dtype=params_dtype) for folder in folders
        )
        learner = random_model(replace(student, fp8=fp8), "student")
        master = random_model(teacher, "teacher")
        vocabulary = learner.hf.shape.vocab_size
        head = torch.randn(
            learner.vocab_rows,
            master.hf.shape.hidden_size,
            dtype=master.config.params_dtype,
            device=device,
        )
        head.mul_(master.hf.shape.hidden_size**-0.5)[vocabulary:] = 0
        objective = Objective(LossConfig(), TeacherHead(head, vocabulary))
        trainable = make_trainable(learner, OptimizerConfig(lr=1e-4, lr_warmup_steps=1), 100)
        return cls(
            trainable, ColocatedTeacher(master, learner.groups.layout, device), objective, device
        )


def run(pair: Pair, load: Load, steps: int, multiple: int) -> list[tuple[float, ...]]:
    """Milliseconds of teacher, student and optimizer, loss and tokens, of each step, all on the
    same rollouts."""
    vocabulary = pair.student.model.hf.shape.vocab_size
    sampled = load.rollouts_of(vocabulary, seed=0)
    plan = plan_microbatches(sampled, load.microbatches, multiple=multiple)
    batches = [pack(sampled, plan, m, pair.device) for m in range(load.microbatches)]
    tokens = sum(batch.input_ids.numel() for batch in batches)
    rows = []
    for _ in range(steps):
        times = [_now(pair.device)]
        targets = pair.teacher.targets(sampled, plan)
        times.append(_now(pair.device))
        sums = forward_backward(pair.student, batches, targets, pair.objective, load.prefix)
        times.append(_now(pair.device))
        pair.student.update()
        times.append(_now(pair.device))
        spent = [1e3 * (b - a) for a, b in zip(times[:-1], times[1:], strict=True)]
        rows.append((*spent, sums.loss, tokens))
    return rows


def _now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


def summarise(
    name: str, pair: Pair, steps: Sequence[tuple[float, ...]], teacher_layers: int
) -> Row:
    """Medians without the first two steps."""
    warm = steps[2:]
    teacher, student, optimizer = (statistics.median(row[i] for row in warm) for i in range(3))
    whole, tokens = teacher + student + optimizer, int(steps[0][4])
    cuda = pair.device.type == "cuda"
    return Row(
        fp8=name,
        layers=pair.student.model.hf.shape.num_layers,
        teacher_layers=teacher_layers,
        parameters=sum(p.numel() for p in pair.student.model.module.parameters()),
        tokens=tokens,
        teacher_ms=teacher,
        student_ms=student,
        optimizer_ms=optimizer,
        tokens_a_second=1e3 * tokens / whole,
        peak_gib=torch.cuda.max_memory_allocated() / 2**30 if cuda else float("nan"),
        first_loss=steps[0][3],
        last_loss=steps[-1][3],
    )


def measure(
    name: str,
    folder: Path,
    width: Width,
    layers: int,
    load: Load,
    steps: int,
    device: torch.device,
    params_dtype: str = "bf16",
) -> Row:
    """In a world of one rank that is there already, Megatron's state too."""
    teacher_layers = teacher_layers_of(layers)
    folders = (
        write_config(folder / "student", width, layers),
        write_config(folder / "teacher", width, teacher_layers),
    )
    pair = Pair.build(folders, FP8[name], device, params_dtype)
    return summarise(name, pair, run(pair, load, steps, multiple=128), teacher_layers)
