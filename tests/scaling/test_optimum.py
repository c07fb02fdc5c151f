"""The best learning rate of a sweep, slopes of exact power laws, and what a broken band says."""

from __future__ import annotations

import math

import pytest

from megadiff.scaling.optimum import Band, grid_steps_apart, judge, lines, optimum, slope


def test_the_vertex_of_an_exact_parabola_is_found_between_grid_points():
    losses = {rate: 2 + (math.log(rate) - math.log(0.3)) ** 2 for rate in (0.05, 0.1, 0.2, 0.4, 0.8)}
    found = optimum(losses)
    assert (found.rate, found.is_inside) == (0.4, True)
    assert found.loss == losses[0.4]
    assert found.vertex == pytest.approx(0.3)


def test_at_an_edge_nothing_is_made_up():
    found = optimum({0.1: 3.0, 0.2: 2.0, 0.4: 1.0})
    assert (found.rate, found.vertex, found.is_inside) == (0.4, 0.4, False)


def test_runs_that_diverged_never_win():
    found = optimum({0.1: 3.0, 0.2: 2.0, 0.4: math.inf, 0.8: math.nan})
    assert (found.rate, found.vertex, found.is_inside) == (0.2, 0.2, True)
    with pytest.raises(ValueError, match="none of the 2 runs has a finite loss"):
        optimum({0.1: math.inf, 0.2: math.nan})


def test_distance_is_counted_in_steps_of_the_grid():
    optima = [optimum({rate: abs(math.log(rate / best)) for rate in (1, 2, 4, 8)}) for best in (2, 2, 8)]
    assert grid_steps_apart(optima, factor=2) == pytest.approx(2)
    assert grid_steps_apart(optima[:2], factor=2) == 0


def test_a_power_law_has_its_exponent():
    assert slope([128, 256, 512], [3 * x**-0.5 for x in (128, 256, 512)]) == pytest.approx(-0.5)
    assert slope([1, 2, 4], [7, 7, 7]) == pytest.approx(0)


@pytest.mark.parametrize("bad", [0.0, -1.0, math.nan, math.inf])
def test_what_has_no_logarithm_breaks_every_band(bad):
    assert slope([1, 2, 4], [1, bad, 1]) == math.inf


def test_a_grid_gives_a_line_per_value_of_the_other_axis():
    values = {(w, d): w**0.25 * d**-1.0 for w in (1, 2, 4) for d in (1, 2)}
    assert [(line.at, round(line.slope, 9)) for line in lines(values, "width")] == [(1, 0.25), (2, 0.25)]
    assert list(lines(values, "depth")) == []  # two points are no line


def test_the_worst_line_decides():
    measured = {(w, d): {"x": w**0.5 if d == 8 else 1.0} for w in (1, 2, 4) for d in (2, 4, 8)}
    (verdict,) = judge(measured, [Band("x", "width", -0.2, 0.2, "x is free of the width")])
    assert not verdict.holds
    assert verdict.lines == 3
    assert verdict.sentence() == "x goes with width^+0.50 at depth 8, outside [-0.20, +0.20]: x is free of the width"
    assert judge(measured, [Band("x", "width", -0.2, 0.6, "")])[0].holds
