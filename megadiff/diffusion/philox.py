"""Counter-based random numbers: a pure function of (seed, stream name, row, position), with no state to save.

Philox4x32-10 (Salmon, Moraes, Dror, Shaw, "Parallel random numbers: as easy as 1, 2, 3", SC 2011): ten rounds turn a
128-bit counter and a 64-bit key into 128 random bits. Here the key is a hash of the seed and the stream's name, and
the counter is (position, draw, row low, row high), so that every position of every row of the run has its own block.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import numpy.typing as npt

Words = tuple[npt.NDArray[np.uint64], ...]

_MULTIPLIERS = np.uint64(0xD2511F53), np.uint64(0xCD9E8D57)
_WEYL = 0x9E3779B9, 0xBB67AE85
_ROUNDS = 10
_LOW, _32 = np.uint64(0xFFFFFFFF), np.uint64(32)


def philox4x32(counter: Words, key: tuple[int, int]) -> Words:
    """Four random 32-bit words for each counter.

    Args:
        counter: four uint64 arrays that broadcast together, each value below 2^32.
        key: two words below 2^32.

    Returns:
        Four uint64 arrays of the broadcast shape, each value below 2^32.
    """
    c0, c1, c2, c3 = counter
    for step in range(_ROUNDS):
        k0, k1 = (np.uint64((word + step * weyl) & 0xFFFFFFFF) for word, weyl in zip(key, _WEYL, strict=True))
        product_0, product_1 = c0 * _MULTIPLIERS[0], c2 * _MULTIPLIERS[1]
        c0, c2 = (product_1 >> _32) ^ c1 ^ k0, (product_0 >> _32) ^ c3 ^ k1
        c1, c3 = product_1 & _LOW, product_0 & _LOW
    return c0, c1, c2, c3


@dataclass(frozen=True)
class Stream:
    """A named sequence of random blocks; two names, or two seeds, never share one.

    Args:
        seed: the run's seed, any integer.
        name: what the numbers are for, such as `train/noise`.
    """

    seed: int
    name: str

    @cached_property
    def key(self) -> tuple[int, int]:
        """The Philox key: the first eight bytes of the SHA-256 of `seed/name`, little-endian."""
        digest = hashlib.sha256(f"{self.seed}/{self.name}".encode()).digest()
        return int.from_bytes(digest[:4], "little"), int.from_bytes(digest[4:8], "little")

    def words(self, rows: npt.NDArray[np.int64], positions: int, *, draw: int = 0) -> Words:
        """Four words for each of `positions` positions of each row: arrays of [B, positions] for rows of [B]."""
        index = rows.astype(np.uint64)[:, None]
        position = np.arange(positions, dtype=np.uint64)[None, :]
        words = philox4x32((position, np.full((1, 1), draw, dtype=np.uint64), index & _LOW, index >> _32), self.key)
        return tuple(np.broadcast_to(word, (len(rows), positions)) for word in words)

    def uniforms(self, rows: npt.NDArray[np.int64], positions: int, *, draw: int = 0) -> npt.NDArray[np.float64]:
        """Uniform numbers on [0, 1) with 53 bits, [B, positions]."""
        return unit_interval(self.words(rows, positions, draw=draw))


def unit_interval(words: Words) -> npt.NDArray[np.float64]:
    """A number k / 2^53 in [0, 1) from the first two words."""
    return ((words[0] << np.uint64(21)) | (words[1] >> np.uint64(11))).astype(np.float64) * 2.0**-53


def below(high: npt.NDArray[np.uint64], low: npt.NDArray[np.uint64], bound: int) -> npt.NDArray[np.uint64]:
    """An integer in [0, bound), bound < 2^32, from the 64 bits of two words: the high part of their product with it.

    Multiply-shift: of the 2^64 inputs every value gets as many as any other but for one, a bias below bound / 2^64.
    """
    factor = np.uint64(bound)
    return (high * factor + ((low * factor) >> _32)) >> _32


def threshold(probability: npt.NDArray[np.float64]) -> npt.NDArray[np.uint64]:
    """T such that a 32-bit word is below T with this probability, to within 2^-33; an exact 0 or 1 stays exact."""
    return np.rint(probability * 2.0**32).astype(np.uint64)
