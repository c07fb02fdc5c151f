"""Counter-based random numbers: a pure function of (seed, stream name, sequence, position), with no state to save.

Philox4x32-10 (Salmon, Moraes, Dror, Shaw, "Parallel random numbers: as easy as 1, 2, 3", SC 2011): ten rounds turn a
128-bit counter and a 64-bit key into 128 random bits. Here the key is a hash of the seed and the stream's name, and
the counter is (position, draw, sequence low, sequence high), so that every position of every sequence of the run has
its own block.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from functools import cached_property
from typing import Any, overload

import numpy as np
import numpy.typing as npt

from megadiff.diffusion.shapes import Float, Int

UintArray = npt.NDArray[np.uint64]
Words = tuple[UintArray, ...]

_MULTIPLIERS = 0xD2511F53, 0xCD9E8D57
_WEYL = 0x9E3779B9, 0xBB67AE85
_ROUNDS = 10
_LOW = 0xFFFFFFFF

# The same as arrays: numpy converts a scalar in every call, which costs as much as the work on 1000 numbers.
_M0, _M1, _LOW_WORD, _32 = (np.array(value, dtype=np.uint64) for value in (*_MULTIPLIERS, _LOW, 32))


@overload
def philox4x32(counter: tuple[int, ...], key: tuple[int, int]) -> tuple[int, ...]: ...
@overload
def philox4x32(counter: Words, key: tuple[int, int]) -> Words: ...
def philox4x32(counter: tuple[Any, ...], key: tuple[int, int]) -> tuple[Any, ...]:
    """Return four random 32-bit words for each counter: the definition, to which `Stream.words` is held.

    Args:
        counter: four uint64 arrays that broadcast together, or four integers, each value below 2^32.
        key: two words below 2^32.

    Returns:
        Four uint64 arrays of the broadcast shape, or four integers, each value below 2^32.
    """
    c0, c1, c2, c3 = counter
    for k0, k1 in _round_keys(key):
        product_0, product_1 = c0 * _MULTIPLIERS[0], c2 * _MULTIPLIERS[1]
        c0, c2 = (product_1 >> 32) ^ c1 ^ k0, (product_0 >> 32) ^ c3 ^ k1
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

    def words(
        self, sequences: Int[npt.NDArray[np.int64], " B"], positions: int, *, draw: int = 0, count: int = 4
    ) -> Words:
        """Return the first `count` words (1 to 4) of each of `positions` positions of each sequence: [B, positions]
        each.

        They are `philox4x32` of the counters (position, draw, sequence low, sequence high), to the bit and at a
        fraction of its cost. Words 0-1 and words 2-3 travel as two 64-bit numbers, the first of two on top; the first
        two rounds stay as small as their counters allow, the others work in place; a half that nobody reads is not
        made. Cheapest for some thousand blocks at a time, which stay in the cache.
        """
        position, index = np.arange(positions, dtype=np.uint64)[None, :], sequences.astype(np.uint64)[:, None]
        low, high = index & _LOW_WORD, index >> _32
        if (high == high[:1]).all():  # as for all sequences below 2^32
            high = high[:1]
        (k0, k1), key, *middle, last = self._round_keys
        first = _half(low, np.array(draw, dtype=np.uint64), _M1, k0)  # [B, 1]
        second = _half(position, high, _M0, k1)  # [1, positions], or [B, positions]
        first, second = _half(second >> _32, first, _M1, key[0]), _half(first >> _32, second, _M0, key[1])
        spare = np.empty_like(first), np.empty_like(first)
        for key in middle:
            _round(first, second, key, spare)
        _round(first, second, last, spare, both=count > 2)
        words: list[UintArray] = []
        for half, upper in ((first, spare[0]), (second, spare[1]))[: (count + 1) // 2]:
            words += [np.right_shift(half, _32, out=upper), np.bitwise_and(half, _LOW_WORD, out=half)]
        return tuple(words[:count])

    @cached_property
    def _round_keys(self) -> list[tuple[UintArray, UintArray]]:
        return [(np.array(k0, dtype=np.uint64), np.array(k1, dtype=np.uint64)) for k0, k1 in _round_keys(self.key)]

    def uniforms(
        self, sequences: Int[npt.NDArray[np.int64], " B"], positions: int, *, draw: int = 0
    ) -> Float[npt.NDArray[np.float64], "B {positions}"]:
        """Return uniform numbers on [0, 1) with 53 bits."""
        return unit_interval(self.words(sequences, positions, draw=draw, count=2))


def unit_interval(words: Words) -> npt.NDArray[np.float64]:
    """Return a number k / 2^53 in [0, 1) from the first two words."""
    return ((words[0] << np.uint64(21)) | (words[1] >> np.uint64(11))).astype(np.float64) * 2.0**-53


def below(high: UintArray, low: UintArray, bound: int) -> UintArray:
    """Return an integer in [0, bound), bound < 2^32: the high part of the product of bound with 64 random bits.

    Multiply-shift: of the 2^64 inputs every value gets as many as any other but for one, a bias below bound / 2^64.
    """
    factor = np.uint64(bound)
    return (high * factor + ((low * factor) >> _32)) >> _32


def threshold(probability: npt.NDArray[np.float64]) -> UintArray:
    """Return T such that a 32-bit word is below T with this probability, to 2^-33; an exact 0 or 1 stays exact."""
    return np.rint(probability * 2.0**32).astype(np.uint64)


def _round_keys(key: tuple[int, int]) -> list[tuple[int, int]]:
    """Return the two key words of each round."""
    return [((key[0] + step * _WEYL[0]) & _LOW, (key[1] + step * _WEYL[1]) & _LOW) for step in range(_ROUNDS)]


def _half(multiplied: UintArray, kept: UintArray, multiplier: UintArray, key: UintArray) -> UintArray:
    """Return half a block after a round: upper word (product >> 32) ^ kept ^ key, lower word that of the product.

    Of `kept` the lower word alone counts.
    """
    return (multiplied * multiplier) ^ ((kept ^ key) << _32)


def _round(
    first: UintArray,
    second: UintArray,
    key: tuple[UintArray, UintArray],
    spare: tuple[UintArray, UintArray],
    *,
    both: bool = True,
) -> None:
    """`_half` twice in place, each half made of the other's upper word; without `both` the first half alone."""
    np.multiply(np.right_shift(second, _32, out=spare[0]), _M1, out=spare[0])
    if both:
        np.multiply(np.right_shift(first, _32, out=spare[1]), _M0, out=spare[1])
        _mix(second, spare[1], key[1])
    _mix(first, spare[0], key[0])


def _mix(half: UintArray, product: UintArray, key: UintArray) -> None:
    half ^= key
    half <<= _32
    half ^= product
