"""What several families refuse alike: variants that their name maps do not say."""

from collections.abc import Mapping
from typing import Any


def rope_settings(hf: Mapping[str, Any]) -> tuple[str, Mapping[str, Any]]:
    """Kind and parameters of the rotary scaling, by today's key (rope_parameters) or the older
    one (rope_scaling, whose "type" became "rope_type"); ("default", {}) where there is none."""
    for key in ("rope_parameters", "rope_scaling"):
        rope = hf.get(key) or {}
        kind = rope.get("rope_type") or rope.get("type") or "default"
        if kind != "default":
            return kind, rope
    return "default", {}


def refuse_qwen_variants(hf: Mapping[str, Any], family: str) -> None:
    """What no Qwen2 or Qwen3 model is supported with."""
    refuse_sliding_window(hf, family)
    require_plain_rope(hf, family)


def require_plain_rope(hf: Mapping[str, Any], family: str) -> None:
    kind, _ = rope_settings(hf)
    if kind != "default":
        raise ValueError(f"rope_type={kind!r}: {family} is supported with rope_type 'default' only")


def refuse_sliding_window(hf: Mapping[str, Any], family: str) -> None:
    """Sizes of a window may be given while ``use_sliding_window`` is false: it is not used then."""
    if hf.get("use_sliding_window"):
        raise ValueError(
            f"use_sliding_window=true: {family} with sliding-window attention is not supported; "
            "use a checkpoint with full attention"
        )


def require_published(hf: Mapping[str, Any], family: str, **values: Any) -> None:
    """Settings that may be left out, and otherwise are as the family was published."""
    for name, value in values.items():
        if hf.get(name, value) != value:
            raise ValueError(f"{name}={hf[name]!r}: {family} is supported with {value!r}")


def refuse_biases(hf: Mapping[str, Any], family: str, *names: str) -> None:
    for name in names:
        if hf.get(name):
            raise ValueError(f"{name}=true: {family} with {name} is not supported")
