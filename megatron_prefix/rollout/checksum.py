"""The proof that servers hold the trainer's weights: SGLang's own hashes, computed here.

``/weights_checker`` answers a hash of every tensor that a server holds. A :class:`WeightHasher`
computes the same ones from the tensors that are published, one at a time as they pass by, and
:func:`verify` compares. SGLang fuses some tensors (q, k and v; gate and up; the experts of a
layer), splits them over its tensor-parallel ranks and pads the vocabulary; so does the hasher.

Of DeepSeek's latent attention a server also keeps products of the up-projection, which are no
parameters of its own: their source is hashed. On a GPU its shared expert may be one of the stacked
experts, so that there DeepSeek is not compared; GPT-OSS, which SGLang rearranges, is nowhere.

Tested against servers with tensor parallel 1 in bf16 and fp32. Servers that hold quantized weights,
or experts split by expert parallelism or rearranged for a kernel, have other hashes.
"""

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

import torch

from megatron_prefix.rollout.client import SglangClient
from megatron_prefix.rollout.hashing import new_hash
from megatron_prefix.rollout.protocol import SglangError

VOCABULARY_MULTIPLE = 64  # SGLang's padding of embeddings and heads
CPU_WIDTH_MULTIPLE = 32  # its padding of an MLP's width on each tensor-parallel rank of a CPU
_SHOWN = 6  # tensors that an error names
COMPARED = (
    "LlamaForCausalLM",
    "MixtralForCausalLM",
    "Qwen2ForCausalLM",
    "Qwen3ForCausalLM",
    "Qwen3MoeForCausalLM",
)
_COMPARED_ON_CPU = ("DeepseekV2ForCausalLM", "DeepseekV3ForCausalLM")


def is_compared(architecture: str, device: str) -> bool:
    """Whether a server on ``device`` (cuda, cpu) has hashes that are computed here too."""
    return architecture in COMPARED or (device == "cpu" and architecture in _COMPARED_ON_CPU)


class WeightsDiffer(SglangError):
    """A server does not hold the weights that were published; the message names the tensors."""


@dataclass(frozen=True)
class ServedLayout:
    """How a server holds a model, and where: what its hashes depend on."""

    device: str  # cuda | cpu: SGLang hashes differently on each
    dtype: torch.dtype
    tensor_model_parallel_size: int = 1
    num_key_value_heads: int = 1
    num_experts: int = 0
    num_shared_experts: int = 0
    latent_attention: bool = False  # DeepSeek's
    query_latent: bool = False  # latent attention whose queries have a latent too


@dataclass(frozen=True)
class _Piece:
    """A tensor's place in the server's tensor ``fused``: number ``place`` of ``of``."""

    fused: str
    place: int = 0
    of: int = 1
    split: str = ""  # vocabulary | heads | rows, columns [of ...]; empty: every rank has it whole


@dataclass
class _Fused:
    """A server's tensor in the making: pieces are hashed in order, early ones wait."""

    device: str
    of: int
    hashed: int = 0
    waiting: dict[int, torch.Tensor] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self._hash = new_hash(self.device)

    def add(self, place: int, tensor: torch.Tensor) -> None:
        self.waiting[place] = tensor
        while self.hashed in self.waiting:
            self._hash.update(self.waiting.pop(self.hashed))
            self.hashed += 1

    def hexdigest(self) -> str:
        return self._hash.hexdigest()


class WeightHasher:
    """Hashes a model's tensors as they pass by, under the names that SGLang has for them."""

    def __init__(self, layout: ServedLayout) -> None:
        self._layout = layout
        self._fused: dict[tuple[int, str], _Fused] = {}  # by rank and name

    def passing(
        self, buckets: Iterable[list[tuple[str, torch.Tensor]]]
    ) -> Iterator[list[tuple[str, torch.Tensor]]]:
        """The same buckets, hashed on their way to ``WeightGroup.publish``."""
        for bucket in buckets:
            for name, tensor in bucket:
                self.add(name, tensor)
            yield bucket

    def add(self, name: str, tensor: torch.Tensor) -> None:
        """One whole tensor under its Hugging Face name, in any dtype, on any device."""
        piece = _piece(name, self._layout)
        kept = name.endswith(_KEPT_IN_FP32)
        held = tensor.detach().to(torch.float32 if kept else self._layout.dtype)
        for rank in range(self._layout.tensor_model_parallel_size):
            fused = self._fused.setdefault(
                (rank, piece.fused), _Fused(self._layout.device, piece.of)
            )
            fused.add(piece.place, self._shard(held, piece.split, rank))

    def _shard(self, tensor: torch.Tensor, split: str, rank: int) -> torch.Tensor:
        size = self._layout.tensor_model_parallel_size
        if split == "vocabulary":
            return _padded(tensor, 0, VOCABULARY_MULTIPLE).chunk(size, 0)[rank]
        if split == "heads":  # with fewer heads than ranks, neighbours have the same one
            shards = min(size, self._layout.num_key_value_heads)
            return tensor.chunk(shards, 0)[rank * shards // size]
        if not split:
            return tensor
        way, _, of = split.partition(" of ")
        dim = ("rows", "columns").index(way)
        return _padded(tensor, dim, self._width_multiple(of)).chunk(size, dim)[rank]

    def _width_multiple(self, of: str) -> int:
        """What SGLang pads the width of an MLP or an expert to on a CPU, with zeros."""
        if not of or self._layout.device != "cpu":
            return 1
        experts = max(1, self._layout.num_shared_experts) if of == "shared experts" else 1
        return CPU_WIDTH_MULTIPLE * self._layout.tensor_model_parallel_size * experts

    def checksums(self) -> dict[int, dict[str, str]]:
        """By tensor-parallel rank and name. Raises ValueError where a fused tensor lacks a part."""
        answers: dict[int, dict[str, str]] = {}
        for (rank, name), fused in self._fused.items():
            if fused.hashed != fused.of:
                raise ValueError(f"{name}: {fused.hashed} of its {fused.of} parts were published")
            answers.setdefault(rank, {})[name] = fused.hexdigest()
        return answers


def verify(
    client: SglangClient, expected: dict[int, dict[str, str]], *, timeout_s: float = 0.0
) -> None:
    """Raises WeightsDiffer naming the tensors where the server does not hold ``expected``.

    A tied head that was published under its own name too is not looked for.
    """
    served = client.weight_checksums(timeout_s=timeout_s)
    if sorted(served) != sorted(expected):
        raise WeightsDiffer(
            f"{client.url} has tensor-parallel ranks {sorted(served)}, not {sorted(expected)}"
        )
    for rank in sorted(expected):
        wrong = _differences(expected[rank], served[rank])
        if wrong:
            more = f" and {len(wrong) - _SHOWN} more" if len(wrong) > _SHOWN else ""
            raise WeightsDiffer(
                f"{client.url} (tensor-parallel rank {rank}) does not hold the published weights: "
                f"{'; '.join(wrong[:_SHOWN])}{more}"
            )


def _differences(expected: dict[str, str], served: dict[str, str]) -> list[str]:
    wrong = []
    for name in sorted(expected.keys() | served.keys()):
        here, there = (expected.get(name, "not published"), served.get(name, "not on the server"))
        tied = name == "lm_head.weight" and here == expected.get("model.embed_tokens.weight")
        if here != there and not tied:
            wrong.append(f"{name} (trainer {here}, server {there})")
    return wrong


def _padded(tensor: torch.Tensor, dim: int, multiple: int) -> torch.Tensor:
    missing = -tensor.shape[dim] % multiple
    if not missing:
        return tensor
    shape = list(tensor.shape)
    shape[dim] = missing
    return torch.cat([tensor, tensor.new_zeros(shape)], dim)


_EXPERT = re.compile(r"(?P<layer>.+\.experts)\.(?P<expert>\d+)\.(?P<part>\w+)\.weight")
_EXPERT_PARTS = {  # the server's tensor, place in it; Mixtral's names after the others'
    "gate_proj": ("w13_weight", 0),
    "up_proj": ("w13_weight", 1),
    "down_proj": ("w2_weight", 0),
    "w1": ("w13_weight", 0),
    "w3": ("w13_weight", 1),
    "w2": ("w2_weight", 0),
}
_QKV = {
    "self_attn.q_proj": ("self_attn.qkv_proj", 0, 3, "rows"),
    "self_attn.k_proj": ("self_attn.qkv_proj", 1, 3, "heads"),
    "self_attn.v_proj": ("self_attn.qkv_proj", 2, 3, "heads"),
}
_QUERY_LATENT = {
    "self_attn.q_a_proj": ("self_attn.fused_qkv_a_proj_with_mqa", 0, 2, ""),
    "self_attn.kv_a_proj_with_mqa": ("self_attn.fused_qkv_a_proj_with_mqa", 1, 2, ""),
}
_GATED = {
    "mlp.gate_proj": ("mlp.gate_up_proj", 0, 2, "rows of an mlp"),
    "mlp.up_proj": ("mlp.gate_up_proj", 1, 2, "rows of an mlp"),
    "shared_experts.gate_proj": ("shared_experts.gate_up_proj", 0, 2, "rows of shared experts"),
    "shared_experts.up_proj": ("shared_experts.gate_up_proj", 1, 2, "rows of shared experts"),
}
_WHOLE = {  # tensors that are not fused, by how their names end
    "model.embed_tokens.weight": "vocabulary",
    "lm_head.weight": "vocabulary",
    "self_attn.q_proj.weight": "rows",  # where it is not a part of _QKV
    "self_attn.q_b_proj.weight": "rows",
    "self_attn.kv_b_proj.weight": "rows",
    "self_attn.o_proj.weight": "columns",
    "mlp.down_proj.weight": "columns of an mlp",
    "shared_experts.down_proj.weight": "columns of shared experts",
}
_KEPT_IN_FP32 = "e_score_correction_bias"  # whatever the server's dtype


def _piece(name: str, layout: ServedLayout) -> _Piece:
    """Where a Hugging Face tensor is on a server."""
    expert = _EXPERT.fullmatch(name)
    if expert:
        fused, place = _EXPERT_PARTS[expert["part"]]
        each, split = (2, "rows of an mlp") if fused == "w13_weight" else (1, "columns of an mlp")
        place += each * int(expert["expert"])
        return _Piece(f"{expert['layer']}.{fused}", place, each * layout.num_experts, split)
    for part, (fused, place, of, split) in _parts(layout).items():
        if f".{part}." in name:
            return _Piece(name.replace(part, fused), place, of, split)
    for ending, split in _WHOLE.items():
        if name.endswith(ending):
            return _Piece(name, split=split)
    return _Piece(name)


def _parts(layout: ServedLayout) -> dict[str, tuple[str, int, int, str]]:
    if not layout.latent_attention:
        return _QKV | _GATED
    return _QUERY_LATENT | _GATED if layout.query_latent else _GATED
