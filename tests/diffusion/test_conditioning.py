"""Prompts, infilling, empty tokens and level patterns, against the numbers of gidd.md section 2."""

from __future__ import annotations

import math

import numpy as np
import pytest

from megadiff.diffusion.conditioning import (
    arccos_law,
    draw_sequences,
    empty_counts,
    empty_positions,
    insert_empties,
    linear_log_snr,
    noisy_positions,
    prompt_lengths,
)
from megadiff.diffusion.config import ConditioningConfig
from megadiff.diffusion.philox import Stream
from megadiff.diffusion.schedules import LINEAR

ROWS = np.arange(20000)


def test_linear_levels_of_four_tokens():
    np.testing.assert_allclose(linear_log_snr(4, LINEAR), [1.386, 0.405, -0.405, -1.386], atol=5e-4)
    assert linear_log_snr(10**6, LINEAR)[[0, -1]].tolist() == [9.0, -9.0]


def test_the_prompt_fraction_follows_its_law():
    got = arccos_law([0.01, 0.1, 0.25, 0.5, 0.9, 0.0])
    np.testing.assert_allclose(got, [0.0638, 0.2048, 0.3333, 0.5, 0.7952, 0], atol=5e-5)
    r = np.linspace(0.001, 0.999, 101)
    np.testing.assert_allclose(arccos_law(r), np.arccos(1 - 2 * r) / math.pi, rtol=1e-13)


def test_a_prompt_has_at_least_one_token_and_ends_at_its_fraction():
    assert prompt_lengths(np.array([-1.0, 0.0, 0.5, 0.999, 1.0]), 9).tolist() == [0, 1, 5, 8, 9]


def test_coins_fall_as_often_as_asked():
    draws = draw_sequences(
        Stream(0, "sequence"),
        ROWS,
        ConditioningConfig(per_token_noise=0.5, linear_noise=0.1, prompt=0.2, infilling=0.3, pad_insertion=0.2),
    )
    share = np.bincount(draws.pattern, minlength=3) / len(ROWS)
    np.testing.assert_allclose(share, [0.4, 0.5, 0.1], atol=0.015)
    assert (draws.prompt_fraction >= 0).mean() == pytest.approx(0.2, abs=0.015)
    assert (draws.infill_fraction > 0).mean() == pytest.approx(0.3, abs=0.015)
    assert draws.prompt_fraction[draws.prompt_fraction >= 0].mean() == pytest.approx(0.5, abs=0.02)
    assert draws.empty_fraction.max() < 0.2
    assert draws.empty_fraction.mean() == pytest.approx(0.1, abs=0.002)


def test_no_coin_falls_without_being_asked():
    draws = draw_sequences(Stream(0, "sequence"), ROWS, ConditioningConfig())
    assert not draws.pattern.any()
    assert (draws.prompt_fraction < 0).all()
    assert not draws.infill_fraction.any()
    assert not draws.empty_fraction.any()


def test_max_fraction_shortens_prompts():
    draws = draw_sequences(Stream(0, "sequence"), ROWS, ConditioningConfig(prompt=1.0, max_fraction=0.25))
    assert draws.prompt_fraction.max() <= 0.25
    assert draws.prompt_fraction.mean() == pytest.approx(0.125, abs=0.003)


def test_infilling_keeps_its_share_of_tokens():
    draws = draw_sequences(Stream(0, "sequence"), ROWS[:500], ConditioningConfig(infilling=1.0))
    is_noisy, prompt = noisy_positions(draws, 400, ROWS[:500], Stream(0, "infill"))
    assert not prompt.any()
    np.testing.assert_allclose(1 - is_noisy.mean(axis=1), draws.infill_fraction, atol=0.13)


@pytest.mark.parametrize(("law", "counts"), [("share", [0, 205, 410]), ("released", [0, 228, 512])])
def test_empty_counts_of_both_laws(law, counts):
    """The released code's 20 % make 25 % of the sequence empty."""
    assert empty_counts(np.array([0.0, 0.1, 0.2]), 2048, law).tolist() == counts


def test_empties_stand_anywhere_and_push_the_last_tokens_out():
    counts = np.full(3000, 3)
    is_empty = empty_positions(Stream(0, "empty"), ROWS[:3000], counts, 10)
    assert (is_empty.sum(axis=1) == 3).all()
    np.testing.assert_allclose(is_empty.mean(axis=0), 0.3, atol=0.04)
    sequence = np.arange(10, 20)[None]
    where = np.zeros((1, 10), dtype=bool)
    where[0, [0, 4, 9]] = True
    moved, source = insert_empties(sequence, where, 2)
    assert moved.tolist() == [[2, 10, 11, 12, 2, 13, 14, 15, 16, 2]]
    assert source.tolist() == [[0, 0, 1, 2, 3, 3, 4, 5, 6, 7]]
