"""Differences of two runs over the same sequences: their errors, what is refused, and what survives in the file."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
from scipy import stats

from megadiff.errors import DataError, StorageError
from megadiff.scaling.paired import EvaluationNoise, PerSequence, compare, read

DRAWS = EvaluationNoise(0, 4, (-9.0, 9.0))


def figures(elbo, sequences="abc", noise=DRAWS):
    return PerSequence(sequences, noise, tuple(map(float, elbo)))


def test_the_error_is_that_of_the_differences_and_covers_the_truth():
    """A shared part per sequence of 10 times the runs' own leaves 1/7 of the error; 400 intervals cover 95 %."""
    rng = np.random.default_rng(1)
    scores, inside = [], 0
    for _ in range(400):
        shared = rng.normal(3, 0.5, 60)
        a, b = (figures(shared + gap + rng.normal(0, 0.05, 60)) for gap in (0.02, 0.0))
        found = compare(a, b)
        assert found.sequences == 60
        assert found.difference == pytest.approx(a.mean - b.mean, abs=1e-12)
        assert 5 < found.unpaired_stderr / found.stderr < 15
        scores.append((found.difference - 0.02) / found.stderr)
        inside += found.low <= 0.02 <= found.high
    assert np.std(scores) == pytest.approx(1, abs=0.12)
    assert 0.92 < inside / 400 < 0.975


@pytest.mark.parametrize("count", [2, 3, 4, 5, 8, 30, 4096])
def test_few_sequences_have_the_intervals_of_student(count):
    rng = np.random.default_rng(count)
    a, b = rng.normal(size=(2, count))
    found, wanted = compare(figures(a), figures(b)), stats.ttest_rel(a, b).confidence_interval(0.95)
    assert (found.low, found.high) == pytest.approx((wanted.low, wanted.high), rel=3e-3)


@pytest.mark.parametrize(
    ("other", "message"),
    [
        (figures([1, 2, 3], sequences="xyz"), "different sequences .3 with the fingerprint abc and 3 with xyz."),
        (figures([1, 2]), "different sequences .3 with the fingerprint abc and 2 with abc."),
        (figures([1, 2, 3], noise=EvaluationNoise(0, 8, (-9.0, 9.0))), r"noise \(4 level.* and 8 level.s. over"),
        (figures([1, 2, 3], noise=EvaluationNoise(0, 4, (-9.0, 11.0))), "under different noise"),
        (figures([1, 2, math.nan]), "not finite"),
    ],
)
def test_what_has_no_pairs_is_refused(other, message):
    with pytest.raises(DataError, match=message):
        compare(figures([1, 2, 3]), other)


def test_an_exact_likelihood_compares_with_a_bound():
    assert compare(figures([1, 2, 3], noise=None), figures([2, 3, 4.5])).difference == pytest.approx(-3.5 / 3)


def test_the_file_gives_back_what_was_written_and_skips_what_is_damaged(tmp_path):
    whole = [figures([1.25, 2.5]), figures([1.0, float("nan")]), figures([0.5, 0.75], noise=None)]
    entries = [json.dumps({"step": step, **found.as_entries()}) for step, found in zip((5, 0, 9), whole, strict=True)]
    damaged = [
        '{"step": 10, "sequences": "abc", "noise": null, "elbo": [1.0, "x"]}',
        '{"step": 11, "sequences": 3, "noise": null, "elbo": [1.0]}',
        '{"step": 12, "sequences": "abc", "noise": {"seed": 0}, "elbo": [1.0]}',
        '{"step": -1, "sequences": "abc", "noise": null, "elbo": [1.0]}',
        '[1, 2]\n\x00garbage\n{"step": 13, "sequences": "abc", "elbo": [1.0',
    ]
    text = "\n".join([*entries, *damaged]).replace("NaN", "null")
    (tmp_path / "validation.jsonl").write_text(text)
    found = read(tmp_path)
    assert list(found) == [0, 5, 9]
    assert (found[5], found[9]) == (whole[0], whole[2])
    assert math.isnan(found[0].elbo[1])


def test_a_run_without_the_file_has_no_figures(tmp_path):
    assert read(tmp_path) == {}
    (tmp_path / "validation.jsonl").mkdir()
    with pytest.raises(StorageError, match=r"validation\.jsonl"):
        read(tmp_path)
