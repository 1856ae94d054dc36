"""What a microbatch leaves in memory until its backward, and what works on it: an estimate.

By formula, from the tensors that autograd keeps in a layer. ``unfused`` are this project's modules
for machines without a GPU, whose peak a test measures; ``fused`` are Transformer Engine's kernels,
taken from their sources in the manner of Korthikanti et al. (arXiv 2205.05198): not measured.

Legend: T tokens of a microbatch (of a context-parallel rank's share of it), N prefix positions
among them, C context-parallel ranks, h hidden size, f columns of an MLP,
q and k widths of a rank's query and key heads, e bytes of an element, s ranks that share a token
between the tensor-parallel regions (sequence parallelism).
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING

from megatron_prefix.plan.stages import stage_layers
from megatron_prefix.validate import ValidModel

if TYPE_CHECKING:
    pass

DTYPE_BYTES = {"bf16": 2, "fp32": 4}
# The caller's, the residual, the norm's and what a layer makes.
HIDDEN_STATES = 4
FP32 = 4  # what norms and statistics compute in


@dataclass(frozen=True)
class Microbatch:
    """What a rank has of the largest one of a run: every prompt and prefix at its bound."""

    tokens: int  # T
    positions: int  # N, on the context-parallel rank that has most of them
    in_a_step: int  # of one replica
    longest: int = 0  # tokens of its longest sequence, on all its ranks together


def tokens_held(ranks: int, length: int) -> int:
    """Tokens of one sequence on each of ``ranks`` context-parallel ranks, padding and all."""
    return length if ranks == 1 else 2 * -(-length // (2 * ranks))


def positions_held(ranks: int, prompt: int, prefix: int) -> int:
    """Prefix positions of one sequence on the rank that has most: two pieces are each rank's
    (``context_shares.py``), and short prefixes lie in the last one alone."""
    first, end = prompt - 1, prompt + prefix - 1
    if ranks == 1:
        return prefix
    size = tokens_held(ranks, end) // 2

    def within(piece: int) -> int:
        return max(0, min(end, (piece + 1) * size) - max(first, piece * size))

    return max(within(rank) + within(2 * ranks - 1 - rank) for rank in range(ranks))


@dataclass(frozen=True)
class Latent:
    """Columns of latent attention (MLA): ranks whole on every rank, heads over its own."""

    query_rank: int
    key_rank: int
    rope: int
    query: float  # of all heads, with the rotated part; keys as many
    key_value: float  # what the key-value latent is projected to
    value: float

    @classmethod
    def of(cls, model: ValidModel) -> "Latent":
        settings = model.hf.settings
        heads = model.hf.shape.num_attention_heads / model.layout.tp
        nope, rope = settings["qk_head_dim"], settings["qk_pos_emb_head_dim"]
        return cls(
            query_rank=settings["q_lora_rank"] or 0,
            key_rank=settings["kv_lora_rank"],
            rope=rope,
            query=heads * (nope + rope),
            key_value=heads * (nope + settings["v_head_dim"]),
            value=heads * settings["v_head_dim"],
        )


@dataclass(frozen=True)
class Widths:
    """Columns of one rank, and bytes of an element."""

    hidden: int
    shared: float  # hidden / s
    query: float
    key: float
    head: int
    heads: float
    mlp: float
    routed: float  # routed copies of a token that a rank's experts see, in the mean
    expert: float  # columns of one expert
    always: float  # columns of the shared experts
    qk_norm: bool
    latent: "Latent | None"
    element: int
    context: int  # C

    @classmethod
    def of(cls, model: ValidModel) -> "Widths":
        shape, layout, config = model.hf.shape, model.layout, model.config
        share = layout.tp if config.sequence_parallel else 1
        chosen = model.hf.settings.get("moe_router_topk", 0)
        return cls(
            hidden=shape.hidden_size,
            shared=shape.hidden_size / share,
            query=shape.num_attention_heads * shape.kv_channels / layout.tp,
            key=shape.num_query_groups * shape.kv_channels / layout.tp,
            head=shape.kv_channels,
            heads=shape.num_attention_heads / layout.tp,
            mlp=shape.ffn_hidden_size / layout.tp,
            # Expert-tensor-parallel ranks gather each other's tokens.
            routed=chosen * layout.expert_tp / share,
            expert=shape.moe_ffn_hidden_size / layout.expert_tp,
            always=shape.shared_ffn_hidden_size / layout.tp,
            qk_norm=bool(model.hf.settings.get("qk_layernorm")),
            latent=Latent.of(model) if model.hf.latent_attention else None,
            element=DTYPE_BYTES[config.params_dtype],
            context=layout.cp,
        )

    @property
    def keys_and_values(self) -> float:
        """Columns of one token's; a latent's values are made as wide as its keys."""
        return 2 * (self.latent.query if self.latent else self.key)

    def columns(self, sparse: bool) -> float:
        """That one token passes in a layer's MLP or experts."""
        return self.routed * self.expert + self.always if sparse else self.mlp


def training_peak(model: ValidModel, stage: int, batch: Microbatch, *, fused: bool) -> float:
    """Bytes on a rank of ``stage`` at the worst moment of forward and backward, the loss's own
    workspace aside: :func:`in_flight` microbatches' stored tensors, and one layer at work."""
    widths, shape = Widths.of(model), model.hf.shape
    layers = stage_layers(model.layers, stage)
    across = 0.0 if fused else _across_ranks(widths, batch.longest)
    by_layer = [_layer(widths, layer in shape.sparse_layers, fused) + across for layer in layers]
    work = _at_work(widths, any(layer in shape.sparse_layers for layer in layers), fused)
    if model.config.recompute_granularity == "full":
        stored = len(by_layer) * widths.element * widths.shared
        work += max(by_layer)
    else:
        stored = sum(by_layer)
    if model.layout.pp > 1:  # what came from the stage before and went to the next one
        stored += 2 * widths.element * widths.shared
    if stage == model.layout.pp - 1:
        stored += _norm(widths, fused)
    held = in_flight(model.layout.pp, stage, batch.in_a_step) * stored
    return batch.tokens * (held + work) + _at_head(model, widths, stage, batch)


def in_flight(stages: int, stage: int, microbatches: int) -> int:
    """Microbatches between their forward and their backward on a stage of a 1F1B pipeline."""
    return min(microbatches, stages - stage)


def scoring_peak(model: ValidModel, stage: int, tokens: int, *, fused: bool) -> float:
    """Bytes of a forward that nothing is kept of: of a rank's ``tokens``, the layer that takes
    most."""
    widths, shape = Widths.of(model), model.hf.shape
    layers = stage_layers(model.layers, stage)
    at_work = [_scoring(widths, layer in shape.sparse_layers, fused) for layer in layers]
    # Keys and values of all context-parallel ranks, as they come and in order.
    gathered = 2 * widths.context * widths.keys_and_values if widths.context > 1 else 0
    most = max(*at_work, HIDDEN_STATES * widths.shared + gathered)
    return tokens * widths.element * most


def _scoring(widths: Widths, sparse: bool, fused: bool) -> float:
    """Columns a token at the worst moment of one layer's forward, in its MLP or experts."""
    if sparse:
        return (2 + 2 * widths.routed) * widths.hidden + 3 * widths.columns(sparse)
    return HIDDEN_STATES * widths.shared + (3 if fused else 5) * widths.mlp


def _layer(widths: Widths, sparse: bool, fused: bool) -> float:
    """Stored bytes a token of one decoder layer."""
    norms = 2 * (_norm(widths, fused) + widths.element * widths.shared)
    return norms + _attention(widths, fused) + _feed_forward(widths, sparse, fused)


def _norm(widths: Widths, fused: bool) -> float:
    """Its input alone, or an fp32 copy of it and the normalised one; what it gives is the next
    module's to keep."""
    return widths.shared * (widths.element if fused else 2 * FP32)


def _attention(widths: Widths, fused: bool) -> float:
    if widths.latent:
        return _latent_attention(widths, widths.latent, fused)
    q, k, e = widths.query, widths.key, widths.element
    stored = e * (q + 2 * k) + e * (2 * q + k) + FP32 * widths.heads
    if fused:
        return stored + (e * q if widths.qk_norm else 0)
    stored += 4 * e * widths.head  # cosine and sine, for queries and for keys
    if widths.qk_norm:  # fp32 copies; the key itself is a view where it is fp32 already
        stored += 2 * FP32 * q + (1 if e == FP32 else 2) * FP32 * k
    return stored


def _across_ranks(widths: Widths, longest: int) -> float:
    """Of context-parallel ranks: the others' keys and values, and which of them a query sees.
    Transformer Engine passes them round in a ring, and keeps a rank's own."""
    if widths.context == 1:
        return 0.0
    own = widths.keys_and_values if widths.latent else widths.key  # that are counted above
    return widths.element * (widths.context * widths.keys_and_values - own + longest)


def _latent_attention(widths: Widths, latent: Latent, fused: bool) -> float:
    """The norms of both latents, then attention over heads of unlike widths: torch's kernel wants
    values as wide as queries."""
    e, ranks = widths.element, latent.query_rank + latent.key_rank
    shared = FP32 * widths.heads + e * latent.value
    if fused:
        return shared + e * (2 * ranks + latent.rope + 2 * latent.query + latent.key_value)
    # The key-value latent's input to its norm is a view where it is fp32 already.
    norms = 2 * FP32 * ranks + (e * latent.rope if e == FP32 else 0)
    return shared + norms + e * (ranks + 4 * latent.query + 4 * latent.rope)


def _feed_forward(widths: Widths, sparse: bool, fused: bool) -> float:
    e = widths.element
    if not sparse:
        return e * widths.mlp * (3 if fused else 5)
    routed = widths.routed * e * (widths.hidden + widths.expert * (3 if fused else 6))
    return routed + e * widths.always * (3 if fused else 5)


def _at_work(widths: Widths, sparse: bool, fused: bool) -> float:
    """Gradients of a layer in the backward: of two hidden states and of the MLP's columns."""
    gradient = widths.element if fused else FP32
    return 2 * gradient * widths.hidden + widths.element * widths.columns(sparse)


def _at_head(model: ValidModel, widths: Widths, stage: int, batch: Microbatch) -> float:
    """Hidden states of the prefix positions and their gradient, on the last stage."""
    if stage != model.layout.pp - 1:
        return 0.0
    return 2 * batch.positions * widths.element * widths.hidden


def kl_workspace(rows: int, positions: int, *, ranks: int, fused: bool, chunk_size: int = 0) -> int:
    """Bytes of the loss's logits: two buffers for each chunk in flight (``loss/task.py``).

    ``rows``: of this rank's vocabulary shard; ``ranks``: that share the vocabulary.
    """
    # Brings torch along, which `plan --help` need not wait for.
    from megatron_prefix.loss.task import CPU_LIMITS, GPU_LIMITS, chosen_chunk

    buffers = 2 if ranks == 1 else 4
    limits = GPU_LIMITS if fused else CPU_LIMITS
    chunk = chunk_size or chosen_chunk(positions, rows * buffers, limits)
    return buffers * min(chunk, positions) * rows * FP32
