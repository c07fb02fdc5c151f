"""Numbers of sequences in each step: constant, and ramped up in stages."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from megadiff.data.config import BatchConfig, BatchSizes, RampupConfig, StepBatch
from megadiff.errors import ConfigError


def ramped_up(final: int, start: int, increment: int, every: int) -> BatchSizes:
    return BatchSizes(final, RampupConfig(start=start, increment=increment, every_steps=every))


@st.composite
def any_sizes(draw: st.DrawFn) -> BatchSizes:
    final = draw(st.integers(1, 60))
    if draw(st.booleans()):
        return BatchSizes(final)
    return ramped_up(final, draw(st.integers(1, final)), draw(st.integers(1, 70)), draw(st.integers(1, 6)))


@settings(max_examples=150, deadline=None)
@given(any_sizes())
def test_the_closed_forms_are_what_counting_gives(sizes):
    first, origins = 0, []
    for step in range(sizes.end_of_rampup + 3):
        rampup = sizes.rampup
        want = sizes.global_batch_size
        if rampup is not None:
            want = min(want, rampup.start + step // rampup.every_steps * rampup.increment)
        assert sizes.sequences(step) == want
        assert (want == sizes.global_batch_size) == (step >= sizes.end_of_rampup)
        assert sizes.samples_before(step) == first
        assert sizes.batch_of(step) == StepBatch(step, first, want)
        assert want in sizes.distinct
        origins += [(step, first, want)] * want
        first += want
    for sample, (step, origin, sequences) in enumerate(origins):
        assert sizes.step_of(sample) == step
        assert sizes.origin_of(sample) == (origin, sequences)
    for samples in range(1, first):
        steps = sizes.steps_for_samples(samples)
        assert sizes.samples_before(steps - 1) < samples <= sizes.samples_before(steps)
    assert sizes.steps_for_samples(0) == 0
    assert sizes.distinct == sorted(set(sizes.distinct))


def test_a_rampup_by_hand():
    sizes = ramped_up(200, 64, 64, 500)
    assert sizes.distinct == [64, 128, 192, 200]
    assert [sizes.sequences(step) for step in (0, 499, 500, 999, 1000, 1499, 1500, 10**6)] == [
        *(64, 64, 128, 128, 192, 192, 200, 200)
    ]
    assert sizes.end_of_rampup == 1500
    assert sizes.samples_before(1500) == 500 * (64 + 128 + 192)
    assert sizes.samples_before(1502) == 500 * (64 + 128 + 192) + 400
    assert sizes.steps_for_samples(500 * 64 + 1) == 501
    assert sizes.num_microbatches(500, micro_batch_size=4, dp_size=8) == 4


def test_without_a_rampup_there_is_one_size():
    sizes = BatchSizes(24)
    assert (sizes.end_of_rampup, sizes.distinct) == (0, [24])
    assert sizes.origin_of(25) == (24, 24)
    assert sizes.steps_for_samples(25) == 2
    assert sizes.samples_before(10**12) == 24 * 10**12


def test_a_rampup_that_starts_at_its_end_is_none():
    assert ramped_up(8, 8, 4, 10).distinct == [8]
    assert ramped_up(8, 8, 4, 10).end_of_rampup == 0


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        (
            BatchSizes(12),
            r"= 4 x 2, found batch\.global_batch_size = 12; use 8 or 16, or change batch\.micro_batch_size",
        ),
        (BatchSizes(3), r"found batch\.global_batch_size = 3; use 8, or"),
        (ramped_up(64, 12, 8, 10), r"found batch\.rampup\.start = 12; use 8 or 16"),
        (ramped_up(64, 8, 8, 10), None),
        (ramped_up(64, 8, 12, 10), r"found 20 from step 10 on \(batch\.rampup\.increment = 12\); use 16 or 24"),
        (ramped_up(60, 8, 8, 10), r"found batch\.global_batch_size = 60; use 56 or 64"),
        (ramped_up(64, 8, 60, 10), None),
    ],
)
def test_a_size_that_does_not_divide_is_named(sizes, message):
    if message is None:
        sizes.check(micro_batch_size=4, dp_size=2)
        return
    with pytest.raises(ConfigError, match=message):
        sizes.check(micro_batch_size=4, dp_size=2)


def test_a_run_description_gives_a_rampup():
    rampup = {"start": 4, "increment": 4, "every_steps": 2}
    batch = BatchConfig.model_validate({"global_batch_size": 16, "micro_batch_size": 2, "rampup": rampup})
    assert BatchSizes(batch.global_batch_size, batch.rampup).distinct == [4, 8, 12, 16]
    assert BatchConfig(global_batch_size=16, micro_batch_size=2).rampup is None
    assert all(field.description for field in RampupConfig.model_fields.values())


@pytest.mark.parametrize(
    ("rampup", "message"),
    [
        ({"start": 32, "increment": 4, "every_steps": 2}, r"rampup\.start is 32, above batch\.global_batch_size = 16"),
        ({"start": 0, "increment": 4, "every_steps": 2}, "start"),
        ({"start": 4, "increment": 0, "every_steps": 2}, "increment"),
        ({"start": 4, "increment": 4}, "every_steps"),
        ({"start": 4, "increment": 4, "every_step": 2}, "every_step"),
    ],
)
def test_a_rampup_that_cannot_be_is_refused(rampup, message):
    with pytest.raises(ValidationError, match=message):
        BatchConfig.model_validate({"global_batch_size": 16, "micro_batch_size": 2, "rampup": rampup})
