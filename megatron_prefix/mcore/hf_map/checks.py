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


def refuse_biases(hf: Mapping[str, Any], family: str, *names: str) -> None:
    for name in names:
        if hf.get(name):
            raise ValueError(f"{name}=true: {family} with {name} is not supported")
