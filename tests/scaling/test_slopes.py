"""Slopes of exact power laws, and what a broken band says."""

from __future__ import annotations

import math

import pytest

from megadiff.scaling.optimum import Band, judge, lines, slope


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
