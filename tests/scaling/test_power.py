"""A simulated sweep predicts the errors of real ones."""

from __future__ import annotations

import numpy as np
import pytest

from megadiff.scaling.isoflop import isoflop
from megadiff.scaling.power import LossSurface, SweepDesign, predict
from megadiff.scaling.resampling import FitError
from tests.scaling.planted import BUDGETS, MASKED, SIZES, UNIFORM, sweep

DESIGN = SweepDesign(tuple(BUDGETS), tuple(SIZES), run_noise=0.001)


def test_a_surface_from_optimal_laws_has_them():
    for flops in (1e18, 1e21):
        size = np.geomspace(1e6, 1e13, 200001)
        loss = MASKED(size, flops / size)
        assert loss.min() == pytest.approx(27.21883 * flops**-0.04961, rel=1e-6)
        assert size[loss.argmin()] == pytest.approx(0.01761 * flops**0.56629, rel=1e-3)


def test_predicted_errors_are_those_of_50_sweeps_within_a_fifth():
    predicted = predict(DESIGN, MASKED, draws=1000)
    fits = [isoflop(*sweep(np.random.default_rng(seed)), draws=0) for seed in range(50)]
    for name in ("flops_per_token", "tokens", "loss"):
        found = np.std([fit.laws[name].exponent for fit in fits], ddof=1)
        assert predicted.standard_errors[name] == pytest.approx(found, rel=0.2), name
    assert predicted.inner_budgets == pytest.approx(9, abs=0.1)
    assert predicted.exponents["flops_per_token"] == pytest.approx(0.56629)
    assert (predicted.runs, predicted.budgets) == (9, 9)
    assert predicted.flops == pytest.approx(9 * 2e20)


def test_the_chance_to_tell_two_noises_apart_rises_with_seeds_and_width():
    def chance(seeds, noise, factor=1.0):
        sizes = tuple(np.exp(np.log(1e9) + (np.log(SIZES) - np.log(1e9)) * factor))
        found = predict(SweepDesign(tuple(BUDGETS), sizes, noise, seeds=seeds), MASKED, UNIFORM)
        assert found.told_apart is not None
        return found.told_apart["flops_per_token"]

    assert chance(1, 0.001) < 0.3
    assert chance(1, 0.0001) > 0.9
    assert chance(8, 0.001) > chance(1, 0.001)
    same = predict(DESIGN, MASKED, MASKED).told_apart
    assert same is not None
    assert same["flops_per_token"] < 0.06


def test_runs_of_their_own_and_a_window_change_the_cost():
    own = predict(SweepDesign(tuple(BUDGETS), tuple(SIZES), 0.001, shares_runs=False), MASKED)
    assert own.runs == 81
    assert own.flops == pytest.approx(9 * BUDGETS.sum())
    narrow = predict(SweepDesign(tuple(BUDGETS), tuple(SIZES), 0.001, window=4.0), MASKED)
    assert narrow.flops < 9 * 2e20
    assert narrow.standard_errors["flops_per_token"] > predict(DESIGN, MASKED).standard_errors["flops_per_token"]


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: predict(SweepDesign(tuple(BUDGETS), (1e6, 2e6, 3e6), 1e-3), MASKED), "no simulated sweep"),
        (lambda: predict(SweepDesign(tuple(BUDGETS), (1e8, -1.0), 1e-3), MASKED), r"sizes\[1\] is -1"),
        (lambda: predict(SweepDesign(tuple(BUDGETS), tuple(SIZES), -1e-3), MASKED), "noises of 0 or more"),
        (lambda: LossSurface.from_optimum((27.0, 0.05), (0.02, 0.57)), "falling loss"),
    ],
)
def test_designs_without_a_fit_are_refused(make, said):
    with pytest.raises(FitError, match=said):
        make()
