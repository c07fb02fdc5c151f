"""Fits of power laws, with or without a floor, by groups of runs."""

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
    spread_interval,
    t_width,
)

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
    with np.errstate(over="ignore"):
        ends = float(np.exp(low)), float(np.exp(high))
    return PowerLaw(
        estimates={"coefficient": float(np.exp(log_coefficient)), "exponent": float(exponent), "floor": floor},
        standard_errors={
            "coefficient": float(np.exp(log_coefficient)) * stderr[0],
            "exponent": stderr[1],
            "floor": float(np.std(floors)) if len(floors) else 0.0,
        },
        intervals={
            "coefficient": ends,
            "exponent": (float(slopes[0]), float(slopes[1])),
            "floor": spread_interval(floor, floors, level=level, dof=dof[0]) if floors.std() > 0 else (floor, floor),
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
