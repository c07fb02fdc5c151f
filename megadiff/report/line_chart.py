"""A line chart as inline SVG, drawn with linear and with logarithmic axes; the page shows one of the two."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

from megadiff.report.downsample import Point, downsample
from megadiff.report.figures import exact, short
from megadiff.report.markup import escaped
from megadiff.report.scale import Scale, scale_of

POINTS_SHOWN = 300
"""Largest number of points drawn for one curve, approximately."""

_WIDTH, _HEIGHT = 460, 270
_LEFT, _RIGHT, _TOP, _BOTTOM = 70, 448, 10, 226
_COLOURS, _DASHES = 6, 4


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
