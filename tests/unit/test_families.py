"""What a family refuses by its config.json alone, and what each file of hf_map/ says of names."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from megatron_prefix.mcore.hf_map import read_hf_model
from tests.tiny_models import (
    YARN,
    write_tiny_deepseek_v2,
    write_tiny_deepseek_v3,
    write_tiny_gpt_oss,
    write_tiny_llama,
    write_tiny_mixtral,
    write_tiny_qwen2,
    write_tiny_qwen3,
    write_tiny_qwen3_moe,
)

V2, V3, OSS = write_tiny_deepseek_v2, write_tiny_deepseek_v3, write_tiny_gpt_oss
GROUPS = {"topk_method": "group_limited_greedy", "n_group": 3, "topk_group": 1}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[Callable[..., Path], Path]:
    root = tmp_path_factory.mktemp("models")
    writers = (write_tiny_llama, write_tiny_mixtral, write_tiny_qwen2, write_tiny_qwen3)
    writers += (write_tiny_qwen3_moe, V2, V3, OSS)
    return {write: write(root / write.__name__) for write in writers}


@pytest.mark.parametrize(
    ("write", "config", "message"),
    [
        (write_tiny_llama, {"attention_bias": True}, "attention_bias=true: Llama with"),
        (write_tiny_llama, {"rope_parameters": YARN}, "rope_type='yarn': Llama is supported"),
        (write_tiny_qwen2, {"rope_parameters": YARN}, "rope_type='yarn': Qwen2 is supported"),
        (write_tiny_qwen2, {"use_sliding_window": True}, "Qwen2 with sliding-window"),
        (write_tiny_qwen3, {"use_sliding_window": True}, "Qwen3 with sliding-window"),
        (write_tiny_qwen3, {"rope_scaling": {"type": "linear"}}, "rope_type='linear': Qwen3 is"),
        (write_tiny_qwen3_moe, {"attention_bias": True}, "attention_bias=true: Qwen3-MoE"),
        (write_tiny_mixtral, {"sliding_window": 4096}, "sliding_window=4096: Mixtral"),
        (V3, {"scoring_func": "softmax"}, "scoring_func='softmax': DeepSeek-V3 is supported"),
        (V3, {"norm_topk_prob": False}, "norm_topk_prob=False: DeepSeek-V3 is supported"),
        (V3, {"num_experts_per_tok": 2}, "supported with two experts a chosen group"),
        (V3, {"n_group": 3}, "experts of a DeepSeek-V3 must divide into groups"),
        (V3, {"rope_interleave": False}, "DeepSeek-V3 is supported with interleaved pairs"),
        (V3, {"rms_norm_eps": 1e-5}, "rms_norm_eps=1e-05: DeepSeek-V3 is supported with 1e-06"),
        (V3, {"attention_bias": True}, "attention_bias=true: DeepSeek-V3"),
        (V3, {"rope_parameters": YARN | {"rope_type": "dynamic"}}, "'default' or 'yarn'"),
        (V3, {"rope_parameters": YARN | {"mscale": 0}}, "mscale_all_dim=1.0 needs mscale"),
        (V3, {"rope_parameters": YARN | {"attention_factor": 2.0}}, "attention_factor=2.0"),
        (V2, {"norm_topk_prob": True}, "norm_topk_prob=True: DeepSeek-V2 is supported"),
        (V2, {"topk_method": "noaux_tc"}, "topk_method='noaux_tc': DeepSeek-V2 is supported"),
        (V2, GROUPS, "experts of a DeepSeek-V2 must divide into groups"),
        (OSS, {"attention_bias": False}, "attention_bias=False: GPT-OSS is supported with True"),
        (OSS, {"swiglu_alpha": 1.5}, "swiglu_alpha=1.5: GPT-OSS is supported with 1.702"),
        (OSS, {"layer_types": ["full_attention"]}, "layer_types names 1 layers and num_hidden_la"),
        (OSS, {"layer_types": ["chunked_attention"] * 2}, "layer_types has 'chunked_attention'"),
        (OSS, {"sliding_window": None}, "sliding_window=None: sliding_attention needs 1 token"),
        (OSS, {"rope_parameters": {"rope_type": "yarn"}}, "config.json has no rope_theta"),
        (OSS, {"rope_parameters": YARN | {"rope_type": "linear"}}, "rope_type='linear': GPT-OSS"),
        (OSS, {"rope_parameters": YARN | {"attention_factor": 2.0}}, "attention_factor=2.0"),
    ],
)
def test_a_variant_that_is_computed_otherwise_is_refused(
    write: Callable[..., Path],
    config: dict[str, Any],
    message: str,
    folders: dict[Callable[..., Path], Path],
    tmp_path: Path,
) -> None:
    original = json.loads((folders[write] / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(original | config))
    with pytest.raises(ValueError, match="^.+$") as refusal:
        read_hf_model(str(tmp_path))
    assert message in str(refusal.value)


def test_deepseeks_published_keys_are_read(
    folders: dict[Callable[..., Path], Path], tmp_path: Path
) -> None:
    """As on the hub: rope_scaling with a type, and keys that transformers no longer writes."""
    config = json.loads((folders[V3] / "config.json").read_text())
    rope = {**YARN, "type": "yarn"}
    del rope["rope_type"], config["rope_parameters"]
    published = {"rope_scaling": rope, "rope_theta": 20000.0, "num_nextn_predict_layers": 1}
    published |= {"scoring_func": "sigmoid", "topk_method": "noaux_tc", "moe_layer_freq": 1}
    (tmp_path / "config.json").write_text(json.dumps(config | published))
    hf = read_hf_model(str(tmp_path))
    assert hf.settings["rotary_scaling_factor"] == 4.0
    assert hf.settings["rotary_base"] == 20000.0
    assert hf.shape.sparse_layers == (1,)
    assert hf.skipped == ("model.layers.2.",)
    assert hf.latent_attention
