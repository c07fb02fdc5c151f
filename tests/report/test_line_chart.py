"""Fewer points, axes and places along a run, against numbers worked out by hand."""

from __future__ import annotations

import random

import pytest

from megadiff.report.line_chart import Point, Scale, downsample, duration, of_bytes, scale_of, short
from megadiff.report.run_record import position_of


def test_few_points_stay_as_they_are():
    points = [Point(0, 1.0), Point(1, None), Point(2, 3.0)]
    assert downsample(points, 10) == points


@pytest.mark.parametrize("count", [301, 5000, 40001])
def test_extremes_and_ends_survive(count):
    draw = random.Random(0)
    points = [Point(x, draw.random()) for x in range(count)]
    points[count // 3] = Point(count // 3, 1e6)
    points[count // 2] = Point(count // 2, -1e6)
    kept = downsample(points, 300)
    assert len(kept) <= 300
    assert kept == sorted(kept)
    assert (kept[0], kept[-1]) == (points[0], points[-1])
    assert points[count // 3] in kept
    assert points[count // 2] in kept


def test_what_was_not_finite_still_breaks_a_thinned_curve():
    points = [Point(x, None if 4000 <= x < 4100 else 1.0) for x in range(10_000)]
    gaps = [point for point in downsample(points, 300) if point.y is None]
    assert len(gaps) == 1
    assert 4000 <= gaps[0].x < 4100


def test_a_curve_without_a_value_has_no_points():
    assert downsample([Point(0, None), Point(1, None)], 300) == []


@pytest.mark.parametrize(
    ("scale", "ticks"),
    [
        (Scale(0.0, 10.0), [0, 2, 4, 6, 8, 10]),
        (Scale(2.9, 3.25), [2.9, 3.0, 3.1, 3.2]),
        (Scale(1.0, 1e6, True), [1, 100, 1e4, 1e6]),
        (Scale(0.09, 2.1, True), [0.1, 0.2, 0.5, 1, 2]),
        (Scale(2.2, 2.9, True), [2.2, 2.4, 2.6, 2.8]),
    ],
)
def test_ticks_are_round(scale, ticks):
    assert scale.ticks() == pytest.approx(ticks)


def test_a_place_on_a_logarithmic_axis():
    assert Scale(1.0, 100.0, True).at(10.0) == pytest.approx(0.5)
    assert Scale(-1.0, 3.0).at(0.0) == pytest.approx(0.25)


@pytest.mark.parametrize("is_log", [False, True])
@pytest.mark.parametrize("value", [1e-9, 3.0, 4e12])
def test_a_constant_figure_has_an_axis(value, is_log):
    scale = scale_of([value, value], is_log=is_log)
    assert scale is not None
    assert scale.low < value < scale.high
    assert scale.ticks()


def test_nothing_above_zero_has_no_logarithmic_axis():
    assert scale_of([0.0, -1.0], is_log=True) is None
    assert scale_of([]) is None


@pytest.mark.parametrize(
    ("value", "said"),
    [
        (0.0, "0"),
        (999.7, "1k"),
        (1_234_567, "1.23M"),
        (2e9, "2B"),
        (-1500, "-1.5k"),
        (0.25, "0.25"),
        (1.5e-4, "1.5e-4"),
        (3e15, "3000T"),
    ],
)
def test_numbers_are_short(value, said):
    assert short(value) == said


def test_bytes_and_durations_have_units():
    assert [of_bytes(count) for count in (0, 1023, 1536, 2**40)] == ["0 B", "1023 B", "1.5 KiB", "1 TiB"]
    assert [duration(s) for s in (1.24, 90, 5400, 200_000)] == ["1.2 s", "1.5 min", "1.50 h", "2.31 d"]


def test_tokens_of_steps_without_a_line_are_interpolated():
    """A growing batch: 10 tokens a step up to step 10, then 30."""
    place = position_of("tokens", [{"step": 10, "tokens": 100}, {"step": 20, "tokens": 400}])
    assert [place(step) for step in (0, 5, 10, 15, 20, 22)] == [0, 50, 100, 250, 400, 460]
    assert position_of("steps", [])(7) == 7


def test_a_run_without_a_training_line_knows_its_start_alone():
    place = position_of("tokens", [])
    assert (place(0), place(3)) == (0.0, None)
