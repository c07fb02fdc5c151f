"""Laws of batch and learning rate from sweeps that vary them, and hyperbolas of batch against steps at equal loss.

A cell is a model size at a budget. In each, the best batch and the best learning rate are given twice: those of the
run with the lowest loss, and the vertices of parabolas through it and its neighbours, which a grid moves less. A
hyperbola needs the steps that several batches take to one loss; they are read off the losses at the budgets.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from statistics import fmean

import numpy as np

from megadiff.scaling.fit import Hyperbola, PowerLaw, SlopesByGroup, hyperbola, power_law, slopes_by
from megadiff.scaling.optimum import optimum
from megadiff.scaling.points import Point, size_name
from megadiff.scaling.resampling import LEVEL, FitError, budget_codes, cell_codes, size_codes

_MIN_BATCHES, _MOST_LOSSES, _HYPERBOLA_DRAWS = 4, 5, 200
_Setting = tuple[float, float | None]
"""Batch in tokens and learning rate."""


@dataclass(frozen=True)
class Cell:
    """The best batch and learning rate of a size at a budget."""

    size: str
    """Name of the model size."""
    run: str
    """Run with the lowest loss."""
    flops: float
    tokens: float
    batch: float
    """Batch of the best run, in tokens."""
    batch_vertex: float
    """Vertex of the parabola of log loss over log batch; the best run's batch where there is none."""
    rate: float | None
    """Best learning rate at the best batch; None if it is not known or lies at an edge of its grid."""
    rate_vertex: float | None
    """Vertex over the learning rates at the best batch; None as for `rate`."""


@dataclass(frozen=True)
class IsoLoss:
    """The hyperbola of one size at one loss."""

    size: str
    loss: float
    steps: tuple[float, ...]
    """Steps of the points behind the fit, in the order of `batches`."""
    batches: tuple[float, ...]
    """Batches in tokens."""
    fit: Hyperbola

    @property
    def tokens(self) -> float:
        """Fewest tokens that reach the loss."""
        return self.fit.estimates["s_opt"] * self.fit.estimates["b_opt"]


@dataclass(frozen=True)
class BatchLaws:
    """Laws of batch and learning rate of one noise."""

    cells: tuple[Cell, ...] = ()
    batch: Mapping[str, SlopesByGroup] = field(default_factory=dict)
    """Best batch over tokens by size, under its estimator: `vertex`, `best_run`."""
    rate: Mapping[str, SlopesByGroup] = field(default_factory=dict)
    """Best learning rate over the best batch by size, under its estimator."""
    iso_losses: tuple[IsoLoss, ...] = ()
    token_optimal: PowerLaw | None = None
    """Batch of the fewest tokens over those tokens, through the hyperbolas."""
    edges: tuple[str, ...] = ()
    """Cells whose best batch or learning rate lies at an edge of the grid, a sentence each."""
    refusals: tuple[str, ...] = ()


def batch_laws(points: Sequence[Point], *, level: float = LEVEL, seed: int = 0) -> BatchLaws:
    """Fit what points of several batches and learning rates determine; the rest is refused in sentences."""
    usable = [point for point in points if point.batch_tokens is not None]
    cells, edges = _cells(usable)
    refusals: list[str] = []
    batch, rate = _slopes(cells, level, refusals)
    iso_losses = _iso_losses(usable, level, seed, refusals)
    inside = [found for found in iso_losses if found.fit.is_inside]
    token_optimal = None
    if len(inside) >= 3:
        sizes = [found.size for found in inside]
        try:
            token_optimal = power_law(
                [found.tokens for found in inside],
                [found.fit.estimates["b_opt"] for found in inside],
                sizes if len(set(sizes)) >= 3 else None,
                level=level,
            )
        except FitError as error:
            refusals.append(f"batch of the fewest tokens: {error}")
    return BatchLaws(
        tuple(cells), batch, rate, tuple(iso_losses), token_optimal, tuple(edges), tuple(dict.fromkeys(refusals))
    )


def _by_setting(points: Sequence[Point]) -> dict[_Setting, list[Point]]:
    """Return the points of each setting, seeds included."""
    found: dict[_Setting, list[Point]] = {}
    for point in points:
        if point.batch_tokens is not None:
            found.setdefault((point.batch_tokens, point.learning_rate), []).append(point)
    return found


def _mean_log_loss(points: Sequence[Point]) -> float:
    return fmean(math.log(point.loss) for point in points)


def _cells(points: Sequence[Point]) -> tuple[list[Cell], list[str]]:
    members: dict[tuple[int, int], list[Point]] = {}
    keys = cell_codes([point.flops_per_token for point in points], [point.flops for point in points])
    for key, point in zip(keys, points, strict=True):
        members.setdefault(key, []).append(point)
    cells, edges = [], []
    for _, own in sorted(members.items()):
        flops = own[0].flops
        means = {setting: _mean_log_loss(seeds) for setting, seeds in _by_setting(own).items()}
        batches = sorted({batch for batch, _ in means})
        if len(batches) < 3:
            continue
        by_batch = {each: min(loss for (batch, _), loss in means.items() if batch == each) for each in batches}
        found = optimum(by_batch)
        place = f"{size_name(own[0])} at {flops:.3g} FLOPs"
        if not found.is_inside:
            side = "smallest" if found.rate == batches[0] else "largest"
            edges.append(f"edge optimum: the best batch of {place} is the {side} of its grid")
            continue
        losses = {rate: loss for (batch, rate), loss in means.items() if batch == found.rate and rate is not None}
        rates = optimum(losses) if len(losses) > 1 else None
        if rates is not None and not rates.is_inside:
            side = "smallest" if rates.rate == min(losses) else "largest"
            edges.append(f"edge optimum: the best learning rate of {place} is the {side} of its grid")
        best = min(own, key=lambda point: point.loss)
        inside = rates if rates is not None and rates.is_inside else None
        cells.append(
            Cell(
                size=size_name(best),
                run=best.run,
                flops=flops,
                tokens=best.tokens,
                batch=found.rate,
                batch_vertex=found.vertex,
                rate=None if inside is None else inside.rate,
                rate_vertex=None if inside is None else inside.vertex,
            )
        )
    return cells, edges


def _slopes(
    cells: Sequence[Cell], level: float, refusals: list[str]
) -> tuple[dict[str, SlopesByGroup], dict[str, SlopesByGroup]]:
    """Return the laws of the best batch over tokens and of the best rate over the batch, by estimator."""
    batch: dict[str, SlopesByGroup] = {}
    rate: dict[str, SlopesByGroup] = {}
    if not cells:
        return batch, rate
    for estimator, values in (
        ("vertex", [(cell, cell.batch_vertex, cell.rate_vertex) for cell in cells]),
        ("best_run", [(cell, cell.batch, cell.rate) for cell in cells]),
    ):
        rows = [(cell.tokens, found, cell) for cell, found, _ in values]
        _fitted(batch, estimator, rows, level, refusals, "best batch over tokens")
        rated = [(found, eta, cell) for cell, found, eta in values if eta is not None]
        if any(cell.rate is not None for cell in cells):
            _fitted(rate, estimator, rated, level, refusals, "best learning rate over batch")
    return batch, rate


def _fitted(
    into: dict[str, SlopesByGroup],
    estimator: str,
    rows: Sequence[tuple[float, float, Cell]],
    level: float,
    refusals: list[str],
    what: str,
) -> None:
    try:
        x, y, cells = zip(*rows, strict=True) if rows else ((), (), ())
        runs = [cell.run for cell in cells]
        into[estimator] = slopes_by(x, y, [cell.size for cell in cells], runs, level=level)
    except FitError as error:
        refusals.append(f"{what} ({estimator}): {error}")


def _iso_losses(points: Sequence[Point], level: float, seed: int, refusals: list[str]) -> list[IsoLoss]:
    by_size: dict[int, list[Point]] = {}
    for size, point in zip(size_codes([point.flops_per_token for point in points]).tolist(), points, strict=True):
        by_size.setdefault(size, []).append(point)
    found = []
    for _, own in sorted(by_size.items()):
        curves = _curves(own)
        if len({batch for batch, _ in curves}) < _MIN_BATCHES:
            continue
        for loss in _targets(curves):
            steps = steps_to(curves, loss)
            name = size_name(own[0])
            try:
                fit = hyperbola(list(steps.values()), list(steps), level=level, draws=_HYPERBOLA_DRAWS, seed=seed)
            except FitError as error:
                refusals.append(f"hyperbola of {name} at a loss of {loss:.3f}: {error}")
                continue
            found.append(IsoLoss(name, loss, tuple(steps.values()), tuple(steps), fit))
    return found


_Curve = list[tuple[float, float]]
"""Log steps, ascending, and the mean log loss of the seeds after them."""


def _curves(points: Sequence[Point]) -> dict[_Setting, _Curve]:
    """Return the curve of each setting."""
    curves: dict[_Setting, _Curve] = {}
    for setting, own in _by_setting(points).items():
        codes = budget_codes([point.flops for point in own])
        for code in range(int(codes.max()) + 1):
            seeds = [point for point, each in zip(own, codes, strict=True) if each == code]
            log_steps = fmean(math.log(point.tokens / setting[0]) for point in seeds)
            curves.setdefault(setting, []).append((log_steps, _mean_log_loss(seeds)))
    return curves


def steps_to(curves: Mapping[_Setting, _Curve], loss: float) -> dict[float, float]:
    """Return the steps that each batch takes to a loss at its best learning rate; a batch that does not is missing."""
    found: dict[float, float] = {}
    target = math.log(loss)
    for (batch, _), curve in sorted(curves.items(), key=lambda item: item[0][0]):
        for (x0, y0), (x1, y1) in itertools.pairwise(curve):
            if y1 <= target < y0:
                steps = math.exp(x0 + (x1 - x0) * (y0 - target) / (y0 - y1))
                found[batch] = min(steps, found.get(batch, math.inf))
                break
    return found


def _targets(curves: Mapping[_Setting, _Curve]) -> list[float]:
    """Return at most five losses, evenly spaced in their logarithm, that at least four batches reach."""
    losses = [loss for curve in curves.values() for _, loss in curve]
    grid = np.exp(np.linspace(min(losses), max(losses), 41))
    reached = [float(loss) for loss in grid if len(steps_to(curves, float(loss))) >= _MIN_BATCHES]
    if len(reached) <= _MOST_LOSSES:
        return reached
    places = np.unique(np.round(np.linspace(0, len(reached) - 1, _MOST_LOSSES + 2)[1:-1]).astype(int))
    return [reached[place] for place in places]
