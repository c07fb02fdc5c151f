"""Selection of few points of a curve that look like all of them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple


class Point(NamedTuple):
    """One value on a curve."""

    x: float
    y: float | None
    """Value; None if there should be one but it was not finite, so that the line breaks here."""
    error: float | None = None
    """Standard error of `y`, if it has one."""


def downsample(points: Sequence[Point], most: int) -> list[Point]:
    """Return about `most` of the points, in order: the first, the last, and the lowest and highest of each interval.

    Points without a value do not count while they separate two kept ones: the first of each run of them is kept.

    Args:
        points: in the order of their x.
        most: at least 4.
    """
    valued = [place for place, point in enumerate(points) if point.y is not None]
    kept = valued if len(valued) <= most else _extremes(points, valued, most)
    chosen: list[Point] = []
    before = -1
    for place in kept:
        if place != before + 1 and chosen and (gap := _first_gap(points, before + 1, place)) is not None:
            chosen.append(points[gap])
        chosen.append(points[place])
        before = place
    return chosen


def _extremes(points: Sequence[Point], valued: Sequence[int], most: int) -> list[int]:
    inner = valued[1:-1]
    size = math.ceil(len(inner) / max(1, (most - 2) // 2))
    kept = {valued[0], valued[-1]}
    for start in range(0, len(inner), size):
        stretch = inner[start : start + size]
        kept.add(min(stretch, key=lambda place: points[place].y or 0.0))
        kept.add(max(stretch, key=lambda place: points[place].y or 0.0))
    return sorted(kept)


def _first_gap(points: Sequence[Point], start: int, end: int) -> int | None:
    return next((place for place in range(start, end) if points[place].y is None), None)
