"""Comparisons between runs and between laws: cooldowns, repeated data, crossings, noises side by side."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np

from megadiff.errors import DataError, StorageError
from megadiff.scaling.fit import PowerLaw, Surface
from megadiff.scaling.paired import PairedDifference, PerSequence, average, compare, read
from megadiff.scaling.points import Point, size_name
from megadiff.scaling.resampling import (
    CLOSED_FORM,
    LEVEL,
    Convergence,
    Fit,
    FitError,
    Floats,
    Groups,
    as_points,
    group_codes,
    linear_fit,
    size_codes,
    spread_interval,
    t_width,
)


def annealing_ratio(
    unannealed: Any, annealed: Any, groups: Groups = None, *, level: float = LEVEL, draws: int = 1000, seed: int = 0
) -> Fit:
    """Return the ratio of unannealed to annealed losses, from paired log ratios; its estimate is named `ratio`.

    Args:
        unannealed: loss at the end of each trunk's stable stretch.
        annealed: loss of the branch with a cooldown, in the same order.
        groups: the trunk of each pair; branches of one trunk share its luck. None: every pair has its own trunk.
        level: coverage of the interval.
        draws: number of redrawn sets of trunks.
        seed: seed of the redrawing.

    Raises:
        FitError: there are fewer than three trunks.
    """
    columns = as_points(unannealed=unannealed, annealed=annealed)
    ratios = np.log(columns["unannealed"] / columns["annealed"])
    codes = group_codes(groups, len(ratios))
    trunks = int(codes.max()) + 1 if len(codes) else 0
    if trunks < 3:
        raise FitError(f"a ratio with an interval needs pairs of at least 3 trunks, found {trunks}")
    found = linear_fit(np.ones((len(ratios), 1)), ratios, codes, draws=draws, seed=seed)
    value, spread, dof = float(found.coefficients[0]), float(np.sqrt(found.covariance[0, 0])), float(found.dof[0])
    ends = [float(np.exp(value + side * t_width(level, dof) * spread)) for side in (-1, 1)]
    return Fit(
        estimates={"ratio": float(np.exp(value))},
        standard_errors={"ratio": float(np.exp(value)) * spread},
        intervals={"ratio": (ends[0], ends[1])},
        convergence=CLOSED_FORM,
        draws={"ratio": np.exp(found.draws[:, 0])},
        level=level,
        points=len(ratios),
        runs=trunks,
        dof=dof,
    )


def repeats(
    n: Any, unique: Any, tokens: Any, loss: Any, law: Surface, groups: Groups = None, *, level: float = LEVEL,
    draws: int = 500, seed: int = 0,
) -> Fit:  # fmt: skip
    """Fit R* of repeated data, D' = U + U R* (1 - exp(-R / R*)) with R = D / U - 1, in a loss surface.

    Its estimate is named `r_star`: about that many repetitions are worth something (arXiv:2305.16264). The interval
    holds the luck of whole runs and, through the surface's draws, the error of the surface.

    Args:
        n: size, in the surface's unit.
        unique: unique tokens U, in the surface's unit.
        tokens: tokens trained on, at least U.
        loss: nats per token.
        law: surface fitted to runs without repetition.
        groups: the run of each point; None: every point is a run.
        level: coverage of the interval.
        draws: number of redrawn data sets.
        seed: seed of the redrawing.

    Raises:
        FitError: no point repeats its data, or the losses do not bound R*.
    """
    columns = as_points(n=n, unique=unique, tokens=tokens, loss=loss)
    repetitions = columns["tokens"] / columns["unique"] - 1
    if repetitions.min() < -1e-9:
        raise FitError(f"tokens[{int(repetitions.argmin())}] are fewer than the unique tokens")
    if (repetitions > 0.5).sum() < 3:
        raise FitError(
            f"R* needs at least 3 points with data seen more than 1.5 times, found {(repetitions > 0.5).sum()}"
        )
    codes = group_codes(groups, len(repetitions))
    grid = np.linspace(np.log(0.05), np.log(5000), 600)
    effective = columns["unique"] * (1 + np.exp(grid)[:, None] * -np.expm1(-repetitions / np.exp(grid)[:, None]))
    target = np.log(columns["loss"])

    def curve(parameters: Floats) -> Floats:
        E, A, B, alpha, beta = parameters
        return np.log(E + A * columns["n"] ** -alpha + B * effective**-beta)

    names = ("E", "A", "B", "alpha", "beta")
    central = curve(np.array([law.estimates[name] for name in names]))
    costs = ((central - target) ** 2).sum(axis=1)
    best = int(costs.argmin())
    if best in (0, len(grid) - 1):
        way = "worth nothing" if best == 0 else "worth as much as new data"
        raise FitError(f"repeated data look {way} at every repetition here, so these losses do not bound R*")
    value, fitted = _lowest(grid, costs), central[best]
    slope = np.gradient(central, grid, axis=0)[best][:, None]
    residuals = target - fitted
    found = linear_fit(slope, residuals, codes, draws=draws, seed=seed)
    spread = float(np.sqrt(found.covariance[0, 0]))
    surfaces = [law.draws.get(name, np.empty(0)) for name in names]
    usable = np.flatnonzero(np.isfinite(np.array(surfaces)).all(axis=0)) if len(surfaces[0]) else np.empty(0, dtype=int)
    drawn = value + (found.draws[:, 0] - found.coefficients[0])
    rng = np.random.default_rng(seed + 1)
    for row in range(draws if len(usable) else 0):
        pick = rng.choice(usable)
        shifted = curve(np.array([part[pick] for part in surfaces]))
        drawn[row] += _lowest(grid, ((shifted - target) ** 2).sum(axis=1)) - value
    dof = float(found.dof[0])
    low, high = spread_interval(value, drawn, level=level, dof=dof)
    counts = int((np.diff(np.sign(np.diff(costs))) > 0).sum())
    return Fit(
        estimates={"r_star": float(np.exp(value))},
        standard_errors={"r_star": float(np.exp(value) * max(spread, float(np.std(drawn))))},
        intervals={"r_star": (float(np.exp(low)), float(np.exp(high)))},
        convergence=Convergence(True, len(grid), len(grid), float(costs[best]), f"{counts} minimum on the grid"),
        draws={"r_star": np.exp(drawn)},
        level=level,
        points=len(target),
        runs=int(codes.max()) + 1,
        dof=dof,
        notes=() if len(usable) else ("The surface has no draws, so the interval leaves its error out.",),
    )


def _lowest(grid: Floats, costs: Floats) -> float:
    """Return the lowest point of the parabola through the least cost and its neighbours."""
    place = int(np.clip(costs.argmin(), 1, len(grid) - 2))
    low, middle, high = costs[place - 1 : place + 2]
    bend = low - 2 * middle + high
    shift = 0.5 * (low - high) / bend if bend > 0 else 0.0
    return float(grid[place] + np.clip(shift, -1, 1) * (grid[1] - grid[0]))


@dataclass(frozen=True)
class Crossing:
    """The compute at which two laws of loss are equal."""

    flops: float
    """FLOPs of the crossing; NaN if the laws do not cross."""
    interval: tuple[float, float]
    """All FLOPs at which the laws do not differ significantly, around the crossing; 0 or infinite at an open end."""
    is_extrapolated: bool
    """Whether the crossing lies beyond the range of one of the laws."""

    @property
    def is_resolved(self) -> bool:
        """Whether the laws cross and differ significantly on both sides."""
        return np.isfinite(self.flops) and self.interval[0] > 0 and np.isfinite(self.interval[1])


def crossing(first: PowerLaw, second: PowerLaw) -> Crossing:
    """Return where two laws of loss over compute cross.

    The interval is Fieller's: the compute at which the difference of the laws is less than its own error allows. It is
    open, on one side or on both, where the slopes do not differ significantly; quantiles of crossings would hide that.
    """
    low, high = min(first.x_range[0], second.x_range[0]), max(first.x_range[1], second.x_range[1])
    grid = np.linspace(np.log(low) - 35, np.log(high) + 35, 14001)
    gap, spread = _gap(first, second, grid)
    changes = np.flatnonzero(np.sign(gap[1:]) != np.sign(gap[:-1]))
    if not len(changes):
        return Crossing(np.nan, (0.0, np.inf), is_extrapolated=True)
    middle = np.log(np.sqrt(low * high))
    place = int(changes[np.abs(grid[changes] - middle).argmin()])
    step = grid[1] - grid[0]
    at = grid[place] + step * gap[place] / (gap[place] - gap[place + 1])
    width = t_width(first.level, min(first.dof, second.dof))
    is_open = np.abs(gap) <= width * spread
    below, above = place, place + 1
    while below >= 0 and is_open[below]:
        below -= 1
    while above < len(grid) and is_open[above]:
        above += 1
    ends = (
        0.0 if below < 0 else float(np.exp(grid[below])),
        np.inf if above == len(grid) else float(np.exp(grid[above])),
    )
    inside = max(first.x_range[0], second.x_range[0]) <= np.exp(at) <= min(first.x_range[1], second.x_range[1])
    return Crossing(float(np.exp(at)), ends, is_extrapolated=not inside)


def _gap(first: PowerLaw, second: PowerLaw, log_x: Floats) -> tuple[Floats, Floats]:
    """Return the difference of the logs of two independent laws, and its standard error."""
    values, variance = [], np.zeros_like(log_x)
    for law in (first, second):
        a, b = law.draws["log_coefficient"], law.draws["exponent"]
        values.append(np.log(law.floor + law.coefficient * np.exp(law.exponent * log_x)))
        if not len(a):
            variance = variance + np.nan
        elif np.ptp(law.draws["floor"]) == 0 and law.floor == 0:
            (aa, ab), (_, bb) = np.cov(a, b)
            variance = variance + aa + 2 * ab * log_x + bb * log_x**2
        else:
            with np.errstate(over="ignore"):
                drawn = [np.log(f + np.exp(i + s * log_x)) for i, s, f in zip(a, b, law.draws["floor"], strict=True)]
            variance = variance + np.var(drawn, axis=0)
    with np.errstate(invalid="ignore"):
        return values[0] - values[1], np.sqrt(np.maximum(variance, 0.0))


@dataclass(frozen=True)
class SpeedUp:
    """Compute that the second law needs over that of the first, at equal loss."""

    loss: float
    ratio: float
    interval: tuple[float, float]
    is_extrapolated: bool
    """Whether one of the laws is used beyond its range."""


def speed_up(first: PowerLaw, second: PowerLaw, *, loss: float | None = None, flops: float | None = None) -> SpeedUp:
    """Return how many times the compute of `first` the law `second` needs for a loss.

    Args:
        first: law of loss over compute.
        second: another one.
        loss: the loss, or None.
        flops: the compute at which `second` has the loss, if the loss is not given.

    Raises:
        FitError: neither or both are given, or a law does not reach the loss.
    """
    if (loss is None) == (flops is None):
        raise FitError("a speed-up is at one loss or at one compute of the second law: give exactly one of them")
    target = float(second(flops)) if loss is None else loss
    if target <= max(first.floor, second.floor):
        raise FitError(f"a loss of {target:g} lies at or below a law's floor")
    logs, drawn = [], []
    for law in (first, second):
        logs.append((np.log(target - law.floor) - np.log(law.coefficient)) / law.exponent)
        with np.errstate(invalid="ignore"):
            rest = np.log(target - law.draws["floor"])
        drawn.append((rest - law.draws["log_coefficient"]) / law.draws["exponent"])
    count = min(map(len, drawn))
    differences = drawn[1][:count] - np.random.default_rng(0).permutation(drawn[0][:count])
    dof = min(first.dof, second.dof)
    low, high = spread_interval(logs[1] - logs[0], differences, level=first.level, dof=dof)
    is_inside = all(
        law.x_range[0] <= np.exp(at) <= law.x_range[1] for law, at in zip((first, second), logs, strict=True)
    )
    return SpeedUp(target, float(np.exp(logs[1] - logs[0])), (float(np.exp(low)), float(np.exp(high))), not is_inside)


_SAME_STEP = 1.0
"""Steps up to which an evaluation is at a budget: the first step that reaches it is less than one beyond."""


@dataclass(frozen=True)
class Side:
    """One setting of a pair: its runs of all seeds."""

    noise: str
    runs: tuple[str, ...]
    steps: tuple[int, ...]
    """Steps of the evaluations, in the order of `runs`."""

    def describe(self) -> str:
        """Return noise, number of runs and steps in words."""
        steps = sorted(set(self.steps))
        runs = f"{len(self.runs)} run{'s' * (len(self.runs) > 1)}"
        return f"{self.noise} ({runs}, step{'s' * (len(steps) > 1)} {', '.join(f'{step:,}' for step in steps)})"


@dataclass(frozen=True)
class PairedRuns:
    """The difference of two settings at one budget, each the mean of its seeds."""

    flops: float
    what: str
    """Kind of the pair: `best`, or the model size that both settings have."""
    first: Side
    second: Side
    difference: PairedDifference
    """Loss of the first less that of the second, in nats per token. Its error is over sequences, between these runs."""


def paired_runs(points: Sequence[Point]) -> tuple[list[PairedRuns], list[str]]:
    """Return the best settings of each two noises at each budget, and those of one size, and sentences of refusals.

    Runs that kept no figures of single sequences within a step of a budget, and points that are not of run folders,
    have no pairs.
    """
    found: list[PairedRuns] = []
    refusals: dict[str, None] = {}
    cache: dict[str, dict[int, PerSequence]] = {}
    for flops in sorted({point.flops for point in points}):
        chosen: dict[tuple[str, str], list[Point]] = {}
        for seeds in _settings([point for point in points if point.flops == flops]):
            for what in ("best", size_name(seeds[0])):
                chosen.setdefault((what, seeds[0].noise), seeds)
        for what in dict.fromkeys(what for what, _ in chosen):
            members = {noise: seeds for (kind, noise), seeds in chosen.items() if kind == what}
            for first, second in itertools.combinations(sorted(members), 2):
                try:
                    sides = _side(members[first], cache), _side(members[second], cache)
                    if sides[0] is None or sides[1] is None:
                        continue
                    difference = compare(sides[0][1], sides[1][1])
                except DataError as error:
                    refusals[f"pairs of {first} and {second}: {error}"] = None
                    continue
                found.append(PairedRuns(flops, what, sides[0][0], sides[1][0], difference))
    return found, list(refusals)


def _settings(points: Sequence[Point]) -> list[list[Point]]:
    """Return the points of one budget by setting, of which a list has all seeds; the lowest mean loss first."""
    found: dict[tuple[object, ...], list[Point]] = {}
    for size, point in zip(size_codes([point.flops_per_token for point in points]), points, strict=True):
        found.setdefault((point.noise, int(size), point.batch_tokens, point.learning_rate), []).append(point)
    return sorted(found.values(), key=lambda seeds: fmean(point.loss for point in seeds))


def _side(seeds: Sequence[Point], cache: dict[str, dict[int, PerSequence]]) -> tuple[Side, PerSequence] | None:
    """Return the runs of a setting with the mean of their figures; None if no run has any at the budget.

    Raises:
        DataError: the seeds were evaluated on different sequences or draws.
    """
    steps = {point.run: step for point in seeds if (step := _step_at_budget(point, cache)) is not None}
    if not steps:
        return None
    side = Side(seeds[0].noise, tuple(steps), tuple(steps.values()))
    return side, average([cache[run][step] for run, step in steps.items()])


def _step_at_budget(point: Point, cache: dict[str, dict[int, PerSequence]]) -> int | None:
    """Return the step at which a point's run kept figures at its budget; None if it kept none there."""
    if point.run not in cache:
        folder = Path(point.run)
        try:
            cache[point.run] = read(folder) if folder.is_dir() else {}
        except (StorageError, ValueError):
            cache[point.run] = {}
    wanted = point.step
    if wanted is None or not cache[point.run]:
        return None
    step = min(cache[point.run], key=lambda each: abs(each - wanted))
    return step if abs(step - wanted) <= _SAME_STEP else None
