import gc
import threading
import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megadiff.data.loader import GlobalBatch, RowLoader, clean_rows, microbatch_samples, num_microbatches
from megadiff.data.rows import PackedRows, TrainingRows
from megadiff.errors import ConfigError
from tests.data.corpora import counting_reader


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    reader = counting_reader(tmp_path_factory.mktemp("loader") / "p", 100 * 4)
    return TrainingRows([PackedRows(reader, 4, seed=1, name="a")], [1.0], seed=1)


def loader_threads():
    return [thread for thread in threading.enumerate() if thread.name == "megadiff-row-loader"]


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 10**9), st.integers(1, 5), st.integers(1, 4), st.integers(1, 4))
def test_every_split_of_a_step_covers_its_samples_once(first, micro, dp_size, microbatches):
    samples = [
        sample
        for rank in range(dp_size)
        for m in range(microbatches)
        for sample in microbatch_samples(first, micro_sequences=micro, dp_rank=rank, dp_size=dp_size, microbatch=m)
    ]
    assert sorted(samples) == list(range(first, first + micro * dp_size * microbatches))


def test_a_global_batch_that_does_not_divide_is_refused_with_the_nearest():
    assert num_microbatches(24, micro_sequences=3, dp_size=2) == 4
    with pytest.raises(ConfigError, match=r"must be a multiple of .* = 4 x 2, found 12; use 8 or 16, or change"):
        num_microbatches(12, micro_sequences=4, dp_size=2)
    with pytest.raises(ConfigError, match=r"found 3; use 8, or"):
        num_microbatches(3, micro_sequences=4, dp_size=2)


@pytest.mark.parametrize(("micro", "dp_size"), [(1, 1), (2, 1), (1, 4), (2, 2), (4, 1)])
def test_ranks_together_see_the_rows_of_the_samples_whatever_the_layout(rows, micro, dp_size):
    seen = {}
    for rank in range(dp_size):
        with RowLoader(rows, clean_rows, batch=GlobalBatch(4, micro, rank, dp_size)) as loader:
            for _ in range(3 * loader.microbatches_per_step):
                samples, clean = next(loader)
                assert clean.shape == (micro, 4)
                seen.update(zip(samples, clean.tolist(), strict=True))
            assert loader.samples_seen == 12
    assert seen == dict(enumerate(rows.rows(range(12)).tolist()))


def test_resuming_replays_no_sample_and_skips_none(rows):
    batch = GlobalBatch(4, 2)
    with RowLoader(rows, clean_rows, batch=batch) as loader:
        straight = [next(loader).samples for _ in range(6)]
    with RowLoader(rows, clean_rows, batch=batch) as loader:
        head = [next(loader).samples for _ in range(2)]
        seen = loader.samples_seen
    with RowLoader(rows, clean_rows, batch=batch, first_sample=seen) as loader:
        assert head + [next(loader).samples for _ in range(4)] == straight


def test_a_step_counts_as_seen_when_its_last_microbatch_was_taken(rows):
    with RowLoader(rows, clean_rows, batch=GlobalBatch(4, 2), first_sample=8) as loader:
        assert loader.samples_seen == 8
        next(loader)
        assert loader.samples_seen == 8
        next(loader)
        assert loader.samples_seen == 12


def test_the_row_transform_runs_in_the_background_at_most_so_far_ahead(rows):
    made = []

    def transform(clean: np.ndarray, samples: list[int]) -> int:
        assert threading.current_thread().name == "megadiff-row-loader"
        made.append(samples)
        return int(clean.sum())

    with RowLoader(rows, transform, batch=GlobalBatch(1, 1), prefetch=2) as loader:
        assert next(loader).content == int(rows.rows([0]).sum())
        time.sleep(0.3)
        assert 2 <= len(made) <= 4  # taken, two ready, one waiting for room


def test_an_error_in_the_background_reaches_the_consumer_in_its_turn_and_stays(rows):
    def transform(clean: np.ndarray, samples: list[int]) -> np.ndarray:
        if samples == [2]:
            raise RuntimeError("row 2 is broken")
        return clean

    with RowLoader(rows, transform, batch=GlobalBatch(1, 1)) as loader:
        assert [next(loader).samples for _ in range(2)] == [[0], [1]]
        for _ in range(2):
            with pytest.raises(RuntimeError, match="row 2 is broken"):
                next(loader)


def test_a_closed_or_dropped_loader_leaves_no_thread(rows):
    loader = RowLoader(rows, clean_rows, batch=GlobalBatch(1, 1))
    next(loader)
    loader.close()
    loader.close()
    with pytest.raises(ValueError, match="the loader is closed"):
        next(loader)
    dropped = RowLoader(rows, clean_rows, batch=GlobalBatch(1, 1))
    next(dropped)
    del dropped
    gc.collect()
    deadline = time.monotonic() + 5
    while loader_threads() and time.monotonic() < deadline:
        time.sleep(0.02)
    assert loader_threads() == []
