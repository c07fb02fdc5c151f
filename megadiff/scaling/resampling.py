"""Intervals of fits: what a run is, how its luck is resampled, and least squares of many resampled data sets at once.

Points of one run share that run's luck: its seed, its order of data, the moment at which it left a plateau. All
intervals of the scaling laboratory therefore resample whole runs. Where there is one run a size, runs cannot be left
out without losing the size; then the residuals of whole runs are redrawn around the fit instead.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import stats

from megadiff.errors import MegadiffError

Floats = NDArray[np.float64]
Groups = Sequence[Any] | NDArray[Any] | None

LEVEL = 0.95
"""Coverage of intervals unless another is given."""

Model = Callable[[Floats], tuple[Floats, Floats]]
"""Function from parameters [draws, p] to predictions [draws, n] and their derivatives [draws, n, p]."""


class FitError(MegadiffError):
    """A fit that the data do not determine, or that did not converge."""


@dataclass(frozen=True)
class Convergence:
    """Evidence that a fit is the minimum."""

    converged: bool
    starts: int
    """Number of starting points."""
    agreeing: int
    """Number of starting points that ended in the same minimum."""
    objective: float
    """Value of the objective at the minimum."""
    message: str = ""

    @property
    def agreement(self) -> float:
        """Fraction of the starting points that ended in the same minimum, 0 to 1."""
        return self.agreeing / self.starts


CLOSED_FORM = Convergence(True, 1, 1, 0.0, "linear least squares has one minimum")


@dataclass(frozen=True)
class Fit:
    """Estimates of a fit by name, their errors, and the draws that the errors come from."""

    estimates: dict[str, float]
    standard_errors: dict[str, float]
    """Standard errors by name; NaN where the data leave none."""
    intervals: dict[str, tuple[float, float]]
    """Intervals (low, high) by name; NaN where the data leave none, infinite where they leave an end open."""
    convergence: Convergence
    draws: dict[str, Floats] = field(repr=False)
    """Estimates of resampled runs by name, row by row from the same resampling; empty if there are none."""
    level: float = LEVEL
    """Coverage that the intervals aim at."""
    points: int = 0
    runs: int = 0
    """Number of runs, each resampled as a whole; equal to `points` if no groups were given."""
    dof: float = np.inf
    """Degrees of freedom of the noise estimate, by which the intervals are widened."""
    notes: tuple[str, ...] = ()
    """Reservations about this fit, one sentence each."""

    def half_width(self, name: str) -> float:
        """Return half the width of the interval of an estimate."""
        low, high = self.intervals[name]
        return (high - low) / 2


def as_points(**columns: Any) -> dict[str, Floats]:
    """Return equally long float arrays of positive finite numbers.

    Raises:
        FitError: a column has another length, or a value that is not a positive finite number.
    """
    found: dict[str, Floats] = {}
    for name, values in columns.items():
        try:
            array = np.asarray(values, dtype=float).ravel()
        except (TypeError, ValueError):
            raise FitError(f"{name}: numbers are wanted") from None
        if not (np.isfinite(array) & (array > 0)).all():
            place = int(np.flatnonzero(~(np.isfinite(array) & (array > 0)))[0])
            raise FitError(f"{name}[{place}] is {array[place]:g}; a positive finite number is wanted")
        found[name] = array
    lengths = {name: len(array) for name, array in found.items()}
    if len(set(lengths.values())) > 1:
        raise FitError(f"columns of one length are wanted, found {lengths}")
    return found


def group_codes(groups: Sequence[Any] | NDArray[Any] | None, points: int) -> NDArray[np.int64]:
    """Return the number of each point's run, from 0; every point is its own run if no groups are given.

    Raises:
        FitError: there is not one group a point.
    """
    if groups is None:
        return np.arange(points)
    if len(groups) != points:
        raise FitError(f"groups: one run a point is wanted, found {len(groups)} for {points} points")
    return np.unique(np.asarray([str(group) for group in groups]), return_inverse=True)[1].astype(np.int64)


def t_width(level: float, dof: float) -> float:
    """Return the half-width, in standard errors, of an interval with this coverage; infinite without freedom."""
    return float(stats.t.ppf((1 + level) / 2, dof)) if dof > 0 else np.inf


def widening(level: float, dof: float) -> float:
    """Return the factor by which normal draws are spread so that their quantiles are those of Student's t."""
    return t_width(level, dof) / float(stats.norm.ppf((1 + level) / 2))


def spread_interval(value: float, draws: Floats, *, level: float, dof: float) -> tuple[float, float]:
    """Return the interval of draws around an estimate, widened for the error of their own spread."""
    if not len(draws) or not np.isfinite(draws).any():
        return np.nan, np.nan
    low, high = np.nanquantile(draws, [(1 - level) / 2, (1 + level) / 2])
    factor = widening(level, dof)
    return float(value + (low - value) * factor), float(value + (high - value) * factor)


@dataclass(frozen=True)
class LinearFit:
    """Least squares of a linear model with errors that are shared within runs."""

    coefficients: Floats
    covariance: Floats
    dof: Floats
    """Degrees of freedom of each coefficient's variance."""
    draws: Floats
    """Coefficients of redrawn runs, [draws, coefficients], with the covariance above."""
    residuals: Floats


def linear_fit(
    design: Floats, y: Floats, codes: NDArray[np.int64], *, draws: int, seed: int, weights: Floats | None = None
) -> LinearFit:
    """Fit y = design @ b; errors are independent between runs and anything within one.

    If every point is a run of its own, one noise is assumed for all. Otherwise each run's residuals are inflated for
    the leverage of the run (the bias-reduced CR2 estimate) and redrawn as a whole, and the degrees of freedom are
    Satterthwaite's for an offset per run beside the noise of points (Bell and McCaffrey, Survey Methodology 28, 2002;
    Imbens and Kolesar, Review of Economics and Statistics 98, 2016).
    """
    points, size = design.shape
    root = np.ones(points) if weights is None else np.sqrt(weights)
    X, target = design * root[:, None], y * root
    inverse = np.linalg.pinv(X.T @ X)
    coefficients = inverse @ X.T @ target
    residuals = target - X @ coefficients
    rng = np.random.default_rng(seed)
    free = points - size
    if len(set(codes.tolist())) == points:
        covariance = inverse * (residuals @ residuals / free if free > 0 else np.nan)
        noise = rng.standard_normal((draws, points)) * np.sqrt(residuals @ residuals / free if free > 0 else np.nan)
        found = coefficients + noise @ (X @ inverse)
        return LinearFit(coefficients, covariance, np.full(size, float(free)), found, residuals / root)
    hat = X @ inverse @ X.T
    keep = np.eye(points) - hat
    members = [np.flatnonzero(codes == code) for code in range(codes.max() + 1)]
    adjusts = [_inverse_root(keep[np.ix_(rows, rows)]) for rows in members]
    scores = np.array([(X[rows] @ inverse).T @ (a @ residuals[rows]) for rows, a in zip(members, adjusts, strict=True)])
    covariance = scores.T @ scores
    is_together = (codes[:, None] == codes[None, :]).astype(float)
    working = np.eye(points) + _correlation(residuals, members) * is_together
    dof = np.empty(size)
    for place in range(size):
        P = np.column_stack(
            [keep[:, rows] @ (a @ (X[rows] @ inverse[:, place])) for rows, a in zip(members, adjusts, strict=True)]
        )
        inner = P.T @ working @ P
        dof[place] = np.trace(inner) ** 2 / max(float((inner * inner).sum()), 1e-300)
    found = coefficients + rng.standard_normal((draws, len(members))) @ scores
    return LinearFit(coefficients, covariance, dof, found, residuals / root)


def _inverse_root(matrix: Floats) -> Floats:
    values, vectors = np.linalg.eigh((matrix + matrix.T) / 2)
    return (vectors * np.where(values > 1e-9, 1 / np.sqrt(np.maximum(values, 1e-9)), 0.0)) @ vectors.T


def _correlation(residuals: Floats, members: list[NDArray[np.int64]]) -> float:
    """Return the ratio of an offset's variance to that of a point, from products of residuals within runs."""
    products = sum(float(residuals[rows].sum() ** 2 - (residuals[rows] ** 2).sum()) for rows in members)
    pairs = sum(len(rows) * (len(rows) - 1) for rows in members)
    share = min(max(products / pairs / max(float((residuals**2).mean()), 1e-300), 0.0), 0.99) if pairs else 0.0
    return share / (1 - share)


def least_squares(
    model: Model, y: Floats, start: Floats, *, weights: Floats | None = None, steps: int = 200
) -> tuple[Floats, Floats, NDArray[np.bool_]]:
    """Fit many data sets at once by Levenberg and Marquardt's method.

    Args:
        model: a prediction that is not finite is outside the model's domain and never stepped to.
        y: [draws, n].
        start: [draws, p].
        weights: weight of each square, [draws, n]; None weighs all alike.
        steps: most steps.

    Returns:
        parameters [draws, p], sums of squares [draws], and whether each fit stopped improving [draws].
    """
    theta, damping = start.copy(), np.full(len(start), 1e-3)
    weights = np.ones_like(y) if weights is None else weights
    found, slopes = model(theta)
    cost = _cost(y - found, weights)
    is_done = ~np.isfinite(cost)
    eye = np.eye(theta.shape[1])
    for _ in range(steps):
        active = np.flatnonzero(~is_done)
        if not len(active):
            break
        J, r = slopes[active], (y - found)[active]
        J_weighted = (J * weights[active][:, :, None]).transpose(0, 2, 1)
        gram = J_weighted @ J
        scale = np.maximum(np.einsum("dpp->dp", gram), 1e-30)
        lifted = gram + eye * (damping[active, None] * scale)[:, :, None]
        step = np.linalg.solve(lifted, J_weighted @ r[:, :, None])[:, :, 0]
        tried = theta[active] + step
        with np.errstate(all="ignore"):
            value, slope = model(tried)
        after = _cost(y[active] - value, weights[active])
        is_better = after <= cost[active]
        gain = np.where(is_better, cost[active] - after, np.inf)
        stopped = (gain <= 1e-14 * cost[active] + 1e-300) | (damping[active] > 1e12)
        rows = active[is_better]
        theta[rows], found[rows], slopes[rows] = tried[is_better], value[is_better], slope[is_better]
        cost[rows] = after[is_better]
        damping[active] = np.where(is_better, damping[active] / 5, damping[active] * 5)
        is_done[active] |= stopped
    return theta, cost, is_done & np.isfinite(cost)


def _cost(residuals: Floats, weights: Floats) -> Floats:
    with np.errstate(all="ignore"):
        total = (weights * residuals**2).sum(axis=1)
    return np.where(np.isfinite(total), total, np.inf)


def judged(is_converged: bool, starts: int, agreeing: int, objective: float, why: str = "") -> Convergence:
    """Return the evidence of convergence.

    Raises:
        FitError: the fit did not converge, or fewer than half of the starts agree.
    """
    if not is_converged:
        raise FitError(f"the fit did not converge{why}; give more points, or a smaller tolerance")
    if 2 * agreeing < starts:
        raise FitError(
            f"only {agreeing} of {starts} starts end in the lowest minimum{why}; a fit needs half of them: give a "
            "smaller tolerance, or data that determine it"
        )
    return Convergence(True, starts, agreeing, objective, f"{agreeing} of {starts} starts agree")


def run_noise(residuals: Floats, slopes: Floats, codes: NDArray[np.int64]) -> Any:
    """Return a function that draws noise [draws, n]: of whole runs where they are given, else of single points."""
    points, size = slopes.shape
    runs = int(codes.max()) + 1
    if runs == points:
        spread = float(np.sqrt(residuals @ residuals / (points - size))) if points > size else np.nan
        return lambda rng, draws: rng.standard_normal((draws, points)) * spread
    keep = np.eye(points) - slopes @ np.linalg.pinv(slopes)
    grown = np.zeros((runs, points))
    for code in range(runs):
        rows = np.flatnonzero(codes == code)
        grown[code, rows] = _inverse_root(keep[np.ix_(rows, rows)]) @ residuals[rows]
    return lambda rng, draws: rng.standard_normal((draws, runs)) @ grown


SAME_BUDGET, SAME_SIZE = 0.02, 1e-6
"""Relative gaps up to which FLOPs are one budget, and FLOPs per token those of one model."""


def budget_codes(flops: Sequence[float] | Floats) -> NDArray[np.int64]:
    """Return the number of each point's budget, ascending; a gap of more than 2 % begins another budget."""
    return _codes(flops, SAME_BUDGET)


def size_codes(flops_per_token: Sequence[float] | Floats) -> NDArray[np.int64]:
    """Return the number of each point's model size, ascending; sizes differ by more than rounding."""
    return _codes(flops_per_token, SAME_SIZE)


def cell_codes(flops_per_token: Sequence[float], flops: Sequence[float]) -> list[tuple[int, int]]:
    """Return the numbers of each point's size and budget."""
    return list(zip(size_codes(flops_per_token).tolist(), budget_codes(flops).tolist(), strict=True))


def _codes(values: Sequence[float] | Floats, gap: float) -> NDArray[np.int64]:
    found = np.asarray(values, dtype=float)
    order = np.argsort(found, kind="stable")
    codes = np.zeros(len(found), dtype=np.int64)
    codes[order[1:]] = np.cumsum(np.diff(np.log(found[order])) > np.log1p(gap))
    return codes
