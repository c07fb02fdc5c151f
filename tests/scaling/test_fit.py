"""Power laws, surfaces and hyperbolas: planted parameters come back, intervals hold them, bad fits are refused."""

from __future__ import annotations

import time

import numpy as np
import pytest

from megadiff.scaling.fit import hyperbola, power_law, slopes_by, surface
from megadiff.scaling.resampling import FitError
from tests.scaling.planted import REPETITIONS, coverage

X = np.geomspace(5e17, 2e20, 9)
TRUTH = {"E": 1.7, "A": 480.0, "B": 2100.0, "alpha": 0.35, "beta": 0.37}
N, D = np.repeat(np.geomspace(1e7, 1e9, 9), 6), np.tile(np.geomspace(3e8, 3e10, 6), 9)


def planted_loss(rng, noise=0.003, n=N, d=D, runs=None):
    luck = rng.standard_normal(len(n)) if runs is None else rng.standard_normal(runs.max() + 1)[runs]
    return (1.7 + 480 * n**-0.35 + 2100 * d**-0.37) * np.exp(noise * luck)


# Power laws


def test_a_power_without_noise_is_found_exactly():
    law = power_law(X, 3 * X**0.57)
    assert (law.coefficient, law.exponent) == (pytest.approx(3, rel=1e-9), pytest.approx(0.57, abs=1e-12))
    assert law.r_squared == pytest.approx(1)
    assert law.x_range == (X[0], X[-1])
    assert law(2e20) == pytest.approx(3 * 2e20**0.57)
    assert law.convergence.converged


def test_intervals_of_a_power_hold_the_truth():
    def intervals(rng):
        return power_law(X, 3 * X**0.57 * np.exp(0.05 * rng.standard_normal(9)), draws=50).intervals

    found = coverage(intervals, {"coefficient": 3, "exponent": 0.57})
    assert min(found.values()) >= 0.9, found


def test_intervals_of_runs_hold_the_truth_and_those_of_points_do_not():
    x = np.concatenate([np.geomspace(low, 3 * low, 4) for low in np.geomspace(1e9, 1e11, 12)])
    run = np.repeat(np.arange(12), 4)

    def points(rng, groups):
        noise = 0.1 * rng.standard_normal(12)[run] + 0.02 * rng.standard_normal(48)
        return power_law(x, 1e-2 * x**0.82 * np.exp(noise), groups, draws=50).intervals

    truth = {"coefficient": 1e-2, "exponent": 0.82}
    by_run = coverage(lambda rng: points(rng, run), truth)
    assert min(by_run.values()) >= 0.9, by_run
    by_point = coverage(lambda rng: points(rng, None), truth)
    assert max(by_point.values()) < 0.8, by_point


def test_a_free_floor_is_found_and_its_interval_holds_it():
    x = np.geomspace(1e15, 1e21, 13)

    def intervals(rng):
        y = (1.7 + 60 * x**-0.1) * np.exp(0.002 * rng.standard_normal(13))
        return power_law(x, y, floor="free", draws=100).intervals

    found = coverage(intervals, {"exponent": -0.1, "floor": 1.7}, REPETITIONS // 4)
    assert min(found.values()) >= 0.85, found
    exact = power_law(x, 1.7 + 60 * x**-0.1, floor="free", draws=10)
    assert exact.floor == pytest.approx(1.7, abs=1e-4)
    assert exact.convergence.agreement > 0.5
    assert power_law(x, 1.7 + 60 * x**-0.1, floor=1.7).exponent == pytest.approx(-0.1)


def test_an_outlier_moves_a_robust_law_less():
    y = 3 * X**0.57 * np.exp(0.005 * np.random.default_rng(0).standard_normal(9))
    y[-1] *= 2
    robust, plain = power_law(X, y, robust=0.01), power_law(X, y)
    assert abs(robust.exponent - 0.57) < 0.3 * abs(plain.exponent - 0.57)


@pytest.mark.parametrize(
    ("x", "y", "options", "said"),
    [
        ([1, 2], [1, 2], {}, "at least 3 different x, found 2"),
        ([1, 1, 1, 1], [1, 2, 3, 4], {}, "at least 3 different x, found 1"),
        ([1, 2, 3], [3, 2, 1], {"floor": "free"}, "free floor needs at least 4"),
        ([1, 2, 3], [1, 2, float("nan")], {}, r"y\[2\] is nan"),
        ([1, 2, -3], [1, 2, 3], {}, r"x\[2\] is -3"),
        ([1, 2, 3], [1, 2], {}, "columns of one length"),
        ([1, 2, 3], [3, 2, 1], {"floor": 1.0}, "must lie below all y"),
        (["a", 2, 3], [3, 2, 1], {}, "x: numbers are wanted"),
        ([1, 2, 3], [3, 2, 1], {"groups": ["a"]}, "one run a point is wanted, found 1 for 3"),
    ],
)
def test_points_that_determine_no_law_are_refused(x, y, options, said):
    with pytest.raises(FitError, match=said):
        power_law(x, y, **options)


def test_slopes_that_differ_by_size_are_told_apart_from_those_that_do_not():
    x = np.tile(np.geomspace(1e9, 1e11, 8), 3)
    size = np.repeat(["25M", "85M", "567M"], 8)
    same, other = [], []
    for seed in range(50):
        noise = np.exp(0.05 * np.random.default_rng(seed).standard_normal(24))
        same.append(slopes_by(x, 0.01 * x**0.82 * noise, size).p_value)
        other.append(slopes_by(x, 0.01 * x ** np.repeat([0.75, 0.82, 0.9], 8) * noise, size).p_value)
    assert np.mean(np.array(same) < 0.05) <= 0.14
    assert np.mean(np.array(other) < 0.05) >= 0.9
    found = slopes_by([*x, 1e9], [*(0.01 * x**0.82 * noise), 1.0], [*size, "1B"])
    assert set(found.by) == {"25M", "85M", "567M"}
    assert "at least 3 different x, found 1" in found.skipped["1B"]


# Surfaces


@pytest.mark.parametrize("method", ["lse", "varpro"])
def test_a_surface_without_noise_is_found_exactly(method):
    found = surface(N, D, planted_loss(np.random.default_rng(0), noise=0.0), method, draws=0)
    for name, value in TRUTH.items():
        assert found.estimates[name] == pytest.approx(value, rel=2e-3), name
    assert found.alpha == found.estimates["alpha"]
    assert found.size_exponent == pytest.approx(0.37 / 0.72, abs=1e-4)
    assert found.convergence.agreement >= 0.5
    n, d = found.optimum(1e18)
    assert n * d == pytest.approx(1e18)
    ratio = (found.A * 0.35 / (found.B * 0.37)) ** (1 / 0.72)
    assert n == pytest.approx(ratio * 1e18 ** (0.37 / 0.72), rel=1e-2)
    assert found(n, d) <= min(found(n * 1.01, d / 1.01), found(n / 1.01, d * 1.01))


def test_intervals_of_a_surface_hold_the_truth():
    def intervals(rng):
        return surface(N, D, planted_loss(rng), "varpro", draws=100).intervals

    found = coverage(intervals, TRUTH, REPETITIONS // 4)
    assert min(found.values()) >= 0.8, found


def test_both_methods_give_like_errors():
    loss = planted_loss(np.random.default_rng(0))
    lse, varpro = (surface(N, D, loss, method, draws=100) for method in ("lse", "varpro"))
    for name in ("alpha", "beta"):
        assert lse.standard_errors[name] == pytest.approx(varpro.standard_errors[name], rel=0.5)


def test_one_run_a_size_widens_the_intervals_of_a_surface():
    run = np.repeat(np.arange(9), 6)
    loss = planted_loss(np.random.default_rng(3), runs=run)
    by_run, by_point = (surface(N, D, loss, "varpro", groups=groups, draws=60) for groups in (run, None))
    assert by_run.half_width("alpha") > 2 * by_point.half_width("alpha")
    assert (by_run.runs, by_point.runs) == (9, 54)
    assert "9 runs" in by_run.notes[0]


def test_a_loose_tolerance_is_refused_and_never_gives_another_surface():
    """A mean of Huber losses stops descents early under the optimizer's default tolerance, silently."""
    loss = planted_loss(np.random.default_rng(0), noise=0.02)
    best = surface(N, D, loss, draws=0)
    refused = 0
    for tolerance in (1e-1, 1e-2, 1e-4, 1e-6):
        try:
            found = surface(N, D, loss, draws=0, tolerance=tolerance)
        except FitError:
            refused += 1
        else:
            assert found.alpha == pytest.approx(best.alpha, abs=1e-3)
            assert found.beta == pytest.approx(best.beta, abs=1e-3)
    with pytest.raises(FitError, match=r"(stopped early|starts end in the lowest minimum).*smaller"):
        surface(N, D, loss, draws=0, tolerance=1e-2)
    assert refused >= 2


def test_the_scale_of_the_objective_changes_nothing():
    loss = planted_loss(np.random.default_rng(1), noise=0.01)
    once = surface(N, D, loss, draws=0)
    tenfold = surface(np.tile(N, 3), np.tile(D, 3), np.tile(loss, 3), draws=0)
    assert tenfold.alpha == pytest.approx(once.alpha, abs=1e-4)


def test_a_thousand_bootstraps_take_less_than_a_minute():
    n, d = np.repeat(N, 4), np.repeat(D, 4) * np.tile([1, 1.3, 1.7, 2.2], 54)
    loss = planted_loss(np.random.default_rng(2), noise=0.02, n=n, d=d)
    before = time.process_time()
    found = surface(n, d, loss, draws=1000)
    assert time.process_time() - before < 60
    assert len(found.draws["alpha"]) == 1000
    assert np.isfinite(found.draws["alpha"]).all()
    assert found.standard_errors["alpha"] > 0


def test_the_largest_points_are_predicted_without_them():
    loss = planted_loss(np.random.default_rng(0), noise=0.0)
    largest = N * D > 2.9e19
    held = surface(N, D, loss, draws=0, hold_out=True).held_out
    assert held is not None
    assert (held.product, held.points) == (pytest.approx(3e19), largest.sum())
    assert held.loss == pytest.approx(loss[largest].mean())
    assert held.predicted_loss == pytest.approx(held.loss, rel=1e-4)
    bent = surface(N, D, loss * np.where(largest, 1.02, 1.0), draws=0, hold_out=True).held_out
    assert bent is not None
    assert bent.loss_error_percent == pytest.approx(100 / 1.02 - 100, abs=0.01)


def test_no_prediction_where_the_other_points_determine_nothing():
    n, d = (part.ravel()[1:] for part in np.meshgrid([1e7, 1e8, 1e9], [1e8, 1e9, 1e10]))
    found = surface(n, d, planted_loss(np.random.default_rng(0), 0.0, n, d), draws=0, hold_out=True)
    assert found.points == 8  # the others are seven, and a surface needs eight
    assert found.held_out is None


@pytest.mark.parametrize(
    ("rows", "said"),
    [
        (slice(0, 7), "at least 3 different sizes"),
        (slice(0, None, 6), "at least 3 different numbers of tokens"),
        ([0, 7, 14, 21, 28, 35], "at least 8 points, found 6"),
    ],
)
def test_points_that_determine_no_surface_are_refused(rows, said):
    loss = planted_loss(np.random.default_rng(0))
    with pytest.raises(FitError, match=said):
        surface(N[rows], D[rows], loss[rows])


# Hyperbolas

G, B_OPT, S_OPT = 0.18, 6e4, 3e3
BATCH = np.geomspace(2048, 2048 * 256, 9)
HYPERBOLA = {"g": G, "b_opt": B_OPT, "s_opt": S_OPT, "b_min": B_OPT * 2 ** (-1 / G), "s_min": S_OPT * 2 ** (-1 / G)}


def steps_to_loss(batch):
    power = (batch / HYPERBOLA["b_min"]) ** G
    return HYPERBOLA["s_min"] * (power / (power - 1)) ** (1 / G)


def test_a_hyperbola_without_noise_is_found_exactly():
    found = hyperbola(steps_to_loss(BATCH), BATCH, draws=20)
    for name, value in HYPERBOLA.items():
        assert found.estimates[name] == pytest.approx(value, rel=1e-4), name
    assert found.steps(BATCH) == pytest.approx(steps_to_loss(BATCH))
    assert found.is_inside
    critical = found.estimates["critical_batch"]
    assert critical > B_OPT
    assert float(found.steps(critical)) * critical == pytest.approx(1.2 * S_OPT * B_OPT, rel=1e-6)


def test_intervals_of_a_hyperbola_hold_the_truth():
    def intervals(rng):
        return hyperbola(steps_to_loss(BATCH) * np.exp(0.02 * rng.standard_normal(9)), BATCH, draws=100).intervals

    found = coverage(intervals, HYPERBOLA)
    assert min(found.values()) >= 0.9, found


def test_mccandlishs_curve_has_a_fixed_exponent():
    batch = np.geomspace(6e4, 4e6, 8)
    found = hyperbola(900 * (1 + 5e4 / (batch - 5e4)), batch, g=1.0, draws=20)
    assert found.estimates["s_min"] == pytest.approx(900, rel=1e-6)
    assert found.estimates["b_min"] == pytest.approx(5e4, rel=1e-6)
    assert found.estimates["b_opt"] == pytest.approx(1e5, rel=1e-6)


def test_batches_without_a_bend_are_refused_and_those_beside_it_noted():
    with pytest.raises(FitError, match=r"do not bend|starts end|did not converge"):
        hyperbola(1e8 / BATCH, BATCH)
    with pytest.raises(FitError, match="at least 4 different batches, found 3"):
        hyperbola(steps_to_loss(BATCH[:3]), BATCH[:3])
    found = hyperbola(steps_to_loss(BATCH[:4]) * np.exp([0, 1e-6, 0, -1e-6]), BATCH[:4], draws=20)
    assert not found.is_inside
    assert "outside the batches" in found.notes[0]
