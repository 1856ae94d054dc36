"""What a prefix costs in floating-point operations, by formula; a multiply-add is two.

Counted are the matrix products of dense and mixture-of-experts decoders: projections, attention,
MLP, router, LM head. Left out, as ``torch.utils.flop_counter`` does: norms, activations, softmax,
rotary embeddings, the divergence's elementwise part; and what an engine does besides the model's
own arithmetic: padding, recomputed activations, speculative or aborted work.

Legend: P prompt tokens, L prefix tokens, S = P + L - 1 tokens that go through a trunk: the last
sampled token is a label only.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from megatron_prefix.types import Flops

BACKWARD = 3  # forward, input gradients and weight gradients: one product each


@dataclass(frozen=True)
class ModelShape:
    """The sizes that a decoder's FLOPs follow from."""

    layers: int
    hidden: int
    heads: int
    kv_heads: int
    head_dim: int
    ffn_columns: int  # of the gated MLPs that one token passes, summed over the layers
    vocab: int
    router_columns: int = 0  # experts that a token is scored against, summed over the layers
    # Latent attention (MLA), as a trainer computes it: keys and values out of the latent for each
    # token. A server that absorbs those products into queries and outputs does others.
    latent_weights: int = 0  # of one layer's projections; 0: they follow from the heads
    latent_pair: int = 0  # widths of a head's query and of its value, together
    # Of ``layers``, those whose tokens meet the last ``window`` keys alone.
    windowed_layers: int = 0
    window: int = 0

    @property
    def attention_weights(self) -> int:
        """Of one layer's projections."""
        return self.latent_weights or self.hidden * self.head_dim * 2 * (self.heads + self.kv_heads)

    @property
    def pair_width(self) -> int:
        """Products of one head where one query meets one key, with its value."""
        return self.latent_pair or 2 * self.head_dim

    @property
    def trunk_weights(self) -> int:
        """Weights that multiply each token between the embedding and the LM head."""
        mlp = self.hidden * (3 * self.ffn_columns + self.router_columns)
        return self.layers * self.attention_weights + mlp


def model_shape(config: Mapping[str, Any]) -> ModelShape:
    """The shape behind a Hugging Face ``config.json`` of the Llama, Qwen, Qwen3-MoE, Mixtral,
    DeepSeek or GPT-OSS manner."""
    layers, hidden = config["num_hidden_layers"], config["hidden_size"]
    heads, experts = config["num_attention_heads"], _num_experts(config)
    sparse = _sparse_layers(config, layers)
    width = config.get("moe_intermediate_size") or config["intermediate_size"]
    shared = config.get("n_shared_experts") or 0
    active = ((config.get("num_experts_per_tok") or 0) + shared) * width
    return ModelShape(
        layers=layers,
        hidden=hidden,
        heads=heads,
        kv_heads=config.get("num_key_value_heads") or heads,
        head_dim=config.get("head_dim") or hidden // heads,
        ffn_columns=sparse * active + (layers - sparse) * config["intermediate_size"],
        vocab=config["vocab_size"],
        router_columns=sparse * experts,
        windowed_layers=(config.get("layer_types") or []).count("sliding_attention"),
        window=config.get("sliding_window") or 0,
        **_latent(config),
    )


def _latent(config: Mapping[str, Any]) -> dict[str, int]:
    if "kv_lora_rank" not in config:
        return {}
    hidden, heads, rank = (
        config[k] for k in ("hidden_size", "num_attention_heads", "kv_lora_rank")
    )
    nope, rope = config["qk_nope_head_dim"], config["qk_rope_head_dim"]
    value, query_rank = config["v_head_dim"], config.get("q_lora_rank") or 0
    query = heads * (nope + rope)
    weights = (hidden + query) * query_rank if query_rank else hidden * query
    weights += hidden * (rank + rope) + rank * heads * (nope + value) + heads * value * hidden
    return {"latent_weights": weights, "latent_pair": nope + rope + value}


def _num_experts(config: Mapping[str, Any]) -> int:
    """By Qwen3-MoE's published configs, by Mixtral's and transformers', by DeepSeek's."""
    names = ("num_experts", "num_local_experts", "n_routed_experts")
    return next((int(config[name]) for name in names if config.get(name)), 0)


def _sparse_layers(config: Mapping[str, Any], layers: int) -> int:
    if not _num_experts(config):
        return 0
    dense, every = (
        config.get("mlp_only_layers") or range(config.get("first_k_dense_replace") or 0),
        config.get("decoder_sparse_step", 1),
    )
    return sum(layer not in dense and (layer + 1) % every == 0 for layer in range(layers))


def trunk_flops(shape: ModelShape, tokens: int) -> float:
    """Forward of one causal sequence of ``tokens`` through the trunk.

    Token i attends to i + 1 keys, with one product for the scores and one for the values. A cache
    changes when a key is computed, never how many are met: prefill and decode sum to the same.
    """
    met = (shape.layers - shape.windowed_layers) * _pairs(tokens, tokens)
    met += shape.windowed_layers * _pairs(tokens, shape.window)
    attention = 2.0 * shape.heads * shape.pair_width * met
    return 2.0 * shape.trunk_weights * tokens + attention


def _pairs(tokens: int, window: int) -> float:
    """Keys that all the tokens of a sequence meet together, each at most ``window``."""
    growing = min(tokens, window)
    return growing * (growing + 1) / 2 + (tokens - growing) * window


def head_flops(shape: ModelShape, positions: int) -> float:
    """Logits of ``positions`` hidden states over the real vocabulary."""
    return 2.0 * shape.hidden * shape.vocab * positions


def rollout_flops(
    student: ModelShape,
    teacher: ModelShape,
    prompt_tokens: int,
    prefix_tokens: int,
    loss_start: int = 0,
) -> Flops:
    """One rollout through sampler, teacher and student.

    The sampler prefills the prompt and decodes with a cache, one row of logits a sampled token; a
    prompt that several samples share is counted for each. The teacher goes forward once. The
    student goes forward and backward; both LM heads are applied at the prefix positions alone,
    from ``loss_start`` on, and where there are none, neither model is run.
    """
    tokens = prompt_tokens + max(prefix_tokens - 1, 0)
    trunk = trunk_flops(student, tokens)
    sampled = trunk + head_flops(student, prefix_tokens)
    scored = prefix_tokens - loss_start
    if scored <= 0:
        return Flops(rollout=sampled)
    return Flops(
        rollout=sampled,
        teacher=trunk_flops(teacher, tokens) + head_flops(teacher, scored),
        student=BACKWARD * (trunk + head_flops(student, scored)),
    )


def step_flops(
    student: ModelShape,
    teacher: ModelShape,
    lengths: Iterable[tuple[int, int]],
    loss_start: int = 0,
) -> Flops:
    """The sum over rollouts given as (prompt tokens, prefix tokens)."""
    costs = (rollout_flops(student, teacher, *pair, loss_start) for pair in lengths)
    return sum(costs, Flops())
