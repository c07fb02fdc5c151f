import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megadiff.data.mixture import Permutation, mixed, stream_key


@settings(max_examples=150, deadline=None)
@given(st.integers(1, 700), st.integers(0, 2**64 - 1))
def test_every_place_is_met_once(size, key):
    permutation = Permutation(size, key)
    assert sorted(permutation[i] for i in range(size)) == list(range(size))


def test_a_huge_permutation_costs_no_memory_and_stays_inside():
    permutation = Permutation(10**15 + 7, key=3)
    places = {permutation[i] for i in range(1000)}
    assert len(places) == 1000
    assert all(0 <= place < 10**15 + 7 for place in places)


def test_keys_give_unrelated_orders():
    """Two random orders of 1,000 agree at one place on average."""
    first, second = Permutation(1000, stream_key(1, "a")), Permutation(1000, stream_key(2, "a"))
    assert sum(first[i] == second[i] for i in range(1000)) < 8
    assert sum(first[i] == i for i in range(1000)) < 8


def test_the_order_looks_uniform():
    """Chi-squared of (tenth of i) against (tenth of its place) over 81 degrees of freedom: mean 81, deviation 12.7."""
    size, cells = 10_000, [[0] * 10 for _ in range(10)]
    permutation = Permutation(size, key=5)
    for i in range(size):
        cells[i // 1000][permutation[i] // 1000] += 1
    chi_squared = sum((count - 100) ** 2 / 100 for sequence in cells for count in sequence)
    assert 40 < chi_squared < 130


def test_small_sizes_reach_every_order():
    orders = {tuple(Permutation(3, key)[i] for i in range(3)) for key in range(200)}
    assert len(orders) == 6


def test_the_order_is_fixed_for_ever():
    """Golden: a change here reorders the data of every run that is under way."""
    permutation = Permutation(1000, stream_key(1234, "rows", "train.0", 0))
    assert [permutation[i] for i in range(8)] == [395, 71, 363, 749, 166, 352, 717, 479]
    assert mixed(0) == 0xE220A8397B1DCDAF  # the first output of splitmix64 seeded with 0


def test_an_index_outside_is_refused():
    with pytest.raises(IndexError, match="index 5 is outside 0 to 4"):
        Permutation(5, 0)[5]
