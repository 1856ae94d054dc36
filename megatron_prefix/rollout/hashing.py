"""SGLang's two tensor hashes, fed piece by piece.

On a CPU it is the first 64 bits of a SHA-256 over the tensor's bytes. On a GPU it is a sum over
32-bit words, each mixed with its position, by tiles of 8192 words
(``sglang.kernels.ops.memory.gpu_tensor_hash``); computed here with torch, on any device.
"""

import hashlib
from typing import Protocol

import torch

_WORD = 0xFFFFFFFF
_LONG = 0xFFFFFFFFFFFFFFFF
_TILE_WORDS = 8192
_CHUNK_WORDS = 256 * _TILE_WORDS  # 16 MiB in int64: what one pass holds several of
_SEED = 0x243F6A88
# Of the two halves: multiplier of a word's position, seed, rotation of the position.
_HALVES = ((0x27D4EB2D, _SEED, 15), (0x165667B1, (_SEED * 0x9E3779B1 ^ 0xDEADBEEF) & _WORD, 13))


class TensorHash(Protocol):
    """The hash of one tensor, of which ``update`` takes consecutive pieces."""

    def update(self, tensor: torch.Tensor) -> None: ...

    def hexdigest(self) -> str: ...


def new_hash(device: str) -> TensorHash:
    """The hash of a server that runs on ``device`` (cuda or cpu)."""
    return MixedWordHash() if device == "cuda" else Sha256Hash()


class Sha256Hash:
    """The hash that a server on a CPU answers with."""

    def __init__(self) -> None:
        self._hash = hashlib.sha256()

    def update(self, tensor: torch.Tensor) -> None:
        self._hash.update(memoryview(_bytes(tensor).cpu().numpy()))

    def hexdigest(self) -> str:
        return self._hash.hexdigest()[:16]


class MixedWordHash:
    """The hash that a server on a GPU answers with."""

    def __init__(self) -> None:
        self._words = 0  # that have been mixed
        self._rest = torch.empty(0, dtype=torch.uint8)  # bytes that fill no word yet
        # Sums of the current, unfinished tile's words, and of the tiles before it, once final:
        # a tile's hash depends on the tensor's length, which is known at the end only.
        self._tiles: list[torch.Tensor] = []  # int64 [2, tiles]
        self._open = torch.zeros(2, dtype=torch.int64)

    def update(self, tensor: torch.Tensor) -> None:
        data = torch.cat([self._rest.to(tensor.device), _bytes(tensor)])
        whole = data.numel() // 4 * 4
        # A copy: a view of the tail would keep the whole tensor alive.
        self._rest = data[whole:].clone()
        if whole == 0:
            return
        for words in data[:whole].view(torch.int32).split(_CHUNK_WORDS):
            self._add(words.to(torch.int64) & _WORD)

    def _add(self, words: torch.Tensor) -> None:
        """Mix ``words`` (int64 [n], each below 2**32) in at the current position."""
        index = torch.arange(self._words, self._words + len(words), device=words.device) & _WORD
        mixed = torch.stack([_mix(words ^ _position(index, *half)) for half in _HALVES])
        before = self._words % _TILE_WORDS
        after = -(before + len(words)) % _TILE_WORDS
        padded = torch.nn.functional.pad(mixed, (before, after))
        sums = padded.view(2, -1, _TILE_WORDS).sum(-1).cpu()
        sums[:, 0] += self._open
        self._words += len(words)
        self._open = sums[:, -1].clone() if after else torch.zeros(2, dtype=torch.int64)
        self._tiles.append(sums[:, :-1] if after else sums)

    def hexdigest(self) -> str:
        if self._rest.numel():
            self.update(torch.zeros(4 - self._rest.numel(), dtype=torch.uint8))
        if self._words == 0:
            return f"{0:016x}"
        tiles = torch.cat([*self._tiles, self._open[:, None]], dim=1)
        tiles = tiles[:, : -(-self._words // _TILE_WORDS)]
        high, low = _mix((tiles & _WORD) ^ (self._words * 4 & _WORD)).tolist()
        total = sum((a << 32 | b) for a, b in zip(high, low, strict=True)) & _LONG
        return f"{_splitmix(total):016x}"


def _bytes(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.detach().contiguous().view(-1).view(torch.uint8)


def _position(index: torch.Tensor, multiplier: int, seed: int, rotation: int) -> torch.Tensor:
    # Products may wrap around in int64; their low 32 bits stay right.
    rotated = ((index << rotation) | (index >> (32 - rotation))) & _WORD
    return ((index * multiplier + seed) & _WORD) ^ rotated


def _mix(word: torch.Tensor) -> torch.Tensor:
    """MurmurHash3's 32-bit finalizer."""
    word = (word ^ (word >> 16)) * 0x85EBCA6B & _WORD
    word = (word ^ (word >> 13)) * 0xC2B2AE35 & _WORD
    return word ^ (word >> 16)


def _splitmix(word: int) -> int:
    """SplitMix64's finalizer."""
    word = (word ^ (word >> 30)) * 0xBF58476D1CE4E5B9 & _LONG
    word = (word ^ (word >> 27)) * 0x94D049BB133111EB & _LONG
    return word ^ (word >> 31)
