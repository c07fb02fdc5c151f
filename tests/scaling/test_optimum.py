"""The best learning rate of a sweep."""

from __future__ import annotations

import math

import pytest

from megadiff.scaling.optimum import grid_steps_apart, optimum


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
