import pytest

from megadiff.data.sequences import ShuffledSequences, TrainingSequences, ValidationSequences
from megadiff.errors import DataError
from tests.data.corpora import counting_reader

L = 8


@pytest.fixture(scope="module")
def reader(tmp_path_factory):
    return counting_reader(tmp_path_factory.mktemp("sequences") / "p", 43 * L + 5)


def test_an_epoch_holds_every_sequence_once_and_the_next_in_another_order(reader):
    sequences = ShuffledSequences(reader, L, seed=1, name="a")
    assert sequences.len_epoch == 43
    epochs = [[sequences.sequence(epoch * 43 + k).tolist() for k in range(43)] for epoch in range(2)]
    in_file_order = [list(range(10 + k * L, 10 + (k + 1) * L)) for k in range(43)]
    assert sorted(epochs[0]) == sorted(epochs[1]) == in_file_order
    assert epochs[0] != epochs[1]
    assert epochs[0] != in_file_order


def test_a_sequence_is_a_function_of_seed_name_and_number(reader):
    sequences = ShuffledSequences(reader, L, seed=1, name="a")
    forward = [sequences.sequence(k).tolist() for k in range(200)]
    again = ShuffledSequences(reader, L, seed=1, name="a")
    assert [again.sequence(k).tolist() for k in reversed(range(200))][::-1] == forward
    for other in (ShuffledSequences(reader, L, seed=2, name="a"), ShuffledSequences(reader, L, seed=1, name="b")):
        assert [other.sequence(k).tolist() for k in range(43)] != forward[:43]


def test_less_than_a_sequence_is_refused_and_exactly_one_is_enough(tmp_path):
    with pytest.raises(
        DataError, match=r"wanted at least one sequence of 8 tokens, found 7 in all; give more text or lower"
    ):
        ShuffledSequences(counting_reader(tmp_path / "short", 7), 8, seed=0, name="a")
    one = ShuffledSequences(counting_reader(tmp_path / "one", 8), 8, seed=0, name="a")
    assert one.sequence(0).tolist() == one.sequence(5).tolist() == list(range(10, 18))


def test_training_sequences_follow_the_blend(reader, tmp_path):
    sources = [ShuffledSequences(reader, L, seed=1, name="a"), ShuffledSequences(reader, L, seed=1, name="b")]
    training = TrainingSequences(sources, [3, 1], seed=1)
    samples = [0, 1, 17, 5000, 123_456]
    sequences = training.sequences(samples)
    assert sequences.shape == (5, L)
    for sample, sequence in zip(samples, sequences, strict=True):
        place = training.blend.place(sample)
        assert sequence.tolist() == sources[place.source].sequence(place.index).tolist()
    assert training.epochs_at(43 * 4) == pytest.approx([3.0, 1.0])


def test_sources_of_one_name_are_our_mistake(reader):
    same = ShuffledSequences(reader, L, seed=1, name="a")
    with pytest.raises(ValueError, match="different names"):
        TrainingSequences([same, same], [1, 1], seed=1)


def test_validation_sequences_are_spread_over_the_file_in_its_order(reader):
    sequences = ValidationSequences(reader, L, num_sequences=4, name="v")
    assert len(sequences) == 4
    assert [(sequence[0] - 10) // L for sequence in sequences.sequences(range(4))] == [0, 10, 21, 32]
    assert sequences.bytes_per_token == 1.0
    with pytest.raises(IndexError, match=r"indices must lie in 0 to 3, got \[4\]"):
        sequences.sequences([4])


def test_more_validation_sequences_than_there_are_means_all(reader):
    sequences = ValidationSequences(reader, L, num_sequences=1000, name="v")
    assert [(sequence[0] - 10) // L for sequence in sequences.sequences(range(len(sequences)))] == list(range(43))


def test_the_order_of_a_weighted_blend_is_what_it_was(tmp_path):
    """Sequence numbers by sample, those of the second source with 1000 added, as of before sources had positions."""
    readers = [counting_reader(tmp_path / "a", 43 * L + 5), counting_reader(tmp_path / "b", 17 * L)]
    sources = [ShuffledSequences(reader, L, seed=4, name=f"train.{i}") for i, reader in enumerate(readers)]
    training = TrainingSequences(sources, [2, 1], seed=4)

    def numbers(samples):
        origins = [training.origin(sample) for sample in samples]
        return [origin.token // L + 1000 * origin.prefix.endswith("b") for origin in origins]

    assert numbers(range(16)) == [23, 16, 1004, 22, 1009, 14, 36, 1005, 26, 1007, 42, 29, 1016, 12, 24, 25]
    assert numbers(range(12345, 12361)) == [
        33, 28, 21, 1000, 20, 1008, 42, 41, 1007, 40, 1014, 29, 11, 30, 1001, 26,
    ]  # fmt: skip


def test_epochs_are_counted_sequence_by_sequence(reader):
    sources = [ShuffledSequences(reader, L, seed=1, name="a"), ShuffledSequences(reader, L, seed=1, name="b")]
    training = TrainingSequences(sources, [3, 1], seed=1, first_sample=100, starts=[60, 5])
    places = [training.place(sample) for sample in range(100, 321)]
    for source, start in enumerate((60, 5)):
        drawn = [place.index for place in places if place.source == source]
        assert drawn == list(range(start, start + len(drawn)))
        assert training.drawn_before(321)[source] == start + len(drawn)
        assert training.epochs_at(321)[source] == (start + len(drawn)) / 43
    with pytest.raises(ValueError, match="one weight and one start for each source"):
        TrainingSequences(sources, [3, 1], seed=1, starts=[1])
