"""Measurements over models of many sizes: slopes of activation sizes and their bands, optima of learning rates.

A statistic measured over a grid of (width, depth) gives a line per fixed depth over the widths, and a line per fixed
width over the depths. y ~ x^slope; a line needs three points.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

if TYPE_CHECKING:
    from megadiff.model.initialisation import Role
    from megadiff.run.config import RunConfig


Axis = Literal["width", "depth"]
Size = tuple[int, int]
"""(width, depth)."""

POINTS = 3
"""Smallest number of points of a line."""


@dataclass(frozen=True)
class Band:
    """The interval in which the slopes of a statistic must lie."""

    statistic: str
    axis: Axis
    low: float
    high: float
    reason: str
    """Property that the parametrisation promises, for messages."""


@dataclass(frozen=True)
class Line:
    """One fitted line of a statistic."""

    axis: Axis
    at: int
    """Value of the other axis."""
    slope: float


@dataclass(frozen=True)
class Verdict:
    """A band and the fitted line that comes nearest to leaving it, or is furthest outside."""

    band: Band
    worst: Line
    lines: int

    @property
    def holds(self) -> bool:
        """Whether every line's slope lies in the band."""
        return self.band.low <= self.worst.slope <= self.band.high

    def sentence(self) -> str:
        """Return a sentence about the worst line, for a message."""
        other = "depth" if self.band.axis == "width" else "width"
        return (
            f"{self.band.statistic} goes with {self.band.axis}^{self.worst.slope:+.2f} at {other} {self.worst.at}, "
            f"outside [{self.band.low:+.2f}, {self.band.high:+.2f}]: {self.band.reason}"
        )


def slope(xs: Sequence[float], ys: Sequence[float]) -> float:
    """Return the least-squares slope of log y over log x; infinity if a y is not a positive number."""
    if any(not (math.isfinite(y) and y > 0) for y in ys):
        return math.inf
    return float(np.polyfit(np.log(xs), np.log(ys), 1)[0])


def lines(values: Mapping[Size, float], axis: Axis) -> Iterator[Line]:
    """Yield the lines along `axis` that have enough points."""
    along, across = (0, 1) if axis == "width" else (1, 0)
    for fixed in sorted({size[across] for size in values}):
        points = sorted((size[along], value) for size, value in values.items() if size[across] == fixed)
        if len(points) >= POINTS:
            xs, ys = zip(*points, strict=True)
            yield Line(axis, fixed, slope(xs, ys))


def judge(measured: Mapping[Size, Mapping[str, float]], bands: Sequence[Band]) -> list[Verdict]:
    """Return a verdict for each band that the measured grid has lines for.

    Args:
        measured: statistics by size; every size has every statistic that a band names.
    """
    verdicts = []
    for band in bands:
        fitted = list(lines({size: found[band.statistic] for size, found in measured.items()}, band.axis))
        if fitted:
            middle = (band.low + band.high) / 2
            worst = max(fitted, key=lambda line: abs(line.slope - middle))
            verdicts.append(Verdict(band, worst, len(fitted)))
    return verdicts


@dataclass(frozen=True)
class Optimum:
    """The minimum of a curve of loss over learning rate."""

    rate: float
    """Best learning rate of the grid."""
    loss: float
    vertex: float
    """Lowest point of the parabola through the best rate and its neighbours in log rate; `rate` at an edge."""
    is_inside: bool
    """Whether the grid continues on both sides; at an edge the true optimum may lie beyond it."""


def optimum(losses: Mapping[float, float]) -> Optimum:
    """Return the optimum of {rate: loss}; the loss of a diverged run may be infinite or NaN.

    Raises:
        ValueError: no run has a finite loss.
    """
    grid = sorted(losses)
    finite = [rate for rate in grid if math.isfinite(losses[rate])]
    if not finite:
        raise ValueError(f"none of the {len(grid)} runs has a finite loss")
    best = min(finite, key=lambda rate: losses[rate])
    place = grid.index(best)
    is_inside = 0 < place < len(grid) - 1
    vertex = best
    if is_inside and all(math.isfinite(losses[grid[place + side]]) for side in (-1, 1)):
        (x0, y0), (x1, y1), (x2, y2) = ((math.log(r), losses[r]) for r in grid[place - 1 : place + 2])
        left, right = (y1 - y0) / (x1 - x0), (y2 - y1) / (x2 - x1)
        curvature = (right - left) / (x2 - x0)
        if curvature > 0:
            vertex = math.exp((x0 + x1) / 2 - left / (2 * curvature))
    return Optimum(best, losses[best], vertex, is_inside)


def grid_steps_apart(optima: Iterable[Optimum], *, factor: float) -> float:
    """Return the number of steps of a geometric grid between the smallest and the largest best rate."""
    rates = [found.rate for found in optima]
    return math.log(max(rates) / min(rates)) / math.log(factor)


HEAD_DIM, STEPS = 32, 4
"""Width of an attention head, and number of optimizer steps, in all models of the check."""

BANDS = (
    Band("embedding, start", "width", -0.2, 0.2, "the embedding's spread is free of the width"),
    Band("stream, start", "width", -0.25, 0.25, "block matrices are drawn with 1 / sqrt(width)"),
    Band("stream, start", "depth", -0.8, -0.2, "2 L random branches times 4 / L add up to 1 / sqrt(depth)"),
    Band("stream, end", "width", -0.25, 0.25, "activations after some steps are free of the width"),
    Band("stream, end", "depth", -0.5, 0.35, "and do not grow with the depth"),
    Band("change of stream", "width", -0.3, 0.3, "updates move activations alike at every width"),
    Band("change of stream", "depth", -0.35, 0.35, "and at every depth"),
    Band("scores, end", "width", -0.3, 0.3, "attention logits are free of the width"),
    Band("scores, end", "depth", -0.35, 0.35, "and of the depth"),
    Band("logits, step 1", "width", -0.2, 0.2, "the first step moves the logits alike at every width"),
    Band("logits, step 1", "depth", -0.2, 0.2, "and at every depth"),
    Band("logits, end", "width", -0.25, 0.25, "so do later ones"),
    Band("logits, end", "depth", -0.25, 0.25, "so do later ones"),
    Band("change of embedding", "width", -0.25, 0.25, "the embedding learns at a rate free of the width"),
    Band("change of gains", "width", -0.25, 0.25, "the norms' gains learn at a rate free of the width"),
    Band("change of biases", "width", -0.25, 0.25, "the biases learn at a rate free of the width"),
    Band("decay of hidden matrices", "width", -0.1, 0.1, "rate x decay is free of the width"),
    Band("eps / gradient", "width", -0.5, 0.5, "eps keeps to the gradients, which go with 1 / width"),
    Band("eps / gradient", "depth", -0.5, 0.5, "and with 1 / depth"),
)

Edit = Callable[[dict[str, Any], "RunConfig", Size], None]
"""Function that changes one optimizer group of a model, given the smallest size."""


def _lr_as_bulk(group: dict[str, Any], config: RunConfig, base: Size) -> None:
    group["lr"] *= base[0] / config.model.hidden


def _lr_without_width(group: dict[str, Any], config: RunConfig, base: Size) -> None:
    group["lr"] *= config.model.hidden / base[0]


def _decay_without_width(group: dict[str, Any], config: RunConfig, base: Size) -> None:
    group["weight_decay"] *= base[0] / config.model.hidden


def _eps_without_size(group: dict[str, Any], config: RunConfig, base: Size) -> None:
    group["eps"] *= config.model.hidden * config.model.layers / (base[0] * base[1])


OVERRIDES: dict[str, Callable[[int, Size], str]] = {
    "residual": lambda width, base: f"model.resid_scale={4 / base[1]}",
    "head": lambda width, base: f"model.head_scale={512 / base[0]}",
    "hidden_init": lambda width, base: f"model.init_scale={0.4 * (width / base[0]) ** 0.5}",
    "embed_init": lambda width, base: f"model.embed_init={0.02 * (base[0] / width) ** 0.5}",
    "zero_head": lambda width, base: "model.head_init=0.02",
}
"""Rules that a setting removes, given the width and the smallest size."""

EDITS: dict[str, tuple[tuple[Role, ...], Edit]] = {
    "hidden_lr": (("hidden",), _lr_without_width),
    "embed_lr": (("embedding",), _lr_as_bulk),
    "head_lr": (("head",), _lr_as_bulk),
    "gain_lr": (("norm",), _lr_as_bulk),
    "bias_lr": (("bias",), _lr_as_bulk),
    "eps": (("hidden", "embedding", "head", "norm", "bias"), _eps_without_size),
    "decay": (("hidden",), _decay_without_width),
}
"""Rules that are removed by changing the optimizer groups of some roles."""

RULES = (*OVERRIDES, *EDITS)


def bands_of(measured: Mapping[Size, Mapping[str, float]]) -> list[Band]:
    """Return the bands of the statistics that all models have; those of roles that a model lacks are left out."""
    return [band for band in BANDS if all(band.statistic in found for found in measured.values())]


def sizes(widths: Sequence[int], depths: Sequence[int], grid: str) -> list[Size]:
    """Return the (width, depth) pairs of a grid.

    `full` gives all pairs; `cross` gives the smallest depth with all widths and the smallest width with all depths.
    """
    pairs = [(width, depth) for width in widths for depth in depths]
    return [p for p in pairs if grid == "full" or p[0] == min(widths) or p[1] == min(depths)]
