from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megadiff.data.mixture import PATTERN_LENGTH, Blend, SizeBlend
from megadiff.errors import DataError

weight_lists = st.lists(st.floats(0.01, 10.0), min_size=1, max_size=5)


@settings(max_examples=25, deadline=None)
@given(weight_lists, st.integers(0, 2**32))
def test_each_source_counts_0_1_2_without_gap_or_repeat(weights, seed):
    blend = Blend(weights, seed=seed)
    indices: list[list[int]] = [[] for _ in weights]
    for sample in range(2 * PATTERN_LENGTH + 500):
        place = blend.place(sample)
        indices[place.source].append(place.index)
    assert all(found == list(range(len(found))) for found in indices)


@settings(max_examples=50, deadline=None)
@given(weight_lists)
def test_shares_are_exact_in_every_period(weights):
    blend = Blend(weights, seed=1)
    total = sum(blend.counts)
    assert all(
        abs(count - weight / sum(weights) * total) < 1 for count, weight in zip(blend.counts, weights, strict=True)
    )
    assert total in (1, PATTERN_LENGTH)


def test_any_stretch_holds_the_sources_in_proportion():
    """0.7, 0.2, 0.1 over stretches of 100 samples: never off by more than 3."""
    blend = Blend([7, 2, 1], seed=9)
    sources = [blend.place(i).source for i in range(PATTERN_LENGTH)]
    for start in range(0, PATTERN_LENGTH - 100, 17):
        window = sources[start : start + 100]
        assert [abs(window.count(s) - want) <= 3 for s, want in enumerate((70, 20, 10))] == [True] * 3


def test_a_place_does_not_depend_on_what_was_asked_before():
    forward, backward = Blend([2, 1], seed=3), Blend([2, 1], seed=3)
    samples = [0, 5, 10**12, 7, 9_999, 10_000]
    assert [forward.place(i) for i in samples] == [backward.place(i) for i in reversed(samples)][::-1]


def test_the_seed_moves_places_but_not_shares():
    first, second = Blend([2, 1], seed=1), Blend([2, 1], seed=2)
    assert first.counts == second.counts == [6667, 3333]
    assert [first.place(i).source for i in range(50)] != [second.place(i).source for i in range(50)]


def test_a_source_that_would_never_be_seen_is_refused():
    with pytest.raises(DataError, match=r"data\.train\[1\]\.weight: wanted at least 0.0001 .*found 1e-06; raise it"):
        Blend([1.0, 1e-6], seed=0)


size_lists = st.lists(st.integers(1, 60), min_size=1, max_size=7)


@settings(max_examples=60, deadline=None)
@given(size_lists, st.integers(0, 2**32))
def test_sharing_by_size_gives_every_sequence_once_in_a_period(sizes, seed):
    blend, counts = SizeBlend(sizes, seed=seed), [0] * len(sizes)
    for sample in range(3 * sum(sizes)):
        assert blend.drawn(sample) == counts
        place = blend.place(sample)
        assert place.index == counts[place.source]
        counts[place.source] += 1
        if (sample + 1) % sum(sizes) == 0:
            assert counts == [(sample + 1) // sum(sizes) * size for size in sizes]
    assert blend.shares == pytest.approx([size / sum(sizes) for size in sizes])


def test_a_source_of_one_in_a_billion_comes_once_and_nothing_is_stored():
    sizes = [10**9, 1, 10**9]
    blend = SizeBlend(sizes, seed=5)
    first, last = 0, sum(sizes)
    while last - first > 1:  # the sample before which the small source has given nothing
        middle = (first + last) // 2
        first, last = (first, middle) if blend.drawn(middle)[1] else (middle, last)
    assert blend.place(first) == (1, 0)
    assert blend.drawn(sum(sizes)) == sizes
    assert blend.place(first + 1).source != 1


def test_sharing_by_size_keeps_proportions_everywhere_without_a_rhythm():
    """0.7, 0.2, 0.1 over stretches of 100 samples: never off by more than 4; gaps between small ones vary."""
    blend = SizeBlend([7000, 2000, 1000], seed=9)
    sources = [blend.place(i).source for i in range(10_000)]
    for start in range(0, 9_900, 17):
        window = sources[start : start + 100]
        assert [abs(window.count(s) - want) <= 4 for s, want in enumerate((70, 20, 10))] == [True] * 3
    places = [i for i, source in enumerate(sources) if source == 2]
    assert len({b - a for a, b in pairwise(places)}) > 5
    other = SizeBlend([7000, 2000, 1000], seed=10)
    assert [other.place(i).source for i in range(100)] != sources[:100]


@settings(max_examples=20, deadline=None)
@given(weight_lists, st.integers(0, 25_000))
def test_what_a_weighted_blend_has_given_is_counted_exactly(weights, samples):
    blend, counts = Blend(weights, seed=2), [0] * len(weights)
    for sample in range(samples):
        counts[blend.place(sample).source] += 1
    assert blend.drawn(samples) == counts
    assert blend.shares == pytest.approx([count / sum(blend.counts) for count in blend.counts])


def test_samples_before_the_first_are_our_mistake():
    for blend in (Blend([2, 1], seed=1), SizeBlend([2, 1], seed=1)):
        with pytest.raises(IndexError, match="a sample index is 0 or more, got -1"):
            blend.place(-1)
    with pytest.raises(ValueError, match="sizes must be at least 1"):
        SizeBlend([3, 0], seed=1)
