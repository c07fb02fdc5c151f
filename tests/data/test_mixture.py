"""Blends, permutations and mixtures that change: every source goes on where it was, and no sequence comes again before
every other has."""

from __future__ import annotations

from collections import Counter
from itertools import pairwise
from pathlib import Path

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from megadiff.data.config import DataConfig
from megadiff.data.mixture import (
    PATTERN_LENGTH,
    Blend,
    Mixture,
    Permutation,
    SizeBlend,
    mixed,
    next_mixture,
    stream_key,
)
from megadiff.data.open import OpenData, open_data
from megadiff.data.tokenizers.byte import ByteTokenizer
from megadiff.errors import DataError
from tests.data.corpora import write_indexed

L = 4
SEQUENCES = {"a": 40, "b": 7, "c": 23, "small": 1}
GROWN = {"a": 40, "a2": 52, "a3": 53}
"""The file of `a` as it grows."""


def sequence(source: int, index: int) -> list[int]:
    """Four ids of ordinary bytes that name a sequence."""
    return [4 + source, 4 + index // 200, 4 + index % 200, 99]


def write_source(prefix: Path, source: int, sequences: int, *, tail: int = 0) -> str:
    tokens = [token for index in range(sequences) for token in sequence(source, index)] + [77] * tail
    return str(write_indexed(prefix, [tokens[i : i + 9] for i in range(0, len(tokens), 9)]))


@pytest.fixture(scope="module")
def paths(tmp_path_factory) -> dict[str, str]:
    """{name: prefix}; a2 and a3 open with the sequences of a, whose last three tokens fill no sequence."""
    folder = tmp_path_factory.mktemp("sources")
    found = {name: write_source(folder / name, i, n, tail=3) for i, (name, n) in enumerate(SEQUENCES.items())}
    found["a2"] = write_source(folder / "a2", 0, 52, tail=2)
    found["a3"] = write_source(folder / "a3", 0, 53)
    return found


def opened(paths: dict[str, str], entries: list[tuple[str, float | None]]) -> OpenData:
    train = [{"path": paths[name], "weight": weight} for name, weight in entries]
    config = DataConfig.model_validate({"train": train, "tokenizer": "byte"})
    return open_data(config, ByteTokenizer(), seq_length=L, seed=6, valid_sequences=1)


def named(sequences) -> list[tuple[int, int]]:
    return [(int(sequence[0]) - 4, 200 * (int(sequence[1]) - 4) + int(sequence[2]) - 4) for sequence in sequences]


class Run:
    """A run that draws its data as training does, from one checkpoint to the next."""

    def __init__(self, paths: dict[str, str]) -> None:
        self.paths, self.samples, self.mixture = paths, 0, None
        self.seen: list[tuple[int, int]] = []

    def go(self, entries: list[tuple[str, float | None]], samples: int) -> OpenData:
        """Go on with these sources for a number of samples, through a manifest."""
        data = opened(self.paths, entries)
        if self.mixture is not None:
            before = Mixture.model_validate_json(self.mixture)
            data = data.continued(next_mixture(before, data.identities, first_sample=self.samples))
        self.seen += named(data.train.sequences(range(self.samples, self.samples + samples))) if samples else []
        self.samples += samples
        reached = data.mixture_at(self.samples)
        assert sum(p.drawn for p in (*reached.sources, *reached.removed)) == self.samples
        self.mixture = reached.model_dump_json()
        return data


names = st.sampled_from(sorted(SEQUENCES))
mixtures = st.lists(names, min_size=1, max_size=4, unique=True).flatmap(
    lambda chosen: st.one_of(
        st.just([(name, None) for name in chosen]),
        st.tuples(*(st.tuples(st.just(name), st.floats(0.1, 5)) for name in chosen)).map(list),
    )
)


@settings(max_examples=40, deadline=None)
@given(st.lists(st.tuples(mixtures, st.integers(0, 90)), min_size=1, max_size=6))
def test_no_sequence_repeats_before_the_rest_of_its_source_has_come(paths, stretches):
    run, counts = Run(paths), Counter()
    for entries, samples in stretches:
        done = len(run.seen)
        run.go(entries, samples)
        for source, index in run.seen[done:]:
            size = list(SEQUENCES.values())[source]
            assert counts[source, index] == min(counts[source, i] for i in range(size))
            counts[source, index] += 1
    positions = Mixture.model_validate_json(run.mixture)
    for position in (*positions.sources, *positions.removed):
        source = list(SEQUENCES).index(Path(position.path).name)
        assert position.drawn == sum(counts[source, i] for i in range(position.sequences))


stretches = st.one_of(st.integers(0, 130), st.sampled_from([0, 12, 40, 52, 53, 80, 104]))


@settings(max_examples=40, deadline=None)
@given(
    st.lists(stretches, min_size=3, max_size=3),
    st.lists(st.sampled_from([[], ["b"], ["b", "c"]]), min_size=3, max_size=3),
)
@example([40, 12, 20], [[], [], []])  # each time at the very end of an epoch
@example([20, 32, 106], [[], [], []])
@example([15, 60, 90], [["b"], [], ["b", "c"]])
def test_a_grown_file_first_gives_the_rest_of_its_epoch_and_its_gains(paths, samples, others):
    run, counts = Run(paths), Counter({(0, index): 0 for index in range(40)})
    for (name, size), number, other in zip(GROWN.items(), samples, others, strict=True):
        most = max(count for (source, _), count in counts.items() if source == 0)
        for index in range(size):  # what was gained counts as seen in all earlier epochs
            counts.setdefault((0, index), max(0, most - 1))
        done, known = len(run.seen), set(run.seen)
        data = run.go([(name, None), *((one, None) for one in other)], number)
        sequences, start = data.train.sources[0], data.train.starts[0]
        drawn = [index for source, index in run.seen[done:] if source == 0]
        assert sequences.unseen(start) - sequences.unseen(start + len(drawn)) == len({(0, i) for i in drawn} - known)
        for source, index in run.seen[done:]:
            if source == 0:
                assert counts[0, index] == min(counts[0, i] for i in range(size))
            counts[source, index] += 1


@pytest.mark.parametrize("entries", [[("a", None)], [("b", None), ("c", None)], [("a", 1.0), ("small", 2.0)]])
def test_an_unchanged_mixture_is_the_same_whenever_it_is_resumed(paths, entries):
    whole = opened(paths, entries)
    wanted = whole.train.sequences(range(200)).tolist()
    for sample in (0, 1, 63, 150):
        resumed = opened(paths, entries).continued(whole.mixture_at(sample))
        assert resumed.train.sequences(range(sample, 200)).tolist() == wanted[sample:]


def test_the_usual_second_stage_a_goes_on_and_b_begins(paths):
    run = Run(paths)
    run.go([("a", None)], 20)
    data = run.go([("a", None), ("b", None)], 21)
    assert len(set(run.seen)) == 41, "nothing was seen twice"
    assert [position.name for position in data.mixture.sources] == ["train.0", "train.1"]
    assert data.train.first_sample == 20
    with pytest.raises(IndexError, match="sample 19 lies before sample 20, where this mixture begins"):
        data.train.sequences([19])


def test_a_source_that_was_left_out_keeps_its_position_and_returns_to_it(paths):
    run = Run(paths)
    run.go([("a", 1.0), ("c", 1.0)], 20)
    data = run.go([("a", None)], 5)
    assert [(p.name, p.drawn) for p in data.mixture.removed] == [("train.1", 10)]
    data = run.go([("b", None), ("c", None)], 10)
    assert [position.name for position in data.mixture.sources] == ["train.2", "train.1"]
    assert [position.name for position in data.mixture.removed] == ["train.0"]
    assert data.train.starts == [0, 10]
    assert len(set(run.seen)) == 35


def test_reordered_and_moved_sources_are_recognised_by_their_content(paths, tmp_path):
    moved = {**paths, "a": write_source(tmp_path / "elsewhere", 0, 40, tail=3)}
    run = Run(paths)
    run.go([("a", 1.0), ("b", 1.0)], 8)
    run.paths = moved
    data = run.go([("b", 1.0), ("a", 3.0)], 4)
    assert [position.name for position in data.mixture.sources] == ["train.1", "train.0"]
    assert data.train.starts == [4, 4]
    assert data.mixture.sources[1].path == moved["a"]


def test_the_same_sequences_in_other_files_go_on_under_their_name(paths, tmp_path):
    """Less than a sequence was appended, and the manifest is gone: other content by its hash, the same sequences."""
    run = Run(paths)
    run.go([("a", None)], 30)
    run.paths = {"a": write_source(tmp_path / "a", 0, 40, tail=1)}
    Path(f"{run.paths['a']}.json").unlink()
    data = run.go([("a", None)], 10)
    assert (data.mixture.sources[0].name, data.train.starts) == ("train.0", [30])
    assert sorted(run.seen) == [(0, index) for index in range(40)]


def test_other_content_at_the_same_path_is_a_new_source(paths, tmp_path):
    run = Run(paths)
    run.go([("a", None)], 30)
    run.paths = {"a": write_source(tmp_path / "a", 9, 60)}
    data = run.go([("a", None)], 10)
    assert (data.mixture.sources[0].name, data.train.starts) == ("train.1", [0])
    assert [position.drawn for position in data.mixture.removed] == [30]


def test_content_listed_twice_is_one_source_with_one_order(paths):
    twice = opened(paths, [("b", None), ("b", None), ("c", None)])
    assert [source.keys for source in twice.sources] == [("data.train[0]", "data.train[1]"), ("data.train[2]",)]
    assert twice.train.blend.shares == pytest.approx([14 / 37, 23 / 37])
    drawn = named(twice.train.sequences(range(37)))
    assert Counter(source for source, _ in drawn) == {1: 14, 2: 23}
    assert set(Counter(one for one in drawn if one[0] == 1).values()) == {2}
    weighted = opened(paths, [("b", 1.0), ("c", 1.0), ("b", 2.0)])
    assert weighted.weights == (3.0, 1.0)
    assert weighted.fingerprint == opened(paths, [("b", 3.0), ("c", 1.0)]).fingerprint


def test_sharing_by_size_and_by_the_same_weights_are_different_mixtures(paths):
    fingerprints = {
        opened(paths, entries).fingerprint
        for entries in (
            [("b", None), ("c", None)],
            [("b", 7.0), ("c", 23.0)],
            [("b", None), ("b", None), ("c", None)],
            [("c", None), ("b", None)],
        )
    }
    assert len(fingerprints) == 4
    assert opened(paths, [("b", None)]).fingerprint == opened(paths, [("b", 5.0)]).fingerprint


def test_positions_of_other_sources_are_our_mistake(paths):
    with pytest.raises(ValueError, match="a mixture of other sources"):
        opened(paths, [("b", None)]).continued(opened(paths, [("c", None)]).mixture)


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
