import gc
import threading
import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megadiff.data.config import BatchSizes, RampupConfig, StepBatch
from megadiff.data.loader import DataShard, SequenceLoader, clean_sequences, microbatch_samples
from megadiff.data.sequences import ShuffledSequences, TrainingSequences
from megadiff.errors import ConfigError
from tests.data.corpora import counting_reader


@pytest.fixture(scope="module")
def sequences(tmp_path_factory):
    reader = counting_reader(tmp_path_factory.mktemp("loader") / "p", 100 * 4)
    return TrainingSequences([ShuffledSequences(reader, 4, seed=1, name="a")], [1.0], seed=1)


RAMPED = BatchSizes(12, RampupConfig(start=4, increment=4, every_steps=3))
"""4, 4, 4, 8, 8, 8, 12, 12, ..."""


def loader_threads():
    return [thread for thread in threading.enumerate() if thread.name == "megadiff-sequence-loader"]


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 10**9), st.integers(1, 5), st.integers(1, 4), st.integers(1, 4))
def test_every_split_of_a_step_covers_its_samples_once(first, micro, dp_size, microbatches):
    samples = [
        sample
        for rank in range(dp_size)
        for m in range(microbatches)
        for sample in microbatch_samples(first, micro_batch_size=micro, dp_rank=rank, dp_size=dp_size, microbatch=m)
    ]
    assert sorted(samples) == list(range(first, first + micro * dp_size * microbatches))


def test_a_batch_that_does_not_divide_is_refused(sequences):
    with pytest.raises(
        ConfigError, match=r"must be a multiple of .* = 4 x 2, found batch\.global_batch_size = 12; use 8 or"
    ):
        SequenceLoader(sequences, clean_sequences, sizes=BatchSizes(12), shard=DataShard(4, 0, 2))
    assert loader_threads() == []


@pytest.mark.parametrize("sizes", [BatchSizes(4), RAMPED], ids=["constant", "rampup"])
@pytest.mark.parametrize(("micro", "dp_size"), [(1, 1), (2, 1), (1, 4), (2, 2), (4, 1)])
def test_ranks_together_see_the_same_sequences_on_every_layout(sequences, sizes, micro, dp_size):
    seen, steps = {}, 9
    for rank in range(dp_size):
        with SequenceLoader(sequences, clean_sequences, sizes=sizes, shard=DataShard(micro, rank, dp_size)) as loader:
            for step in range(steps):
                for _ in range(loader.microbatches_in(step)):
                    batch, samples, clean = next(loader)
                    assert clean.shape == (micro, 4)
                    assert batch == (step, sizes.samples_before(step), sizes.sequences(step))
                    assert all(sizes.origin_of(sample) == batch[1:] for sample in samples)
                    seen.update(zip(samples, clean.tolist(), strict=True))
            assert loader.samples_seen == sizes.samples_before(steps)
    assert seen == dict(enumerate(sequences.sequences(range(sizes.samples_before(steps))).tolist()))


@pytest.mark.parametrize("sizes", [BatchSizes(4), RAMPED], ids=["constant", "rampup"])
@pytest.mark.parametrize("stop", [1, 2, 3, 5, 6, 8])
def test_resuming_replays_no_sample_and_skips_none(sequences, sizes, stop):
    shard = DataShard(2)
    with SequenceLoader(sequences, clean_sequences, sizes=sizes, shard=shard) as loader:
        straight = [next(loader)[:2] for _ in range(sizes.samples_before(9) // 2)]
    with SequenceLoader(sequences, clean_sequences, sizes=sizes, shard=shard) as loader:
        head = [next(loader)[:2] for _ in range(sizes.samples_before(stop) // 2)]
        assert loader.steps_taken == stop
        assert loader.samples_seen == sizes.samples_before(stop)
    with SequenceLoader(sequences, clean_sequences, sizes=sizes, shard=shard, first_step=stop) as loader:
        assert loader.steps_taken == stop
        assert head + [next(loader)[:2] for _ in range(len(straight) - len(head))] == straight


def test_a_step_counts_as_taken_when_its_last_microbatch_was(sequences):
    with SequenceLoader(sequences, clean_sequences, sizes=BatchSizes(4), shard=DataShard(2), first_step=2) as loader:
        taken = [(loader.steps_taken, loader.samples_seen)]
        for _ in range(3):
            next(loader)
            taken.append((loader.steps_taken, loader.samples_seen))
    assert taken == [(2, 8), (2, 8), (3, 12), (3, 12)]


def test_the_sequence_transform_runs_a_bounded_distance_ahead(sequences):
    made = []

    def transform(clean: np.ndarray, samples: list[int], batch: StepBatch) -> int:
        assert threading.current_thread().name == "megadiff-sequence-loader"
        made.append(samples)
        return int(clean.sum())

    with SequenceLoader(sequences, transform, sizes=BatchSizes(1), shard=DataShard(1), prefetch=2) as loader:
        assert next(loader).content == int(sequences.sequences([0]).sum())
        time.sleep(0.3)
        assert 2 <= len(made) <= 4  # taken, two ready, one waiting for room


@pytest.mark.parametrize("sizes", [BatchSizes(12), RAMPED], ids=["constant", "rampup"])
def test_a_whole_step_is_made_ready_while_the_one_before_runs(sequences, sizes):
    """A step takes all its microbatches at once: what is not ready by then, the device waits for."""
    made = []

    def transform(clean: np.ndarray, samples: list[int], batch: StepBatch) -> int:
        made.append(batch.step)
        return 0

    with SequenceLoader(sequences, transform, sizes=sizes, shard=DataShard(2, 1, 2)) as loader:
        for step in range(9):
            deadline = time.monotonic() + 5
            while made.count(step) < loader.microbatches_in(step) and time.monotonic() < deadline:
                time.sleep(0.01)
            assert made.count(step) == loader.microbatches_in(step)
            for _ in range(loader.microbatches_in(step)):
                next(loader)
        assert len(made) <= sum(loader.microbatches_in(step) for step in range(9)) + 3 + 1


def test_a_background_error_reaches_the_consumer_in_turn_and_stays(sequences):
    def transform(clean: np.ndarray, samples: list[int], batch: StepBatch) -> np.ndarray:
        if samples == [2]:
            raise RuntimeError("sequence 2 is broken")
        return clean

    with SequenceLoader(sequences, transform, sizes=BatchSizes(1), shard=DataShard(1)) as loader:
        assert [next(loader).samples for _ in range(2)] == [[0], [1]]
        for _ in range(2):
            with pytest.raises(RuntimeError, match="sequence 2 is broken"):
                next(loader)


def test_a_closed_or_dropped_loader_leaves_no_thread(sequences):
    loader = SequenceLoader(sequences, clean_sequences, sizes=BatchSizes(1), shard=DataShard(1))
    next(loader)
    loader.close()
    loader.close()
    with pytest.raises(ValueError, match="the loader is closed"):
        next(loader)
    dropped = SequenceLoader(sequences, clean_sequences, sizes=BatchSizes(1), shard=DataShard(1))
    next(dropped)
    del dropped
    gc.collect()
    deadline = time.monotonic() + 5
    while loader_threads() and time.monotonic() < deadline:
        time.sleep(0.02)
    assert loader_threads() == []
