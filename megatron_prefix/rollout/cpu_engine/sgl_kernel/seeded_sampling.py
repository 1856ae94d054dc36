"""``torch.ops.sgl_kernel.murmur_hash32_cpu``: what SGLang's ``sampling_seed`` needs on a CPU.

MurmurHash3 (x86, 32 bit) of the 16 bytes seed (8), position (4), column (4), as SGLang's Triton
kernel computes it on a GPU. Words are held in int64, since torch has no uint32 arithmetic; a
product may wrap around there, which leaves its low 32 bits right.
"""

import torch

_WORD = 0xFFFFFFFF
_LENGTH = 16  # bytes that are hashed
_registered: list[torch.library.Library] = []  # torch drops the kernel with its Library


def _rotate(word: torch.Tensor, bits: int) -> torch.Tensor:
    return ((word << bits) | (word >> (32 - bits))) & _WORD


def _mix(state: torch.Tensor, block: torch.Tensor) -> torch.Tensor:
    block = (_rotate(block * 0xCC9E2D51 & _WORD, 15) * 0x1B873593) & _WORD
    return (_rotate(state ^ block, 13) * 5 + 0xE6546B64) & _WORD


def _finalize(state: torch.Tensor) -> torch.Tensor:
    state = state ^ _LENGTH
    state = (state ^ (state >> 16)) * 0x85EBCA6B & _WORD
    state = (state ^ (state >> 13)) * 0xC2B2AE35 & _WORD
    return state ^ (state >> 16)


def murmur_hash32(
    seed: torch.Tensor, positions: torch.Tensor, columns: torch.Tensor
) -> torch.Tensor:
    """Hashes of [B] seeds and positions with [V] columns, as uint32 [B, V]."""
    seed_B1 = seed.to(torch.int64)[:, None]
    position_B1 = positions.to(torch.int64)[:, None] & _WORD
    column_1V = columns.to(torch.int64)[None, :] & _WORD
    state = torch.zeros_like(seed_B1)
    for block in (seed_B1 & _WORD, (seed_B1 >> 32) & _WORD, position_B1, column_1V):
        state = _mix(state, block)
    return _finalize(state).to(torch.uint32)


def register() -> None:
    """Make the operator known to torch; a second call changes nothing."""
    if _registered:
        return
    library = torch.library.Library("sgl_kernel", "FRAGMENT")
    library.define("murmur_hash32_cpu(Tensor seed, Tensor positions, Tensor col) -> Tensor")
    library.impl("murmur_hash32_cpu", murmur_hash32, "CPU")
    _registered.append(library)
