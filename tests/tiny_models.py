"""Random checkpoints of a few thousand parameters, written by ``transformers`` itself."""

import json
from pathlib import Path
from typing import Any

import torch
import transformers

EOS_TOKEN_ID = 2


def _write(folder: Path, architecture: str, sizes: dict[str, Any], seed: int) -> Path:
    """One random fp32 checkpoint in ``folder``: safetensors, config.json, generation_config.json.

    The initial spread is wide, so that a token's successor is far from a tie and greedy decoding
    by two engines can be compared token for token.
    """
    torch.manual_seed(seed)
    config_class = getattr(transformers, f"{architecture}Config")
    model_class = getattr(transformers, f"{architecture}ForCausalLM")
    config = config_class(**sizes)
    model = model_class(config).to(torch.float32).eval()
    _spread_norms_and_biases(model)
    model.generation_config = transformers.GenerationConfig(
        bos_token_id=1, eos_token_id=EOS_TOKEN_ID, pad_token_id=0, do_sample=False
    )
    folder.mkdir(parents=True, exist_ok=True)
    model.save_pretrained(folder, safe_serialization=True)
    return folder


def _spread_norms_and_biases(model: torch.nn.Module) -> None:
    """Freshly made norms are all ones and biases all zeros, which would hide a lost tensor."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() == 1 or name.endswith("_bias"):
                parameter.add_(0.2 * torch.randn_like(parameter))
            assert torch.isfinite(parameter).all(), name
        for name, buffer in model.named_buffers():
            if name.endswith("e_score_correction_bias"):
                buffer.add_(0.2 * torch.randn_like(buffer))


def _sizes(overrides: dict[str, Any], **family: Any) -> dict[str, Any]:
    sizes: dict[str, Any] = {
        "vocab_size": 64,
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "max_position_embeddings": 512,
        "rms_norm_eps": 1e-6,
        "initializer_range": 0.2,
        "rope_theta": 10000.0,
        "bos_token_id": 1,
        "eos_token_id": EOS_TOKEN_ID,
        "pad_token_id": 0,
        "dtype": "float32",
    }
    return sizes | family | overrides


def write_tiny_qwen3(folder: Path, *, seed: int = 0, **overrides: Any) -> Path:
    """Qwen3: qk-norm, no biases, tied embeddings; ``overrides`` are Qwen3Config's fields."""
    sizes = _sizes(overrides, tie_word_embeddings=True)
    return _write(Path(folder), "Qwen3", sizes, seed)


def write_tiny_llama(folder: Path, *, seed: int = 0, **overrides: Any) -> Path:
    """Llama: untied embeddings, no qk-norm; ``overrides`` are LlamaConfig's fields."""
    sizes = _sizes(overrides, tie_word_embeddings=False)
    return _write(Path(folder), "Llama", sizes, seed)


def write_tiny_qwen2(folder: Path, *, seed: int = 0, **overrides: Any) -> Path:
    """Qwen2: biases on q, k and v; ``overrides`` are Qwen2Config's fields."""
    sizes = _sizes(overrides, tie_word_embeddings=True)
    del sizes["head_dim"]  # no field of Qwen2Config; servers and Megatron divide
    return _write(Path(folder), "Qwen2", sizes, seed)


def write_tiny_qwen3_moe(folder: Path, *, seed: int = 0, **overrides: Any) -> Path:
    """Qwen3-MoE: four experts, two a token; ``overrides`` are Qwen3MoeConfig's fields."""
    experts = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 48}
    sizes = _sizes(overrides, tie_word_embeddings=False, norm_topk_prob=True, **experts)
    return _write(Path(folder), "Qwen3Moe", sizes, seed)


def write_tiny_mixtral(folder: Path, *, seed: int = 0, **overrides: Any) -> Path:
    """Mixtral: four experts, two a token; ``overrides`` are MixtralConfig's fields."""
    sizes = _sizes(overrides, tie_word_embeddings=False, num_local_experts=4)
    return _write(Path(folder), "Mixtral", sizes, seed)


YARN = {
    "rope_type": "yarn",
    "rope_theta": 10000.0,
    "factor": 4.0,
    "original_max_position_embeddings": 16,
    "beta_fast": 32,
    "beta_slow": 1,
    "mscale": 1.0,
    "mscale_all_dim": 1.0,
}
_LATENT = {
    "q_lora_rank": 24,
    "kv_lora_rank": 32,
    "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 8,
    "v_head_dim": 12,
    "num_key_value_heads": 4,
    "first_k_dense_replace": 1,
    "n_routed_experts": 8,
    "moe_intermediate_size": 48,
    "rope_parameters": YARN,
    "tie_word_embeddings": False,
}


def write_tiny_deepseek_v3(folder: Path, *, seed: int = 0, **overrides: Any) -> Path:
    """DeepSeek-V3: latent attention, YaRN, a dense first layer, eight experts in four groups of
    which two are chosen, four experts a token; ``overrides`` are DeepseekV3Config's fields."""
    routing = {"n_group": 4, "topk_group": 2, "num_experts_per_tok": 4, "n_shared_experts": 1}
    sizes = _sizes(overrides, **(_LATENT | routing | {"num_nextn_predict_layers": 0} | overrides))
    del sizes["head_dim"]
    return _write(Path(folder), "DeepseekV3", sizes, seed)


def as_published(folder: Path) -> Path:
    """``folder`` with what DeepSeek's published configs say and SGLang asks for, and transformers
    leaves out of what it writes."""
    path = folder / "config.json"
    config = json.loads(path.read_text())
    v3 = config["architectures"] == ["DeepseekV3ForCausalLM"]
    routing = ("noaux_tc", "sigmoid") if v3 else (config.get("topk_method", "greedy"), "softmax")
    said = {"moe_layer_freq": 1, "topk_method": routing[0], "scoring_func": routing[1]}
    path.write_text(json.dumps(config | said))
    return folder


def write_tiny_deepseek_v2(folder: Path, *, seed: int = 0, **overrides: Any) -> Path:
    """DeepSeek-V2: as V3 with a softmax router and two shared experts; ``overrides`` are
    DeepseekV2Config's fields."""
    routing = {"num_experts_per_tok": 2, "n_shared_experts": 2, "routed_scaling_factor": 2.0}
    sizes = _sizes(overrides, **(_LATENT | routing | overrides))
    del sizes["head_dim"]
    return _write(Path(folder), "DeepseekV2", sizes, seed)


def write_tiny_gpt_oss(folder: Path, *, seed: int = 0, **overrides: Any) -> Path:
    """GPT-OSS: sinks, a window of four tokens in every other layer, YaRN, biases, four experts of
    which two are chosen; ``overrides`` are GptOssConfig's fields."""
    own = {"num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": 4}
    # The gate's clamp at 7 would never bind in a model so small.
    yarn = {key: value for key, value in YARN.items() if not key.startswith("mscale")}
    own |= {"rope_parameters": yarn | {"truncate": False}, "swiglu_limit": 1.0}
    sizes = _sizes(overrides, **(own | {"tie_word_embeddings": False} | overrides))
    return _write(Path(folder), "GptOss", sizes, seed)
