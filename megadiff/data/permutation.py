"""A shuffle of 0 .. n - 1 that is computed, not stored: any element in constant time and memory.

A balanced Feistel network permutes the smallest 4**h >= n; results outside 0 .. n - 1 are permuted again until one
falls inside ("cycle walking": Black and Rogaway, Ciphers with Arbitrary Finite Domains, 2002), at most 4 steps on
average. It uses only Python integers, so the order is the same on every machine and version.
"""

from __future__ import annotations

import hashlib

_ROUNDS = 8
_WORD = 2**64 - 1


def stream_key(*parts: str | int) -> int:
    """Hash names and numbers into a 64-bit key; different parts give different keys."""
    text = "|".join(f"{type(part).__name__}:{part}" for part in parts)
    return int.from_bytes(hashlib.sha256(text.encode("utf-8")).digest()[:8], "little")


def mixed(value: int) -> int:
    """Mix a 64-bit word so that close values part: the finaliser of splitmix64 (Steele et al. 2014)."""
    value = (value + 0x9E3779B97F4A7C15) & _WORD
    value = ((value ^ (value >> 30)) * 0xBF58476D1CE4E5B9) & _WORD
    value = ((value ^ (value >> 27)) * 0x94D049BB133111EB) & _WORD
    return value ^ (value >> 31)


class Permutation:
    """A permutation of 0 .. size - 1 determined by a key; `permutation[i]` is the image of i."""

    def __init__(self, size: int, key: int) -> None:
        if size < 1:
            raise ValueError(f"size must be at least 1, got {size}")
        self.size = size
        self._half_bits = max(1, ((size - 1).bit_length() + 1) // 2)
        self._half_mask = (1 << self._half_bits) - 1
        self._round_keys = [mixed(key ^ mixed(number)) for number in range(_ROUNDS)]

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, index: int) -> int:
        if not 0 <= index < self.size:
            raise IndexError(f"index {index} is outside 0 to {self.size - 1}")
        place = self._scrambled(index)
        while place >= self.size:
            place = self._scrambled(place)
        return place

    def _scrambled(self, value: int) -> int:
        left, right = value >> self._half_bits, value & self._half_mask
        for key in self._round_keys:
            left, right = right, left ^ (mixed(right ^ key) & self._half_mask)
        return (left << self._half_bits) | right
