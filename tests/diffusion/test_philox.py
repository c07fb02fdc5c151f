"""Philox against its authors' vectors, and the maps from words to numbers."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import stats

from megadiff.diffusion.philox import Stream, below, philox4x32, threshold, unit_interval

# Random123's kat_vectors file, philox4x32-10: counter, key, result.
VECTORS = [
    ("00000000 00000000 00000000 00000000", "00000000 00000000", "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
    ("ffffffff ffffffff ffffffff ffffffff", "ffffffff ffffffff", "408f276d 41c83b0e a20bc7c6 6d5451fd"),
    ("243f6a88 85a308d3 13198a2e 03707344", "a4093822 299f31d0", "d16cfe09 94fdcceb 5001e420 24126ea1"),
]


def words(text: str) -> list[int]:
    return [int(word, 16) for word in text.split()]


@pytest.mark.parametrize(("counter", "key", "result"), VECTORS)
def test_the_published_vectors_come_out(counter, key, result):
    k0, k1 = words(key)
    got = philox4x32(tuple(np.array([word], dtype=np.uint64) for word in words(counter)), (k0, k1))
    assert [int(word[0]) for word in got] == words(result)


def test_a_block_is_keyed_by_seed_name_row_position_and_draw():
    base = Stream(1, "train/noise").words(np.array([5]), 4)
    assert [int(w[0, 3]) for w in base] == [int(w[0, 3]) for w in Stream(1, "train/noise").words(np.array([5]), 9)]
    others = [
        Stream(2, "train/noise").words(np.array([5]), 4),
        Stream(1, "eval/noise").words(np.array([5]), 4),
        Stream(1, "train/noise").words(np.array([6]), 4),
        Stream(1, "train/noise").words(np.array([5 + 2**32]), 4),
        Stream(1, "train/noise").words(np.array([5]), 4, draw=1),
    ]
    for other in others:
        assert not any((a == b).any() for a, b in zip(base, other, strict=True))


def test_uniform_numbers_are_uniform_and_below_one():
    u = Stream(0, "a").uniforms(np.arange(50), 1000)
    assert stats.kstest(u.ravel(), "uniform").pvalue > 1e-3
    top = tuple(np.array([2**32 - 1], dtype=np.uint64) for _ in range(2))
    assert unit_interval(top)[0] == 1 - 2.0**-53


@pytest.mark.parametrize("bound", [1, 2, 10, 131071, 2**31])
def test_multiply_shift_is_the_high_part_of_the_product(bound):
    high, low = (np.array(v, dtype=np.uint64) for v in ([0, 2**32 - 1, 123456789], [0, 2**32 - 1, 987654321]))
    want = [(((int(h) << 32) | int(w)) * bound) >> 64 for h, w in zip(high, low, strict=True)]
    assert below(high, low, bound).tolist() == want


def test_thresholds_keep_zero_and_one_exact():
    assert threshold(np.array([0.0, 1.0, 0.5, 1e-300])).tolist() == [0, 2**32, 2**31, 0]
