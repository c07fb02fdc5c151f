"""The three fits of a scaling law: power laws, loss surfaces (`surface_fit`), and hyperbolas of batch against steps.

Each returns a `Fit`: estimates, standard errors and intervals by name, the evidence of convergence, and the draws that
the intervals come from. `groups` names the run of each point; intervals come from resampling whole runs.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from scipy import stats

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
    judged,
    least_squares,
    linear_fit,
    run_noise,
    spread_interval,
    t_width,
)
from megadiff.scaling.surface_fit import Surface, surface

_ONE_SIGMA = float(stats.norm.cdf(-1))


@dataclass(frozen=True)
class PowerLaw(Fit):
    """y = floor + coefficient x^exponent, with estimates of these names; the floor is 0 unless it was fitted."""

    r_squared: float = np.nan
    """Explained fraction of the variance of log y."""
    x_range: tuple[float, float] = (np.nan, np.nan)
    """Smallest and largest x; beyond them the law is an extrapolation."""

    @property
    def coefficient(self) -> float:
        """Factor of the power."""
        return self.estimates["coefficient"]

    @property
    def exponent(self) -> float:
        """Exponent of x."""
        return self.estimates["exponent"]

    @property
    def floor(self) -> float:
        """Limit that y approaches; 0 for a pure power."""
        return self.estimates["floor"]

    def __call__(self, x: Any) -> Any:
        """Return the law's y."""
        return self.floor + self.coefficient * np.asarray(x, dtype=float) ** self.exponent

    def interval_at(self, x: float) -> tuple[float, float]:
        """Return the interval of the law's y at x."""
        logs = self.draws["log_coefficient"] + self.draws["exponent"] * np.log(x)
        floor = self.draws["floor"]
        drawn = np.logaddexp(logs, np.log(floor)) if self.floor > 0 else logs
        low, high = spread_interval(np.log(float(self(x))), drawn, level=self.level, dof=self.dof)
        return float(np.exp(low)), float(np.exp(high))


def power_law(
    x: Any,
    y: Any,
    groups: Groups = None,
    *,
    floor: float | Literal["absent", "free"] = "absent",
    robust: float | None = None,
    level: float = LEVEL,
    draws: int = 1000,
    seed: int = 0,
) -> PowerLaw:
    """Fit y = floor + A x^alpha to log y.

    Args:
        x: positive numbers.
        y: positive numbers.
        groups: the run of each point; points of one run are resampled together. None: every point is a run.
        floor: `absent`, a fixed number below all y, or `free`, which needs at least four different x.
        robust: Huber's delta in units of log y; residuals beyond it count linearly. None: ordinary least squares.
        level: coverage of the intervals.
        draws: number of resampled data sets.
        seed: seed of the resampling.

    Raises:
        FitError: there are too few points, or the fit with a floor did not converge.
    """
    columns = as_points(x=x, y=y)
    log_x, codes = np.log(columns["x"]), group_codes(groups, len(columns["x"]))
    different, wanted = len(np.unique(log_x)), 4 if floor == "free" else 3
    if different < wanted:
        what = "a law with a free floor" if floor == "free" else "a power law"
        raise FitError(f"{what} needs at least {wanted} different x, found {different}")
    pinned = 0.0 if isinstance(floor, str) else float(floor)
    if not pinned < columns["y"].min():
        raise FitError(f"the floor {pinned:g} must lie below all y, of which the smallest is {columns['y'].min():g}")
    target = np.log(columns["y"] - pinned)
    centre = log_x.mean()
    design = np.column_stack([np.ones_like(log_x), log_x - centre])
    weights = None if robust is None else _huber_weights(design, target, robust)
    found = linear_fit(design, target, codes, draws=draws, seed=seed, weights=weights)
    coefficients, covariance, drawn, dof = found.coefficients, found.covariance, found.draws, found.dof
    convergence, notes = CLOSED_FORM, []
    floors = np.full(draws, pinned)
    if floor == "free":
        theta, convergence = _floor_fit(log_x - centre, np.log(columns["y"]), coefficients)
        predicted, slopes = _floor_model(log_x - centre)(theta[None])
        linear = linear_fit(slopes[0], np.log(columns["y"]) - predicted[0], codes, draws=draws, seed=seed)
        y_drawn = predicted[0] + (linear.draws - linear.coefficients) @ slopes[0].T
        refits, _, _ = least_squares(_floor_model(log_x - centre), y_drawn, np.tile(theta, (draws, 1)))
        drawn, dof, covariance = refits[:, :2], linear.dof[:2], np.cov(refits[:, :2].T)
        coefficients, pinned, floors = theta[:2], float(np.exp(theta[2])), np.exp(refits[:, 2])
        notes.append("A free floor extrapolates too well: it absorbs whatever the range does not determine.")
    runs = int(codes.max()) + 1
    if runs < 6:
        notes.append(f"The intervals rest on {runs} runs.")
    fit = _power_law_of(
        log_coefficient=coefficients[0] - coefficients[1] * centre,
        exponent=coefficients[1],
        drawn=np.column_stack([drawn[:, 0] - drawn[:, 1] * centre, drawn[:, 1]]),
        stderr=(_stderr(covariance, centre), float(np.sqrt(covariance[1, 1]))),
        dof=(float(dof.min()), float(dof[1])),
        floor=pinned,
        floors=floors,
        level=level,
    )
    residuals = np.log(columns["y"]) - np.log(fit(columns["x"]))
    variance = float(((np.log(columns["y"]) - np.log(columns["y"]).mean()) ** 2).sum())
    return PowerLaw(
        **fit.__dict__
        | {
            "convergence": convergence,
            "points": len(log_x),
            "runs": runs,
            "notes": tuple(notes),
            "r_squared": 1 - float(residuals @ residuals) / variance if variance > 0 else np.nan,
            "x_range": (float(columns["x"].min()), float(columns["x"].max())),
        }
    )


def _stderr(covariance: Floats, centre: float) -> float:
    """Return the standard error of the logarithm of the coefficient, which is the line's value at log x = 0."""
    ends = np.array([1.0, -centre])
    return float(np.sqrt(ends @ covariance @ ends))


def _power_law_of(
    *,
    log_coefficient: float,
    exponent: float,
    drawn: Floats,
    stderr: tuple[float, float],
    dof: tuple[float, float],
    level: float,
    floor: float = 0.0,
    floors: Floats | None = None,
) -> PowerLaw:
    """Return the law of a line in logarithms, with intervals of Student's t around it."""
    low, high = (log_coefficient + side * t_width(level, dof[0]) * stderr[0] for side in (-1, 1))
    slopes = tuple(exponent + side * t_width(level, dof[1]) * stderr[1] for side in (-1, 1))
    floors = np.full(len(drawn), floor) if floors is None else floors
    spread = float(np.std(floors)) if len(floors) else 0.0
    with np.errstate(over="ignore"):
        ends = float(np.exp(low)), float(np.exp(high))
    return PowerLaw(
        estimates={"coefficient": float(np.exp(log_coefficient)), "exponent": float(exponent), "floor": floor},
        standard_errors={
            "coefficient": float(np.exp(log_coefficient)) * stderr[0],
            "exponent": stderr[1],
            "floor": spread,
        },
        intervals={
            "coefficient": ends,
            "exponent": (float(slopes[0]), float(slopes[1])),
            "floor": spread_interval(floor, floors, level=level, dof=dof[0]) if spread > 0 else (floor, floor),
        },
        convergence=CLOSED_FORM,
        draws={"log_coefficient": drawn[:, 0], "exponent": drawn[:, 1], "floor": floors},
        level=level,
        dof=dof[1],
    )


def power_law_from_draws(
    log_coefficient: float,
    exponent: float,
    drawn: Floats,
    *,
    dof: float,
    level: float,
    points: int,
    runs: int,
    x_range: tuple[float, float],
    r_squared: float = np.nan,
    notes: tuple[str, ...] = (),
) -> PowerLaw:
    """Return a law whose line was fitted elsewhere, with draws [draws, 2] of (log coefficient, exponent)."""
    stderr = (np.nan, np.nan)
    if len(drawn):  # from quantiles: a draw with an almost flat bowl lies anywhere
        low, high = np.quantile(drawn, [_ONE_SIGMA, 1 - _ONE_SIGMA], axis=0)
        stderr = (float(high[0] - low[0]) / 2, float(high[1] - low[1]) / 2)
    fit = _power_law_of(
        log_coefficient=log_coefficient, exponent=exponent, drawn=drawn, stderr=stderr, dof=(dof, dof), level=level
    )
    own = {"points": points, "runs": runs, "x_range": x_range, "r_squared": r_squared, "notes": notes}
    return PowerLaw(**fit.__dict__ | own)


def _huber_weights(design: Floats, y: Floats, delta: float) -> Floats:
    """Return the weights with which least squares gives Huber's estimate.

    Raises:
        FitError: they did not settle.
    """
    weights = np.ones(len(y))
    for _ in range(500):
        root = np.sqrt(weights)
        b = np.linalg.lstsq(design * root[:, None], y * root, rcond=None)[0]
        after = np.minimum(1.0, delta / np.maximum(np.abs(y - design @ b), 1e-300))
        if np.abs(after - weights).max() < 1e-10:
            return after
        weights = after
    raise FitError(f"Huber's estimate did not settle with a delta of {delta:g}; give a larger one")


def _floor_model(u: Floats) -> Any:
    def model(theta: Floats) -> tuple[Floats, Floats]:
        power = theta[:, :1] + theta[:, 1:2] * u
        total = np.logaddexp(power, theta[:, 2:3])
        share = np.exp(power - total)
        return total, np.stack([share, share * u, 1 - share], axis=2)

    return model


def _floor_fit(u: Floats, log_y: Floats, line: Floats) -> tuple[Floats, Convergence]:
    """Return (log A at u = 0, alpha, log floor) from many starts.

    Raises:
        FitError: fewer than half of the starts agree.
    """
    lowest = np.exp(log_y.min())
    starts = []
    for share, factor in itertools.product((0.02, 0.3, 0.6, 0.9), (1.0, 2.0, 4.0)):
        rest = max(np.exp(log_y.mean()) - share * lowest, 1e-3 * lowest)
        starts.append([np.log(rest), line[1] * factor, np.log(share * lowest)])
    theta, cost, is_done = least_squares(_floor_model(u), np.tile(log_y, (len(starts), 1)), np.array(starts), steps=500)
    best = int(np.argmin(cost))
    agreeing = int((cost <= cost[best] * (1 + 1e-4) + 1e-24).sum())
    return theta[best], judged(bool(is_done[best]), len(starts), agreeing, float(cost[best]))


@dataclass(frozen=True)
class SlopesByGroup:
    """Power laws fitted apart for each value of a label, together, and the test of one slope for all."""

    by: dict[str, PowerLaw]
    pooled: PowerLaw
    statistic: float
    """Welch's F of the differences between the slopes."""
    p_value: float
    """Chance of slopes that differ by this much or more if they are the same."""
    skipped: dict[str, str]
    """Labels without a law of their own, and the reason."""


def slopes_by(x: Any, y: Any, labels: Sequence[Any], groups: Groups = None, *, level: float = LEVEL) -> SlopesByGroup:
    """Fit a power law for each label, such as each model size, and test whether all have the same slope.

    Args:
        x: positive numbers.
        y: positive numbers.
        labels: the label of each point.
        groups: the run of each point; a run belongs to one label.
        level: coverage of the intervals.
    """
    columns = as_points(x=x, y=y)
    names = np.array([str(label) for label in labels])
    codes = group_codes(groups, len(names))
    by: dict[str, PowerLaw] = {}
    skipped: dict[str, str] = {}
    for name in dict.fromkeys(names.tolist()):
        rows = names == name
        try:
            own = None if groups is None else codes[rows]
            by[name] = power_law(columns["x"][rows], columns["y"][rows], own, level=level)
        except FitError as error:
            skipped[name] = str(error)
    statistic, p_value = _welch([(law.exponent, law.standard_errors["exponent"], law.dof) for law in by.values()])
    pooled = power_law(columns["x"], columns["y"], None if groups is None else codes, level=level)
    return SlopesByGroup(by, pooled, statistic, p_value, skipped)


def _welch(slopes: list[tuple[float, float, float]]) -> tuple[float, float]:
    """Return Welch's statistic and its p-value for (estimate, standard error, degrees of freedom) of each group."""
    known = [(b, s, dof) for b, s, dof in slopes if np.isfinite(s) and s > 0 and dof > 0]
    k = len(known)
    if k < 2:
        return np.nan, np.nan
    b, s, dof = np.array(known).T
    w = 1 / s**2
    centre = (w * b).sum() / w.sum()
    spread = ((1 - w / w.sum()) ** 2 / dof).sum()
    statistic = float((w * (b - centre) ** 2).sum() / (k - 1) / (1 + 2 * (k - 2) / (k**2 - 1) * spread))
    return statistic, float(stats.f.sf(statistic, k - 1, (k**2 - 1) / (3 * spread)))


_EXCESS = 1.2
"""Tokens at the critical batch, as a multiple of the fewest."""


@dataclass(frozen=True)
class Hyperbola(Fit):
    """Steps against batch at one loss, ((S/s_min)^g - 1)((B/b_min)^g - 1) = 1, with estimates of these names.

    `s_opt` and `b_opt` are the point with the fewest tokens, 2^(1/g) times s_min and b_min. `critical_batch` is the
    smallest batch whose tokens exceed those by 20 %: beyond it more devices save little time.
    """

    batch_range: tuple[float, float] = (np.nan, np.nan)
    is_inside: bool = False
    """Whether the batch with the fewest tokens lies inside the batches that were run."""

    def steps(self, batch: Any) -> Any:
        """Return the steps that a batch needs; infinite at or below b_min."""
        g, b_min = self.estimates["g"], self.estimates["b_min"]
        power = (np.asarray(batch, dtype=float) / b_min) ** g
        with np.errstate(all="ignore"):
            return np.where(power > 1, self.estimates["s_min"] * (power / (power - 1)) ** (1 / g), np.inf)


def hyperbola(
    steps: Any,
    batch: Any,
    *,
    groups: Groups = None,
    g: float | None = None,
    level: float = LEVEL,
    draws: int = 1000,
    seed: int = 0,
) -> Hyperbola:
    """Fit the hyperbola of steps against batch to log steps.

    The curve is written around its point of fewest tokens, log S = log s_opt - log(2 - (B / b_opt)^-g) / g, whose three
    parameters the data determine much better than s_min and b_min: near the point, log(S B) is a parabola in log B with
    the curvature 2 g.

    Args:
        steps: steps to one and the same loss.
        batch: batch of each, in tokens.
        groups: the run of each point; None: every point is a run.
        g: a fixed exponent, such as 1 for McCandlish's curve; None fits it.
        level: coverage of the intervals.
        draws: number of resampled data sets.
        seed: seed of the resampling.

    Raises:
        FitError: there are too few batches, the curve has no point of fewest tokens, or the starts disagree.
    """
    columns = as_points(steps=steps, batch=batch)
    log_s, log_b = np.log(columns["steps"]), np.log(columns["batch"])
    codes = group_codes(groups, len(log_s))
    free = 2 if g is not None else 3
    if len(np.unique(log_b)) < free + 1:
        raise FitError(f"a hyperbola needs at least {free + 1} different batches, found {len(np.unique(log_b))}")
    model = _hyperbola_model(log_b, g)
    theta, convergence = _hyperbola_fit(model, log_s, log_b, g)
    predicted, slopes = (part[0] for part in model(theta[None]))
    linear = linear_fit(slopes, log_s - predicted, codes, draws=draws, seed=seed)
    if g is None and theta[2] < np.log(1e-6):
        raise FitError("tokens do not rise on both sides of a batch: the data do not bend, so there is no hyperbola")
    noise = run_noise(log_s - predicted, slopes, codes)
    rng = np.random.default_rng(seed)
    data = predicted + noise(rng, draws)
    refits, _, is_done = least_squares(model, data, np.tile(theta, (draws, 1)), steps=100)
    refits = refits[is_done]
    dof = float(linear.dof.min())
    values, drawn = _hyperbola_values(theta[None], g), _hyperbola_values(refits, g)
    intervals = {}
    for name, value in values.items():
        low, high = spread_interval(value[0], drawn[name], level=level, dof=dof)
        intervals[name] = (float(np.exp(low)), float(np.exp(high)))
    estimates = {name: float(np.exp(value[0])) for name, value in values.items()}
    if g is not None:
        estimates["g"], intervals["g"] = g, (g, g)
    is_inside = bool(columns["batch"].min() < estimates["b_opt"] < columns["batch"].max())
    notes = [] if is_inside else ["The batch with the fewest tokens lies outside the batches that were run."]
    return Hyperbola(
        estimates=estimates,
        standard_errors={name: estimates[name] * float(np.std(drawn[name])) for name in values},
        intervals=intervals,
        convergence=convergence,
        draws={f"log_{name}": value for name, value in drawn.items()},
        level=level,
        points=len(log_s),
        runs=int(codes.max()) + 1,
        dof=dof,
        notes=tuple(notes),
        batch_range=(float(columns["batch"].min()), float(columns["batch"].max())),
        is_inside=is_inside,
    )


def _hyperbola_model(log_b: Floats, g: float | None) -> Any:
    def model(theta: Floats) -> tuple[Floats, Floats]:
        power = np.full(len(theta), g) if g is not None else np.exp(theta[:, 2])
        u = power[:, None] * (log_b - theta[:, 1:2])
        with np.errstate(all="ignore"):
            small = np.exp(-u)
            inner = 2 - small
            value = theta[:, :1] - np.log(np.where(inner > 0, inner, np.nan)) / power[:, None]
            fraction = small / inner
        by_batch, by_log_g = fraction, theta[:, :1] - value - u * fraction / power[:, None]
        parts = [np.ones_like(u), by_batch] + ([] if g is not None else [by_log_g])
        return value, np.stack(parts, axis=2)

    return model


def _hyperbola_fit(model: Any, log_s: Floats, log_b: Floats, g: float | None) -> tuple[Floats, Convergence]:
    starts = []
    for place, power in itertools.product((0.0, 0.25, 0.5, 0.75, 1.0), (0.05, 0.15, 0.5, 1.0)):
        centre = log_b.min() + place * (log_b.max() - log_b.min())
        # Smaller powers keep the whole range inside the curve's domain: (B / b_opt)^-g < 2.
        power = min(power, 0.6 / max(centre - log_b.min(), 1e-9))
        if g is not None:
            centre = min(centre, log_b.min() + 0.6 / g)
        level = float(np.interp(centre, *_in_order(log_b, log_s)))
        starts.append([level, centre] if g is not None else [level, centre, np.log(power)])
    tiled = np.tile(log_s, (len(starts), 1))
    theta, cost, is_done = least_squares(model, tiled, np.array(starts), steps=1000)
    best = int(np.argmin(cost))
    agreeing = int((cost <= cost[best] * (1 + 1e-4) + 1e-20).sum())
    return theta[best], judged(bool(is_done[best]), len(starts), agreeing, float(cost[best]))


def _in_order(x: Floats, y: Floats) -> tuple[Floats, Floats]:
    order = np.argsort(x)
    return x[order], y[order]


def _hyperbola_values(theta: Floats, g: float | None) -> dict[str, Floats]:
    """Return the logarithms of the named estimates, each [draws]."""
    power = np.full(len(theta), g) if g is not None else np.exp(theta[:, 2])
    with np.errstate(all="ignore"):
        shift = np.log(2) / power
        found = {"s_min": theta[:, 0] - shift, "b_min": theta[:, 1] - shift, "s_opt": theta[:, 0], "b_opt": theta[:, 1]}
        found["critical_batch"] = theta[:, 1] + _beyond(power)
    return found if g is not None else {**found, "g": theta[:, 2]}


def _beyond(power: Floats) -> Floats:
    """Return u > 0 at which u - log(2 - exp(-g u)) / g, the log of tokens above the fewest, is log 1.2."""
    low, high = np.zeros_like(power), np.full_like(power, 60.0)
    for _ in range(80):
        middle = (low + high) / 2
        excess = middle - np.log(2 - np.exp(-power * middle)) / power
        is_more = excess > np.log(_EXCESS)
        low, high = np.where(is_more, low, middle), np.where(is_more, middle, high)
    return (low + high) / 2


__all__ = [
    "Hyperbola",
    "PowerLaw",
    "SlopesByGroup",
    "Surface",
    "hyperbola",
    "power_law",
    "power_law_from_draws",
    "slopes_by",
    "surface",
]
