"""Philox against its authors' vectors, and the maps from words to numbers."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
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
    c0, c1, c2, c3 = words(counter)
    assert list(philox4x32((c0, c1, c2, c3), (k0, k1))) == words(result)


def plain_words(stream: Stream, sequences: np.ndarray, positions: int, draw: int) -> list[np.ndarray]:
    """Words by the definition, [B, positions] each."""
    index = np.repeat(sequences.astype(np.uint64)[:, None], positions, axis=1)
    position = np.tile(np.arange(positions, dtype=np.uint64), (len(sequences), 1))
    low, high = index & np.uint64(2**32 - 1), index >> np.uint64(32)
    return list(philox4x32((position, np.full_like(position, draw), low, high), stream.key))


ROW = st.integers(0, 2**63 - 1) | st.integers(0, 100) | st.integers(2**32 - 3, 2**32 + 3)


@settings(max_examples=200, deadline=None)
@given(
    st.integers(-(2**70), 2**70), st.lists(ROW, max_size=5), st.integers(0, 40), st.integers(0, 2**32 - 1), st.data()
)
def test_the_short_way_to_the_words_is_the_definition_s(seed, sequences, positions, draw, data):
    """Sequences on both sides of 2^32 in one call too, and whichever words are asked for."""
    stream, index = Stream(seed, "train/noise"), np.array(sequences, dtype=np.int64)
    count = data.draw(st.integers(1, 4))
    got = stream.words(index, positions, draw=draw, count=count)
    assert len(got) == count
    for short, plain in zip(got, plain_words(stream, index, positions, draw), strict=False):
        assert short.dtype == np.uint64
        np.testing.assert_array_equal(short, plain, strict=True)


def test_words_are_the_caller_s_own():
    stream, sequences = Stream(0, "a"), np.arange(2)
    first = stream.words(sequences, 3)
    kept = [word.copy() for word in first]
    for word in stream.words(sequences, 3):
        word[:] = 0
    for word, copy in zip(first, kept, strict=True):
        np.testing.assert_array_equal(word, copy)


def test_a_block_is_keyed_by_seed_name_sequence_position_and_draw():
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
