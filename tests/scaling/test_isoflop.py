"""Bowls at equal compute: vertices that count, laws with run-level intervals, dirty budgets named."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.optimize import least_squares

from megadiff.scaling.isoflop import _design, isoflop
from megadiff.scaling.resampling import FitError, as_points, budget_codes, group_codes
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


def test_a_single_bowl_without_noise_finds_the_laws():
    found = isoflop(*sweep(np.random.default_rng(0), noise=0.0), draws=0)
    for name, exponent in TRUTH.items():
        assert found.single.laws[name].exponent == pytest.approx(exponent, abs=0.002), name
    assert found.single.laws["loss"](1e19) == pytest.approx(27.21883 * 1e19**-0.04961, rel=1e-3)
    assert found.single.laws["flops_per_token"](1e19) == pytest.approx(0.01761 * 1e19**0.56629, rel=0.03)
    assert found.single.curvature == pytest.approx(0.01, rel=0.1)


def test_a_single_bowl_is_the_least_squares_fit_that_its_formula_names():
    rng = np.random.default_rng(4)
    flops, size = np.repeat([1e18, 2e18, 8e18, 3e19], [6, 1, 2, 5]), np.exp(rng.uniform(18, 22, 14))
    loss = np.exp(1 + 0.03 * (np.log(size) - 20 - 0.5 * np.log(flops / 2e18)) ** 2 + 0.01 * rng.standard_normal(14))
    bowls, log_loss = _design(as_points(flops=flops, size=size, loss=loss), group_codes(None, 14))
    found, residuals = bowls.single(log_loss[None])

    def misses(theta):
        h, (m0, m1, k) = theta[:4], theta[4:]
        budget = np.searchsorted([1e18, 2e18, 8e18, 3e19], flops)
        x, c = np.log(size) - 20, np.log(flops / 2e18)
        return (h[budget] + k / 2 * (x - m0 - m1 * c) ** 2 - np.log(loss))[flops != 2e18]  # one size shows no slope

    best = least_squares(misses, [1, 1, 1, 1, 0, 0.5, 0.06], xtol=1e-15, ftol=1e-15, gtol=1e-15)
    assert (residuals**2).sum() == pytest.approx(2 * best.cost, rel=1e-8)
    h, (m0, m1, k) = best.x[:4], best.x[4:]
    at = 20 + m0 + m1 * np.log(np.array([1e18, 2e18, 8e18, 3e19]) / 2e18)
    used = [0, 2, 3]
    assert found.log_size[0, used] == pytest.approx(at[used], abs=1e-5)
    assert found.log_loss[0, used] == pytest.approx(h[used], abs=1e-7)
    assert found.curvature[0, used] == pytest.approx([k] * 3, rel=1e-5)
    assert found.is_inside[0].tolist() == [True, False, True, True]


def test_run_level_intervals_of_a_single_bowl_hold_the_exponents():
    def intervals(rng):
        laws = isoflop(*sweep(rng), draws=200).single.laws
        return {name: laws[name].intervals["exponent"] for name in TRUTH}

    found = coverage(intervals, TRUTH)
    assert min(found.values()) >= 0.9, found


def test_few_sizes_at_a_budget_are_used_better_by_a_single_bowl():
    widths = []
    for seed in range(20):
        flops, size, loss, run = sweep(np.random.default_rng(seed), budgets=BUDGETS[::2])
        near = np.abs(np.log(size / (0.01761 * flops**0.56629))) < np.log(6)
        found = isoflop(flops[near], size[near], loss[near], run[near], draws=100)
        laws = found.laws, found.single.laws
        widths.append([law["flops_per_token"].half_width("exponent") for law in laws])
    own, single = np.median(widths, axis=0)
    assert single < 0.9 * own


def test_bowls_that_change_with_compute_are_not_taken_for_one():
    rng = np.random.default_rng(2)
    flops, size = np.tile(BUDGETS, 9), np.repeat(SIZES, 9)
    centre = np.log(0.01761 * flops**0.56629)
    luck = 0.001 * rng.standard_normal(81)

    def loss(curvature):
        return np.exp(1 - 0.05 * np.log(flops / 1e19) + curvature / 2 * (np.log(size) - centre) ** 2 + luck)

    same = isoflop(flops, size, loss(0.01), draws=200).single
    other = isoflop(flops, size, loss(0.01 * (flops / 1e19) ** 0.3), draws=200).single
    assert same.p_value > 0.05
    assert same.misfit < 1.1
    assert other.p_value < 0.01
    assert other.misfit > 2


@pytest.mark.parametrize("stated", [None, 0.001])
@pytest.mark.parametrize(("of_runs", "of_points"), [(0.001, 0.0), (0.001, 0.0003), (0.0, 0.001)])
def test_luck_is_not_taken_for_misfit_by_a_single_bowl(of_runs, of_points, stated):
    """The misfit is judged by how one run's luck differs between budgets, which a stated noise does not tell."""
    flops, size, run = np.tile(BUDGETS, 7), np.repeat(np.geomspace(1e8, 1e11, 7), 9), np.repeat(np.arange(7), 9)
    mean = 1 - 0.05 * np.log(flops / 1e19) + 0.005 * np.log(size / (0.01761 * flops**0.56629)) ** 2
    found = []
    for seed in range(20):
        rng = np.random.default_rng(seed)
        luck = of_runs * rng.standard_normal(7)[run] + of_points * rng.standard_normal(63)
        found.append(isoflop(flops, size, np.exp(mean + luck), run, run_noise=stated, draws=100).single.p_value)
    assert np.mean(np.array(found) < 0.1) <= 0.3, found
    assert np.median(found) > 0.25, found


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("stated", [None, 0.001])
def test_a_single_bowl_beside_bowls_of_three_sizes_has_no_misfit(stated):
    flops, size, loss, run = sweep(np.random.default_rng(1), sizes=np.geomspace(3e8, 6e9, 3))
    single = isoflop(flops, size, loss, run, run_noise=stated, draws=50).single
    assert np.isnan(single.p_value)
    assert single.misfit == 1
    assert np.isfinite(single.laws["flops_per_token"].intervals["exponent"]).all() == (stated is not None)


def test_the_misfit_of_a_single_bowl_counts_degrees_of_freedom():
    """Four budgets of four sizes: 16 points, 7 parameters of a single bowl, 12 of bowls of their own."""
    rng = np.random.default_rng(6)
    flops, x = np.repeat([1e18, 4e18, 2e19, 1e20], 4), np.tile([-2.0, -0.7, 0.8, 2.1], 4)
    bent = np.repeat([0.01, 0.03, 0.02, 0.05], 4)
    log_loss = 1 + bent / 2 * x**2 + 0.005 * rng.standard_normal(16)
    own = sum(np.polyfit(x[:4], part, 2, full=True)[1][0] for part in log_loss.reshape(4, 4))
    c = np.log(flops)
    together = np.column_stack([np.repeat(np.eye(4), 4, axis=0), x, x * c, x**2])
    squares = np.linalg.lstsq(together, log_loss, rcond=None)[1][0]
    single = isoflop(flops, np.exp(20 + x), np.exp(log_loss), draws=0).single
    assert squares / 9 > own / 4
    assert single.misfit == pytest.approx(np.sqrt(squares / 9 / (own / 4)), rel=1e-6)


def test_budgets_that_bend_downwards_together_have_no_single_bowl():
    flops, x = np.repeat(np.geomspace(1e18, 1e20, 6), 5), np.tile(np.linspace(-2, 2, 5), 6)
    bent = np.where(flops < 1e19, 0.01, -0.05)
    found = isoflop(flops, np.exp(20 + x), np.exp(1 + bent / 2 * x**2), draws=20)
    assert len(found.counted) == 3
    assert found.single is None


def test_a_single_bowl_has_an_r_squared_for_its_loss_alone():
    laws = isoflop(*sweep(np.random.default_rng(0)), draws=0).single.laws
    assert {name: np.isnan(law.r_squared) for name, law in laws.items()} == {
        "flops_per_token": True,
        "tokens": True,
        "loss": False,
    }
    assert 0.99 < laws["loss"].r_squared < 1


def test_the_intervals_of_a_single_bowl_are_as_much_wider_as_it_misfits():
    rng = np.random.default_rng(3)
    flops, size = np.tile(BUDGETS, 9), np.repeat(SIZES, 9)
    centre = np.log(0.01761 * flops**0.56629)
    curvature = 0.01 * (flops / 1e19) ** 0.3
    loss = np.exp(1 + curvature / 2 * (np.log(size) - centre) ** 2 + 0.001 * rng.standard_normal(81))
    codes = group_codes(None, 81)
    bowls, log_loss = _design(as_points(flops=flops, size=size, loss=loss), codes)
    found = isoflop(flops, size, loss, run_noise=0.001, draws=500).single
    luck = 0.001 * np.random.default_rng(0).standard_normal((500, *log_loss.shape))
    place = bowls.single(log_loss + luck)[0].log_size
    slopes = (place[:, -1] - place[:, 0]) / np.log(BUDGETS[-1] / BUDGETS[0])
    low, high = np.quantile(slopes, [0.025, 0.975])
    assert found.misfit > 2
    assert isoflop(flops, size, loss, draws=0).single.misfit == found.misfit
    assert found.laws["flops_per_token"].half_width("exponent") == pytest.approx(
        found.misfit * (high - low) / 2, rel=0.15
    )


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
