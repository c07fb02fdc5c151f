"""Bowls at equal compute: vertices that count, laws with run-level intervals, dirty budgets named."""

from __future__ import annotations

import numpy as np
import pytest

from megadiff.scaling.isoflop import isoflop
from megadiff.scaling.resampling import FitError, budget_codes
from tests.scaling.planted import BUDGETS, MASKED, SIZES, coverage, sweep

TRUTH = {"flops_per_token": 0.56629, "tokens": 0.43371, "loss": -0.04961}


def test_the_laws_of_a_sweep_without_noise_are_found():
    flops, size, loss, run = sweep(np.random.default_rng(0), noise=0.0)
    found = isoflop(flops, size, loss, run, draws=0)
    for name, exponent in TRUTH.items():
        assert found.laws[name].exponent == pytest.approx(exponent, abs=0.008), name
    assert found.laws["loss"](1e19) == pytest.approx(27.21883 * 1e19**-0.04961, rel=1e-3)
    assert found.laws["flops_per_token"](1e19) == pytest.approx(0.01761 * 1e19**0.56629, rel=0.02)
    assert (found.exponents_add_to, found.coefficients_multiply_to) == (pytest.approx(1), pytest.approx(1))
    assert [budget.excluded for budget in found.budgets] == [""] * 9
    assert [budget.curvature for budget in found.budgets] == pytest.approx([0.01] * 9, rel=0.1)


def test_run_level_intervals_hold_the_exponents():
    def intervals(rng):
        laws = isoflop(*sweep(rng), draws=200).laws
        return {name: laws[name].intervals["exponent"] for name in TRUTH}

    found = coverage(intervals, TRUTH)
    assert min(found.values()) >= 0.9, found


def test_intervals_of_points_are_too_narrow_for_whole_runs():
    def intervals(rng):
        flops, size, loss, run = sweep(rng)
        jitter = 1 + 1e-9 * run  # every point a run of its own
        return {"size": isoflop(flops, size * jitter, loss, draws=100).laws["flops_per_token"].intervals["exponent"]}

    assert coverage(intervals, {"size": 0.56629}, 40)["size"] < 0.75


def test_runs_of_their_own_at_each_budget_with_two_seeds():
    def intervals(rng):
        flops, size = np.repeat(BUDGETS, 18), np.tile(np.repeat(SIZES, 2), 9)
        loss = MASKED(size, flops / size) * np.exp(0.002 * rng.standard_normal(162))
        laws = isoflop(flops, size, loss, np.arange(162), draws=200).laws
        return {name: laws[name].intervals["exponent"] for name in TRUTH}

    found = coverage(intervals, TRUTH, 50)
    assert min(found.values()) >= 0.84, found


def test_the_run_noise_is_measured():
    found = [isoflop(*sweep(np.random.default_rng(seed)), draws=0) for seed in range(40)]
    assert np.sqrt(np.mean([fit.run_noise**2 for fit in found])) == pytest.approx(0.001, rel=0.15)
    assert found[0].dof == pytest.approx(6)


def test_an_incomplete_sweep_still_fits():
    rng = np.random.default_rng(1)
    flops, size, loss, run = sweep(rng, sizes=np.geomspace(5e7, 2e10, 15))
    near = np.abs(np.log(size / (0.01761 * flops**0.56629))) < np.log(6)
    found = isoflop(flops[near], size[near], loss[near], run[near], draws=200)
    low, high = found.laws["flops_per_token"].intervals["exponent"]
    assert low < 0.56629 < high
    assert len(found.budgets) == 9


def test_vertices_at_an_edge_two_points_and_hills_are_excluded_by_name():
    flops, size, loss, run = sweep(np.random.default_rng(0), noise=0.0)
    budget = budget_codes(flops)
    keep = np.ones(len(flops), dtype=bool)
    keep[(budget == 0) & (run > 1)] = False
    keep[(budget == 1) & (run > 0)] = False
    keep[(budget == 2) & (run < 6)] = False
    loss = np.where(budget == 3, 9 / loss, loss)
    found = isoflop(flops[keep], size[keep], loss[keep], run[keep], draws=20)
    reasons = [part.excluded for part in found.budgets]
    assert reasons[0].startswith("two-point")
    assert reasons[1].startswith("one-point")
    assert reasons[2] == "edge optimum: the vertex lies beyond the smallest size"
    assert reasons[3] == "the curvature is not positive"
    assert reasons[4:] == [""] * 5
    assert sum("two-point" in note for note in found.notes) == 1
    with pytest.raises(FitError, match=r"2 of 6 budgets have a vertex that counts.*edge optimum"):
        isoflop(
            flops[keep & (budget < 6)], size[keep & (budget < 6)], loss[keep & (budget < 6)], run[keep & (budget < 6)]
        )


def test_the_largest_budget_is_predicted_without_it():
    flops, size, loss, run = sweep(np.random.default_rng(5))
    found = isoflop(flops, size, loss, run).held_out
    assert found is not None
    assert found.flops == pytest.approx(2e20)
    assert abs(found.loss_error_percent) < 0.3
    bent = loss * np.where(flops > 1.9e20, 1.02, 1.0)
    missed = isoflop(flops, size, bent, run).held_out
    assert missed is not None
    assert not missed.is_within
    assert missed.loss_error_percent == pytest.approx(-2, abs=0.3)


def test_a_stated_noise_gives_intervals_where_the_data_have_none():
    flops, size, loss, run = sweep(np.random.default_rng(0), sizes=SIZES[[1, 4, 7]])
    bare = isoflop(flops, size, loss, run)
    assert np.isnan(bare.laws["loss"].standard_errors["exponent"])
    assert "no intervals" in bare.notes[-1]
    stated = isoflop(flops, size, loss, run, run_noise=0.001)
    assert 0 < stated.laws["flops_per_token"].standard_errors["exponent"] < 0.2


def test_budgets_two_percent_apart_are_told_apart():
    assert budget_codes(np.array([1.5e19, 2.4e19, 1.51e19, 2.41e19])).tolist() == [0, 1, 0, 1]


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda f, s, *rest: (f, s * (1 + 0.1 * (f > 1e19)), *rest), "has sizes from"),
        (lambda f, *rest: (np.where(f > 1e20, BUDGETS[-2], f), *rest), "two losses at a budget"),
    ],
)
def test_runs_that_contradict_themselves_are_refused(change, said):
    with pytest.raises(FitError, match=said):
        isoflop(*change(*sweep(np.random.default_rng(0))))
