"""Line charts as SVG."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import NamedTuple

from megadiff.report.markup import escaped

POINTS_SHOWN = 300
"""Largest number of points drawn for one curve, approximately."""

_SMALLEST, _LARGEST = 1e-280, 1e280
"""Bounds on the sizes of numbers that axes can show; their ratios and differences do not overflow."""

_SCALES = ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k"))

_WIDTH, _HEIGHT = 460, 270
_LEFT, _RIGHT, _TOP, _BOTTOM = 70, 448, 10, 226
_COLOURS, _DASHES = 6, 4


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


@dataclass(frozen=True)
class Scale:
    """A range of values with `low < high`, both positive if it is logarithmic."""

    low: float
    high: float
    is_log: bool = False

    def at(self, value: float) -> float:
        """Return the position of a value: 0 at `low`, 1 at `high`."""
        low, high = self._bent(self.low), self._bent(self.high)
        inside = max(_held(value), self.low) if self.is_log else _held(value)
        return (self._bent(inside) - low) / (high - low)

    def ticks(self, most: int = 6) -> list[float]:
        """Return round values inside the range, at least two if the range allows it."""
        return self._decades(most) if self.is_log else _round_steps(self.low, self.high, most)

    def _bent(self, value: float) -> float:
        return math.log10(value) if self.is_log else value

    def _decades(self, most: int) -> list[float]:
        """Return powers of ten; if there are too few, also their multiples by 2 and 5, or else linear steps."""
        first, last = math.floor(math.log10(self.low)), math.ceil(math.log10(self.high))
        for factors in ((1,), (1, 2, 5)):
            found = [f * 10.0**power for power in range(first, last + 1) for f in factors]
            inside = [value for value in found if self.low <= value <= self.high]
            if len(inside) >= 3:
                return inside[:: math.ceil(len(inside) / most)]
        return _round_steps(self.low, self.high, most)


def scale_of(values: Iterable[float], *, is_log: bool = False, margin: float = 0.05) -> Scale | None:
    """Return a scale that shows all values with a margin; None if no value can be shown."""
    shown = [_held(value) for value in values if not is_log or value > 0]
    shown = [value for value in shown if not is_log or value > 0]
    if not shown:
        return None
    low, high = min(shown), max(shown)
    if is_log:
        room = max(margin * (math.log10(high) - math.log10(low)), 0.02)
        return Scale(low / 10**room, high * 10**room, True)
    room = margin * (high - low) or 0.05 * abs(high) or 1.0
    return Scale(low - room, high + room)


def _held(value: float) -> float:
    """Clamp a value to sizes for which sums, differences and powers of ten can be computed; tiny values become 0."""
    if abs(value) < _SMALLEST:
        return 0.0
    return min(max(value, -_LARGEST), _LARGEST)


def _round_steps(low: float, high: float, most: int) -> list[float]:
    rough = (high - low) / most
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(factor * power for factor in (1, 2, 2.5, 5, 10) if factor * power >= rough * (1 - 1e-9))
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    return [round(place * step, 12 - math.floor(math.log10(step))) for place in range(first, last + 1)]


def short(value: float, digits: int = 3) -> str:
    """Return a short form of a number.

    Large numbers get a letter (1.23M, B for 10^9), tiny and huge ones a power of ten.
    """
    size = abs(value)
    if 0 < size < 1e-3 or size >= 1e18:
        mantissa, power = f"{value:.{digits - 1}e}".split("e")
        return f"{mantissa.rstrip('0').rstrip('.')}e{int(power)}"
    for scale, letter in _SCALES:
        if size >= scale * (1 - 0.5 * 10**-digits):
            scaled = value / scale
            return f"{scaled:.{digits}g}{letter}" if abs(scaled) < 10**digits else f"{scaled:.0f}{letter}"
    return f"{value:.{digits}g}"


def exact(value: float) -> str:
    """Return a figure with four decimal places; one too large for decimals to mean anything with a power of ten."""
    return f"{value:.4f}" if abs(value) < 1e9 else f"{value:.4e}"


def of_bytes(count: float) -> str:
    """Return a size in bytes, in units of powers of 1024."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if count < 1024:
            return f"{count:.3g} {unit}" if unit != "B" else f"{count:.0f} B"
        count /= 1024
    return f"{count:.4g} TiB"


def duration(seconds: float) -> str:
    """Return a duration in seconds, minutes, hours or days."""
    if seconds < 60:
        return f"{seconds:.1f} s"
    if seconds < 3600:
        return f"{seconds / 60:.1f} min"
    return f"{seconds / 3600:.2f} h" if seconds < 48 * 3600 else f"{seconds / 86400:.2f} d"


def percent(share: float) -> str:
    """Return a fraction as a percentage."""
    return f"{100 * share:.1f} %"


@dataclass(frozen=True)
class Curve:
    """One curve: values of one run."""

    label: str
    style: int
    """Index that selects a colour and dash pattern of the page; a run has the same in every chart."""
    points: Sequence[Point]
    """Points in the order of x."""
    has_dots: bool = False
    """Whether to draw every point, with its standard error if it has one, and a thin line between the points."""

    is_reference: bool = False
    """Whether this is a level to compare the runs with, drawn in a neutral colour and without a run's style."""

    @property
    def classes(self) -> str:
        """CSS classes for its colour and its dash pattern."""
        if self.is_reference:
            return f"reference r{self.style % _DASHES}"
        return f"c{self.style % _COLOURS} d{self.style // _COLOURS % _DASHES}"


@dataclass(frozen=True)
class Chart:
    """A chart of curves over a common axis."""

    name: str
    """Name that is unique on the page; letters, digits and hyphens."""
    title: str
    x_label: str
    y_label: str
    """Label of the y axis, including the unit."""
    curves: Sequence[Curve]
    can_x_be_log: bool = True
    marks: dict[int, list[float]] = field(default_factory=dict)
    """Positions of events on the x axis by style of the run, drawn as short bars at the foot."""
    remark: str = ""

    def figure(self) -> str:
        """Return the chart with its title and legend, as markup."""
        thinned = [replace(curve, points=downsample(curve.points, POINTS_SHOWN)) for curve in self.curves]
        curves = [curve for curve in thinned if curve.points]
        head = f"<h3>{escaped(self.title)}</h3>"
        remark = f'<figcaption class="remark">{escaped(self.remark)}</figcaption>' if self.remark else ""
        if not curves:
            return f'<figure class="chart">{head}<p class="remark">No run recorded this.</p></figure>'
        drawings = "".join(self._drawing(curves, is_log) for is_log in (False, True))
        return f'<figure class="chart">{head}{drawings}{_legend(curves)}{remark}</figure>'

    def _drawing(self, curves: Sequence[Curve], is_log: bool) -> str:
        kind = "log" if is_log else "linear"
        is_x_log = is_log and self.can_x_be_log
        seen = [point for curve in curves for point in curve.points if _fits(point, is_x_log, is_log)]
        x = scale_of([point.x for point in seen], is_log=is_x_log, margin=0.02)
        y = scale_of([bound for point in seen for bound in _bounds(point, is_log)], is_log=is_log)
        if x is None or y is None:
            return (
                f'<p class="remark only-{kind}">Nothing here is above zero, so nothing can be shown on this axis.</p>'
            )
        name, frame = f"{self.name}-{kind}", _Frame(x, y)
        marks = "".join(frame.foot_marks(style, places) for style, places in self.marks.items())
        lines = "".join(frame.curve(curve) for curve in curves)
        return (
            f'<svg class="plot only-{kind}" viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img" '
            f'aria-labelledby="{name}-title {name}-text" {frame.data()} data-x-label="{escaped(self.x_label)}">'
            f'<title id="{name}-title">{escaped(self.title)}</title>'
            f'<desc id="{name}-text">{escaped(_in_words(curves, self.y_label))}</desc>'
            f"{frame.axes(self.x_label, self.y_label)}{marks}{lines}"
            f'<line class="cursor" x1="0" x2="0" y1="{_TOP}" y2="{_BOTTOM}" visibility="hidden"/></svg>'
        )


@dataclass(frozen=True)
class _Frame:
    """The rectangle of a drawing and its two scales."""

    x: Scale
    y: Scale

    def data(self) -> str:
        """Return the attributes from which the page's script computes values from positions."""
        ends = f"{_LEFT},{_RIGHT},{self.x.low!r},{self.x.high!r},{int(self.x.is_log)}"
        return f'data-x="{ends}" data-y="{_BOTTOM},{_TOP},{self.y.low!r},{self.y.high!r},{int(self.y.is_log)}"'

    def across(self, value: float) -> float:
        return _LEFT + (_RIGHT - _LEFT) * self.x.at(value)

    def up(self, value: float) -> float:
        return _BOTTOM - (_BOTTOM - _TOP) * self.y.at(value)

    def axes(self, x_label: str, y_label: str) -> str:
        parts = []
        for value in self.y.ticks():
            at = self.up(value)
            parts.append(f'<line class="grid" x1="{_LEFT}" x2="{_RIGHT}" y1="{at:.2f}" y2="{at:.2f}"/>')
            parts.append(f'<text x="{_LEFT - 5}" y="{at + 4:.2f}" text-anchor="end">{short(value, 4)}</text>')
        for value in self.x.ticks(5):
            at = self.across(value)
            parts.append(f'<line class="axis" x1="{at:.2f}" x2="{at:.2f}" y1="{_BOTTOM}" y2="{_BOTTOM + 4}"/>')
            parts.append(f'<text x="{at:.2f}" y="{_BOTTOM + 17}" text-anchor="middle">{short(value, 4)}</text>')
        parts.append(f'<path class="axis" d="M{_LEFT} {_TOP}V{_BOTTOM}H{_RIGHT}"/>')
        middle = (_LEFT + _RIGHT) / 2
        parts.append(f'<text x="{middle}" y="{_HEIGHT - 8}" text-anchor="middle">{escaped(x_label)}</text>')
        half = (_TOP + _BOTTOM) / 2
        turned = f'x="13" y="{half}" text-anchor="middle" transform="rotate(-90 13 {half})"'
        return "".join(parts) + f"<text {turned}>{escaped(y_label)}</text>"

    def curve(self, curve: Curve) -> str:
        line = self._path(curve.points)
        thin = " thin" if curve.has_dots else ""
        found = f'<path class="curve {curve.classes}{thin}" data-label="{escaped(curve.label)}" d="{line}"/>'
        if not curve.has_dots:
            return found
        shown = [point for point in curve.points if _fits(point, self.x.is_log, self.y.is_log)]
        return found + "".join(self._dot(curve, point) for point in shown)

    def foot_marks(self, style: int, places: Sequence[float]) -> str:
        shown = sorted({round(self.across(value)) for value in places if not self.x.is_log or value > 0})
        bars = "".join(f"M{at} {_BOTTOM}v-9" for at in shown if _LEFT <= at <= _RIGHT)
        return f'<path class="foot c{style % _COLOURS}" d="{bars}"/>' if bars else ""

    def _path(self, points: Sequence[Point]) -> str:
        """Return the path of a line.

        `M x y` begins a connected part and `L x y` continues it; a part of one point gets `h0`, which shows as a dot.
        """
        parts: list[str] = []
        for fits, group in itertools.groupby(points, key=lambda point: _fits(point, self.x.is_log, self.y.is_log)):
            places = [f"{self.across(p.x):.2f} {self.up(p.y):.2f}" for p in group if fits and p.y is not None]
            if places:
                parts.append("M" + "L".join(places) + ("h0" if len(places) == 1 else ""))
        return "".join(parts)

    def _dot(self, curve: Curve, point: Point) -> str:
        assert point.y is not None
        across, up = self.across(point.x), self.up(point.y)
        title = f"{curve.label}: {exact(point.y)}" + (
            f" \u00b1 {exact(point.error)}" if point.error is not None else ""
        )
        whisker = ""
        if point.error:
            low, high = (min(max(self.up(end), _TOP), _BOTTOM) for end in _ends(point, self.y))
            whisker = f'<path d="M{across - 3:.2f} {high:.2f}h6m-3 0V{low:.2f}m-3 0h6"/>'
        dot = f'<circle cx="{across:.2f}" cy="{up:.2f}" r="2.6"/>'
        return f'<g class="dot c{curve.style % _COLOURS}"><title>{escaped(title)}</title>{whisker}{dot}</g>'


def _ends(point: Point, scale: Scale) -> tuple[float, float]:
    """Return the ends of the error bar; on a logarithmic axis an end that is not positive is moved to the foot."""
    assert point.y is not None
    error = point.error or 0.0
    low = point.y - error
    return (low if low > 0 or not scale.is_log else scale.low), point.y + error


def _fits(point: Point, is_x_log: bool, is_y_log: bool) -> bool:
    return point.y is not None and (point.x > 0 or not is_x_log) and (point.y > 0 or not is_y_log)


def _bounds(point: Point, is_log: bool) -> list[float]:
    assert point.y is not None
    error = point.error or 0.0
    return [point.y] if is_log else [point.y - error, point.y + error]


def _legend(curves: Sequence[Curve]) -> str:
    named = {curve.label: curve for curve in curves}
    items = "".join(
        f'<li><svg class="key" viewBox="0 0 26 10" aria-hidden="true"><path class="curve {curve.classes}" d="M1 5H25"/>'
        f"</svg>{escaped(label)}</li>"
        for label, curve in named.items()
    )
    return f'<ul class="legend">{items}</ul>'


def _in_words(curves: Sequence[Curve], y_label: str) -> str:
    """Return a text for readers who cannot see the drawing: first, lowest, highest and last value of every curve."""
    parts = []
    for curve in curves:
        values = [point.y for point in curve.points if point.y is not None]
        parts.append(
            f"{curve.label}: first {short(values[0], 4)}, lowest {short(min(values), 4)}, "
            f"highest {short(max(values), 4)}, last {short(values[-1], 4)}"
        )
    return f"{y_label}. " + "; ".join(parts) + "."
