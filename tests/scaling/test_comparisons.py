"""Ratios, repeated data, crossings and speed-ups with intervals that hold planted truths."""

from __future__ import annotations

import numpy as np
import pytest

from megadiff.scaling.comparisons import annealing_ratio, crossing, repeats, speed_up
from megadiff.scaling.fit import power_law, surface
from megadiff.scaling.resampling import FitError
from tests.scaling.planted import BUDGETS, coverage

LAWS = ((27.21883, -0.04961), (31.26171, -0.05219))
CROSSING = (LAWS[1][0] / LAWS[0][0]) ** (1 / (LAWS[0][1] - LAWS[1][1]))


def planted(rng, noise=0.001):
    return [
        power_law(BUDGETS, A * BUDGETS**a * np.exp(noise * rng.standard_normal(9)), draws=300, seed=seed)
        for seed, (A, a) in enumerate(LAWS)
    ]


def test_the_annealing_ratio_of_80_paired_values():
    trunk = np.repeat(np.arange(20), 2)

    def intervals(rng):
        ratio = 1.0245 * np.exp(0.004 * rng.standard_normal(20)[trunk] + 0.002 * rng.standard_normal(40))
        annealed = 3 + rng.random(40)
        return annealing_ratio(annealed * ratio, annealed, trunk).intervals

    assert coverage(intervals, {"ratio": 1.0245})["ratio"] >= 0.9
    assert annealing_ratio([2.0, 2.2, 2.4], [1.0, 1.1, 1.2]).estimates["ratio"] == pytest.approx(2)
    with pytest.raises(FitError, match="at least 3 trunks, found 2"):
        annealing_ratio([2.0, 2.2, 2.4], [1.0, 1.1, 1.2], ["a", "a", "b"])


def test_crossings_and_speed_ups_hold_the_truth():
    loss = LAWS[1][0] * 1e20 ** LAWS[1][1]
    ratio = 1e20 / (loss / LAWS[0][0]) ** (1 / LAWS[0][1])

    def intervals(rng):
        first, second = planted(rng)
        saved = speed_up(first, second, flops=1e20)
        return {"crossing": crossing(first, second).interval, "ratio": saved.interval}

    found = coverage(intervals, {"crossing": CROSSING, "ratio": ratio})
    assert min(found.values()) >= 0.9, found


def test_a_crossing_beyond_the_data_is_an_extrapolation():
    found = crossing(*planted(np.random.default_rng(0), noise=1e-4))
    assert found.flops == pytest.approx(CROSSING, rel=0.2)
    assert found.is_extrapolated
    assert found.is_resolved
    assert found.interval[0] < CROSSING < found.interval[1]


def test_slopes_that_are_not_told_apart_leave_a_crossing_open():
    found = crossing(*planted(np.random.default_rng(0), noise=0.02))
    assert not found.is_resolved
    assert found.interval[1] == np.inf or found.interval[0] == 0
    parallel = crossing(power_law(BUDGETS, BUDGETS**-0.05), power_law(BUDGETS, 2 * BUDGETS**-0.05))
    assert np.isnan(parallel.flops)
    assert not parallel.is_resolved


def test_a_speed_up_names_one_place_and_a_reachable_loss():
    first, second = planted(np.random.default_rng(0))
    with pytest.raises(FitError, match="exactly one"):
        speed_up(first, second)
    with pytest.raises(FitError, match="at or below a law's floor"):
        speed_up(first, second, loss=0.0)
    assert speed_up(first, first, loss=3.0).ratio == pytest.approx(1)
    assert speed_up(first, second, loss=1.5).is_extrapolated


def repeated(rng, r_star=15.0):
    unique, epochs = np.repeat([3e8, 1e9], 6), np.tile([1, 2, 4, 8, 16, 32], 2)
    effective = unique * (1 + r_star * (1 - np.exp(-(epochs - 1) / r_star)))
    loss = 1.7 + 480 * 1e8**-0.35 + 2100 * effective**-0.37
    return np.full(12, 1e8), unique, unique * epochs, loss * np.exp(0.002 * rng.standard_normal(12))


def test_repeated_data_are_worth_what_was_planted():
    n, d = np.repeat(np.geomspace(1e7, 1e9, 6), 6), np.tile(np.geomspace(3e8, 3e10, 6), 6)

    def intervals(rng):
        loss = (1.7 + 480 * n**-0.35 + 2100 * d**-0.37) * np.exp(0.002 * rng.standard_normal(36))
        law = surface(n, d, loss, "varpro", draws=25)
        return repeats(*repeated(rng), law, draws=60).intervals

    assert coverage(intervals, {"r_star": 15}, 12)["r_star"] >= 0.75
    law = surface(n, d, 1.7 + 480 * n**-0.35 + 2100 * d**-0.37, "varpro", draws=0)
    size, unique, tokens, loss = repeated(np.random.default_rng(0))
    assert repeats(size, unique, tokens, loss, law).estimates["r_star"] == pytest.approx(15, rel=0.1)
    with pytest.raises(FitError, match="as much as new data"):
        repeats(size, unique, tokens, 1.7 + 480 * size**-0.35 + 2100 * (tokens * 1.1) ** -0.37, law)
    with pytest.raises(FitError, match="fewer than the unique"):
        repeats(size, tokens * 2, tokens, loss, law)
    with pytest.raises(FitError, match=r"seen more than 1\.5 times, found 0"):
        repeats(size, tokens, tokens, loss, law)
