import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megadiff.data.blend import PATTERN_LENGTH, Blend
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
