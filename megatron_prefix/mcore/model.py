"""Builds a GPTModel of one layout from a Hugging Face config, and runs its trunk.

The only file that knows that the class is GPTModel (docs/decisions/0001).
Legend: T packed tokens, N prefix positions, H hidden size.
"""

import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.fusions import fused_bias_geglu
from megatron.core.models.gpt import GPTModel, gpt_layer_specs
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.tensor_parallel.mappings import gather_from_sequence_parallel_region
from megatron.core.transformer import MLATransformerConfig, TransformerConfig
from torch import Tensor

from megatron_prefix.config import ModelConfig
from megatron_prefix.layout import layers_by_stage, padded_vocab_size
from megatron_prefix.mcore.biased_experts import finish_biased_experts, quick_gelu
from megatron_prefix.mcore.fp8 import fp8_settings, keeps_own_scales
from megatron_prefix.mcore.group_router import use_group_router
from megatron_prefix.mcore.groups import ModelGroups
from megatron_prefix.mcore.hf_map import HfModel
from megatron_prefix.mcore.latent_attention import PackedYarnRotaryEmbedding, use_latent_attention
from megatron_prefix.mcore.local_rotary import PackedRotaryEmbedding
from megatron_prefix.mcore.local_spec import PackedAttention, local_block_spec
from megatron_prefix.mcore.sink_attention import SinkAttention
from megatron_prefix.mcore.yarn import YarnTransformerConfig
from megatron_prefix.types import PrefixBatch

DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}


@dataclass(frozen=True)
class MegatronModel:
    """A model's modules on this rank with everything that is needed to run and map them."""

    module: GPTModel
    config: TransformerConfig
    groups: ModelGroups
    hf: HfModel
    layers: tuple[int, ...]  # on each stage
    # Told the positions of a pack before each forward; None with Transformer Engine, and where each
    # layer makes its own angles.
    rotary: PackedRotaryEmbedding | PackedYarnRotaryEmbedding | None = None

    @property
    def vocab_rows(self) -> int:
        """Rows of one tensor-parallel shard of the padded vocabulary."""
        return padded_vocab_size(self.hf.shape.vocab_size, self.groups.layout.tp) // (
            self.groups.layout.tp
        )


def uses_transformer_engine() -> bool:
    """By the machine, not by what imports: TE modules raise without CUDA even on the CPU."""
    found = importlib.util.find_spec("transformer_engine") is not None
    return torch.cuda.is_available() and found


def transformer_config(
    model: ModelConfig, hf: HfModel, groups: ModelGroups, *, owner: str
) -> TransformerConfig:
    """Megatron's TransformerConfig. ``owner`` ("student", "teacher") is for error messages."""
    shape, dtype, te = hf.shape, DTYPES[model.params_dtype], uses_transformer_engine()
    recompute: dict[str, Any] = {}
    if model.recompute_granularity != "none":
        recompute["recompute_granularity"] = model.recompute_granularity
    if model.recompute_granularity == "full":
        recompute |= {"recompute_method": "uniform", "recompute_num_layers": 1}
    layers = layers_by_stage(
        shape.num_layers, groups.layout.pp, model.num_layers_in_first_pipeline_stage
    )
    uneven = {"num_layers_in_first_pipeline_stage": layers[0]} if len(set(layers)) > 1 else {}
    settings = dict(
        num_layers=shape.num_layers,
        hidden_size=shape.hidden_size,
        ffn_hidden_size=shape.ffn_hidden_size,
        num_attention_heads=shape.num_attention_heads,
        num_query_groups=shape.num_query_groups,
        kv_channels=shape.kv_channels,
        layernorm_epsilon=shape.rms_norm_eps,
        normalization="RMSNorm",
        gated_linear_unit=True,
        activation_func=_gate(hf, te),
        add_bias_linear=False,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        tensor_model_parallel_size=groups.layout.tp,
        pipeline_model_parallel_size=groups.layout.pp,
        context_parallel_size=groups.layout.cp,
        expert_model_parallel_size=groups.layout.ep,
        expert_tensor_parallel_size=groups.layout.expert_tp,
        sequence_parallel=model.sequence_parallel,
        params_dtype=dtype,
        pipeline_dtype=dtype,
        bf16=dtype == torch.bfloat16,
        # The loss carries its whole weight: Megatron must divide neither by microbatches nor by
        # data-parallel ranks (docs/decisions/0003).
        calculate_per_token_loss=True,
        use_cpu_initialization=not torch.cuda.is_available(),
        transformer_impl="transformer_engine" if te else "local",
        # On a CPU each of these fusions would start a torch.compile of seconds.
        persist_layer_norm=te,
        bias_dropout_fusion=te,
        bias_activation_fusion=te,
        masked_softmax_fusion=te,
        # Of latent attention Megatron-Core has a fused kernel with YaRN alone.
        apply_rope_fusion=te and hf.settings.get("rope_type", "yarn") == "yarn",
        moe_grouped_gemm=te and shape.num_experts > 0,
        moe_permute_fusion=te and shape.num_experts > 0,
        cross_entropy_loss_fusion=False,
        gradient_accumulation_fusion=False,
        **uneven,
        **recompute,
        **fp8_settings(model.fp8, owner, own_scales=keeps_own_scales(groups.layout)),
    )
    return _config_kind(hf)(**(settings | hf.settings))


def _config_kind(hf: HfModel) -> type[TransformerConfig]:
    if hf.latent_attention:
        return MLATransformerConfig
    return YarnTransformerConfig if _yarn(hf) else TransformerConfig


def _yarn(hf: HfModel) -> bool:
    """Of attention that is not latent, which has rotary embeddings of its own."""
    return "yarn_rotary_scaling_factor" in hf.settings


def _gate(hf: HfModel, te: bool) -> Callable[[Tensor], Tensor]:
    """What the gate of an MLP or an expert goes through; GPT-OSS's has an offset beside it."""
    if "glu_linear_offset" not in hf.settings:
        return F.silu
    return fused_bias_geglu.quick_gelu if te else quick_gelu  # known to its fused kernels by name


def build_model(
    model: ModelConfig, hf: HfModel, groups: ModelGroups, *, owner: str, with_head: bool
) -> MegatronModel:
    """This rank's stage, with weights not loaded yet. ``with_head`` False: the trunk alone (a
    teacher, whose LM head lives in the student's shards)."""
    config = transformer_config(model, hf, groups, owner=owner)
    shape = hf.shape
    module = GPTModel(
        config,
        _block_spec(config, groups.pp_rank),
        vocab_size=padded_vocab_size(shape.vocab_size, groups.layout.tp),
        max_sequence_length=shape.max_position_embeddings,
        position_embedding_type="yarn" if _yarn(hf) else "rope",
        rotary_base=shape.rope_theta,
        rope_scaling=hf.rope_scaling_factor > 0,
        rope_scaling_factor=hf.rope_scaling_factor or 8.0,
        pre_process=groups.is_first_stage,
        post_process=groups.is_last_stage,
        share_embeddings_and_output_weights=shape.tied and with_head,
        pg_collection=groups.pg,
    )
    if not with_head and groups.is_last_stage:
        module.output_layer = None
    if not uses_transformer_engine() and not hf.latent_attention:
        # Rebinding the class keeps the buffers (and the rope scaling) that Megatron computed.
        module.rotary_pos_emb.__class__ = (
            PackedYarnRotaryEmbedding if _yarn(hf) else PackedRotaryEmbedding
        )
    freeze_expert_biases(module)
    finish_biased_experts(module)
    if torch.cuda.is_available():
        module.cuda(torch.cuda.current_device())
    layers = layers_by_stage(
        shape.num_layers, groups.layout.pp, model.num_layers_in_first_pipeline_stage
    )
    packed = (PackedRotaryEmbedding, PackedYarnRotaryEmbedding)
    own = getattr(module, "rotary_pos_emb", None)
    rotary = own if isinstance(own, packed) else None
    return MegatronModel(module, config, groups, hf, layers, rotary)


def freeze_expert_biases(module: torch.nn.Module) -> None:
    """Megatron-Core moves them towards even use of the experts after each step; here the divergence
    is the whole objective, and the policy that samples is the one that is trained."""
    for part in module.modules():
        if getattr(part, "expert_bias", None) is not None:
            part.frozen_expert_bias = True  # type: ignore[assignment]


def _block_spec(config: TransformerConfig, pp_rank: int) -> Any:
    if uses_transformer_engine():
        spec = gpt_layer_specs.get_gpt_decoder_block_spec(
            config, use_transformer_engine=True, normalization="RMSNorm", pp_rank=pp_rank
        )
    else:
        sinks = config.softmax_type == "learnable"
        spec = local_block_spec(config, pp_rank, SinkAttention if sinks else PackedAttention)
    if config.multi_latent_attention:
        use_latent_attention(spec, local=not uses_transformer_engine())
    use_group_router(spec, config)
    return spec


def packed_params(batch: PrefixBatch) -> PackedSeqParams:
    # Across ranks Transformer Engine divides these, and asks for them where nothing is padded: a
    # share's padding is part of its sequences (``batch.padded_for``).
    padded = batch.cu_seqlens if batch.rows else None
    # Not total_tokens: Megatron would number the sequences, which waits for the device.
    return PackedSeqParams(
        qkv_format="thd",
        cu_seqlens_q=batch.cu_seqlens,
        cu_seqlens_kv=batch.cu_seqlens,
        cu_seqlens_q_padded=padded,
        cu_seqlens_kv_padded=padded,
        max_seqlen_q=batch.max_seqlen,
        max_seqlen_kv=batch.max_seqlen,
    )


def forward_trunk(
    model: MegatronModel,
    module: torch.nn.Module,
    batch: PrefixBatch,
    on_prefix: Callable[[Tensor, Tensor | None], Tensor],
) -> Tensor:
    """Run ``module`` (the GPTModel or its DDP wrapper) on one packed microbatch.

    On the last stage returns ``on_prefix(hidden [N, H], head_weight [V/tp, H] or None)``, hidden
    states of the prefix positions after the last norm; elsewhere the stage's output [T, 1, H], T of
    this rank's share.
    Under sequence parallelism the hidden states are gathered, and their gradient is
    reduce-scattered: ``on_prefix`` must then give partial sums.
    """
    if model.rotary is not None:
        model.rotary.position_ids = batch.position_ids

    def at_prefix(
        *, hidden_states: Tensor, output_layer: Any, output_weight: Any, **_: Any
    ) -> Tensor:
        if model.config.sequence_parallel:
            hidden_states = gather_from_sequence_parallel_region(
                hidden_states, group=model.groups.pg.tp
            )
        weight = output_weight
        if weight is None and output_layer is not None:
            weight = output_layer.weight
        return on_prefix(hidden_states[batch.prefix_positions, 0], weight)

    return module(
        batch.input_ids[None],
        batch.position_ids[None],
        None,
        packed_seq_params=packed_params(batch),
        output_processor=at_prefix,
    )
