"""The three fits of a scaling law: power laws, loss surfaces, and hyperbolas of batch against steps.

Each returns a `Fit`: estimates, standard errors and intervals by name, the evidence of convergence, and the draws that
the intervals come from. `groups` names the run of each point; intervals come from resampling whole runs.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from scipy import optimize, stats

from megadiff.scaling.resampling import (
    CLOSED_FORM,
    LEVEL,
    Convergence,
    Fit,
    FitError,
    Floats,
    as_points,
    group_codes,
    least_squares,
    linear_fit,
    spread_interval,
    t_width,
)

Groups = Sequence[Any] | NDArray[Any] | None


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


_ONE_SIGMA = float(stats.norm.cdf(-1))


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
    return theta[best], _judged(bool(is_done[best]), len(starts), agreeing, float(cost[best]))


def _judged(is_converged: bool, starts: int, agreeing: int, objective: float, why: str = "") -> Convergence:
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


_SURFACE = ("E", "A", "B", "alpha", "beta")
_STARTS = tuple(itertools.product((0.1, 0.3, 0.6), (0.1, 0.3, 0.6), (0.2, 0.5, 0.8), (0.3, 0.7)))
"""Starting points of a surface: alpha, beta, E as a share of the lowest loss, share of the size in the rest."""
_SAME_OBJECTIVE, _SAME_EXPONENT = 1e-4, 0.01
"""Differences of minima that count as the same: relative of the objective, absolute of the exponents."""
_FURTHER = 1e-5
"""Relative decrease that a minimum must not allow; the tolerance that a caller gives does not change it."""


@dataclass(frozen=True)
class Surface(Fit):
    """Loss over size and data, L = E + A n^-alpha + B d^-beta, with estimates of these names.

    `size_exponent` and `data_exponent` are those of the compute-optimal n and d; with C proportional to n d they add up
    to one. `loss_exponent` is that of L - E along them.
    """

    method: str = "lse"
    n_range: tuple[float, float] = (np.nan, np.nan)
    d_range: tuple[float, float] = (np.nan, np.nan)
    held_out: tuple[float, float, float] | None = None
    """The points with the largest n d, left out of a second fit: n d, mean loss, and mean predicted loss."""

    def __getattr__(self, name: str) -> float:
        """Return an estimate, such as `alpha`."""
        estimates = self.__dict__.get("estimates", {})
        if name in estimates:
            return estimates[name]
        raise AttributeError(name)

    def __call__(self, n: Any, d: Any) -> Any:
        """Return the surface's loss."""
        E, A, B, alpha, beta = (self.estimates[name] for name in _SURFACE)
        return E + A * np.asarray(n, dtype=float) ** -alpha + B * np.asarray(d, dtype=float) ** -beta

    def optimum(self, product: float) -> tuple[float, float]:
        """Return the (n, d) of the lowest loss with n d = product; it is C if n is FLOPs per token, or C / 6."""
        _, A, B, alpha, beta = (self.estimates[name] for name in _SURFACE)
        ratio = (alpha * A / (beta * B)) ** (1 / (alpha + beta))
        return ratio * product ** (beta / (alpha + beta)), product ** (alpha / (alpha + beta)) / ratio


def surface(
    n: Any,
    d: Any,
    loss: Any,
    method: Literal["lse", "varpro"] = "lse",
    *,
    groups: Groups = None,
    delta: float = 1e-3,
    tolerance: float = 1e-13,
    level: float = LEVEL,
    draws: int = 1000,
    seed: int = 0,
    hold_out: bool = False,
) -> Surface:
    """Fit L = E + A n^-alpha + B d^-beta.

    Args:
        n: size, as parameters or as FLOPs per token, in any unit.
        d: training tokens, in any unit.
        loss: nats per token.
        method: `lse` minimises the sum of Huber losses of the residuals of log L over a logsumexp, from 54 starts;
            `varpro` minimises squares of L, the linear part solved exactly for each pair of exponents.
        groups: the run of each point; points of one run are resampled together. None: every point is a run.
        delta: Huber's delta of `lse`, in units of log L.
        tolerance: relative decrease at which a descent of `lse` stops.
        level: coverage of the intervals.
        draws: number of resampled sets of runs; 0 for none.
        seed: seed of the resampling.
        hold_out: whether to fit again without the points of the largest n d and predict their loss.

    Raises:
        FitError: there are too few points, fewer than half of the starts agree, or a descent stopped early.
    """
    columns = as_points(n=n, d=d, loss=loss)
    x, y, L = np.log(columns["n"]), np.log(columns["d"]), columns["loss"]
    codes = group_codes(groups, len(L))
    for what, values in (("sizes", x), ("numbers of tokens", y)):
        if len(np.unique(values)) < 3:
            raise FitError(f"a surface needs at least 3 different {what}, found {len(np.unique(values))}")
    if len(L) < 8:
        raise FitError(f"a surface has 5 parameters and needs at least 8 points, found {len(L)}")
    if method not in ("lse", "varpro"):
        raise FitError(f"method is `lse` or `varpro`, found `{method}`")
    centre = x.mean(), y.mean()
    problem = (_LogSumExp if method == "lse" else _VariableProjection)(
        x - centre[0], y - centre[1], L, delta, tolerance
    )
    theta, convergence = problem.fit()
    runs, dof = int(codes.max()) + 1, np.nan
    drawn = np.empty((0, 5))
    if draws:
        drawn, dof = (_redrawn if runs < _FEW_RUNS else _resampled)(problem, theta, codes, draws, seed)
    estimates = _surface_estimates(theta[None], centre)
    spread = _surface_estimates(drawn, centre)
    notes = [f"The intervals rest on {runs} runs."] if runs < _FEW_RUNS else []
    if estimates["E"][0] < 1e-3 * L.min():
        notes.append("The floor E is at zero: this range does not determine it.")
    intervals = {}
    for name, value in estimates.items():
        is_log = name in ("A", "B")
        ends = spread_interval(
            *((np.log(value[0]), np.log(spread[name])) if is_log else (value[0], spread[name])),
            level=level,
            dof=dof,
        )
        intervals[name] = (float(np.exp(ends[0])), float(np.exp(ends[1]))) if is_log else ends
    return Surface(
        estimates={name: float(value[0]) for name, value in estimates.items()},
        standard_errors={name: float(np.nanstd(spread[name])) if draws else np.nan for name in estimates},
        intervals=intervals,
        convergence=convergence,
        draws=spread,
        level=level,
        points=len(L),
        runs=runs,
        dof=dof,
        notes=tuple(notes),
        method=method,
        n_range=(float(columns["n"].min()), float(columns["n"].max())),
        d_range=(float(columns["d"].min()), float(columns["d"].max())),
        held_out=_surface_hold_out(columns, method, delta, tolerance) if hold_out else None,
    )


def _surface_hold_out(
    columns: dict[str, Floats], method: Literal["lse", "varpro"], delta: float, tolerance: float
) -> tuple[float, float, float]:
    """Return (n d, mean loss, mean predicted loss) of the points with the largest n d, within 10 %."""
    product = columns["n"] * columns["d"]
    kept = product < product.max() / 1.1
    rest = surface(
        columns["n"][kept], columns["d"][kept], columns["loss"][kept], method, delta=delta, tolerance=tolerance, draws=0
    )
    predicted = rest(columns["n"][~kept], columns["d"][~kept])
    return float(product.max()), float(columns["loss"][~kept].mean()), float(predicted.mean())


def _surface_estimates(theta: Floats, centre: tuple[float, float]) -> dict[str, Floats]:
    """Return named columns of parameters (log A, log B, log E, alpha, beta) around the centre of the points."""
    a, b, e, alpha, beta = theta.T
    total = alpha + beta
    with np.errstate(all="ignore"):
        return {
            "E": np.exp(e),
            "A": np.exp(a + alpha * centre[0]),
            "B": np.exp(b + beta * centre[1]),
            "alpha": alpha,
            "beta": beta,
            "size_exponent": beta / total,
            "data_exponent": alpha / total,
            "loss_exponent": -alpha * beta / total,
        }


_FEW_RUNS = 20
"""Number of runs below which they are not drawn with replacement: too many draws would lack the outer sizes."""


def _resampled(
    problem: _LogSumExp | _VariableProjection, theta: Floats, codes: NDArray[np.int64], draws: int, seed: int
) -> tuple[Floats, float]:
    """Return the parameters of data sets whose runs are drawn with replacement, [draws, 5], and degrees of freedom."""
    runs, rng = int(codes.max()) + 1, np.random.default_rng(seed)
    counts = np.array(
        [np.bincount(rng.integers(0, runs, runs), minlength=runs)[codes] for _ in range(draws)], dtype=float
    )
    usable = np.array([_is_determined(problem, row) for row in counts])
    found = np.full((draws, 5), np.nan)
    found[usable] = problem.refits(theta, np.tile(problem.target, (int(usable.sum()), 1)), counts[usable])
    return found, float(runs - 5)


def _redrawn(
    problem: _LogSumExp | _VariableProjection, theta: Floats, codes: NDArray[np.int64], draws: int, seed: int
) -> tuple[Floats, float]:
    """Return the parameters of data sets whose runs have redrawn residuals, [draws, 5], and degrees of freedom."""
    predicted, slopes = problem.predict(theta)
    residuals = problem.target - predicted
    noise = _run_noise(residuals, slopes, codes)(np.random.default_rng(seed), draws)
    dof = linear_fit(slopes, residuals, codes, draws=0, seed=seed).dof
    found = problem.refits(theta, predicted + noise, np.ones_like(noise))
    return found, float(dof.min())


def _is_determined(problem: _LogSumExp | _VariableProjection, counts: Floats) -> bool:
    kept = counts > 0
    return len(np.unique(problem.x[kept])) >= 3 and len(np.unique(problem.y[kept])) >= 3 and kept.sum() >= 6


class _LogSumExp:
    """Sum of Huber losses of logsumexp(a - alpha x, b - beta y, e) - log L, in units of delta squared.

    The unit matters: descents stop at a decrease below their tolerance relative to the objective or to 1, whichever is
    larger, and a mean of Huber losses of 1e-6 stops them long before the minimum.
    """

    def __init__(self, x: Floats, y: Floats, loss: Floats, delta: float, tolerance: float) -> None:
        self.x, self.y, self.target = x, y, np.log(loss)
        self.delta, self.tolerance = delta, tolerance

    def value(self, theta: Floats, counts: Floats | None = None) -> tuple[float, Floats]:
        """Return the objective and its gradient."""
        a, b, e, alpha, beta = theta
        terms = np.stack([a - alpha * self.x, b - beta * self.y, np.full_like(self.x, e)])
        top = terms.max(axis=0)
        shares = np.exp(terms - top)
        total = shares.sum(axis=0)
        shares /= total
        r = (top + np.log(total) - self.target) / self.delta
        size = np.abs(r)
        part = np.where(size <= 1, 0.5 * r * r, size - 0.5)
        slope = np.clip(r, -1, 1)
        if counts is not None:
            part, slope = part * counts, slope * counts
        weighted = shares * (slope / self.delta)
        sums = weighted.sum(axis=1)
        return float(part.sum()), np.array([*sums, -(weighted[0] @ self.x), -(weighted[1] @ self.y)])

    def fit(self) -> tuple[Floats, Convergence]:
        """Return the minimum over all starts.

        Raises:
            FitError: fewer than half of the starts agree, or the best of them stopped early.
        """
        low, mean = np.exp(self.target.min()), np.exp(self.target).mean()
        ends = []
        for alpha, beta, share, split in _STARTS:
            rest = mean - share * low
            start = np.array([np.log(split * rest), np.log((1 - split) * rest), np.log(share * low), alpha, beta])
            ends.append(self._descend(start, self.tolerance))
        best = min(ends, key=lambda end: end[1])
        polished, objective = self._descend_whitened(best[0], None)
        gain = (best[1] - objective) / max(best[1], 1e-300)
        if gain > _FURTHER and objective > 1e-9 * len(self.x):
            raise FitError(
                f"the descent stopped early: its objective falls by {100 * gain:.2g} % with a tighter tolerance than "
                f"{self.tolerance:g}; give a smaller one"
            )
        agreeing = sum(_is_same(end, (best[0], best[1])) for end in ends)
        return polished, _judged(True, len(ends), agreeing, objective * self.delta**2)

    def refits(self, theta: Floats, targets: Floats, counts: Floats) -> Floats:
        """Return the minima near `theta` for other targets, each point counted `counts` times, [draws, 5]."""
        kept, found = self.target, np.empty((len(targets), 5))
        for row, (target, count) in enumerate(zip(targets, counts, strict=True)):
            self.target = target
            found[row] = self._descend_whitened(theta, count)[0]
        self.target = kept
        return found

    def predict(self, theta: Floats) -> tuple[Floats, Floats]:
        """Return the predicted log losses and their derivatives, [n] and [n, 5]."""
        terms = np.stack([theta[0] - theta[3] * self.x, theta[1] - theta[4] * self.y, np.full_like(self.x, theta[2])])
        top = terms.max(axis=0)
        shares = np.exp(terms - top)
        total = shares.sum(axis=0)
        shares /= total
        return top + np.log(total), np.stack([*shares, -shares[0] * self.x, -shares[1] * self.y], axis=1)

    def _descend(self, start: Floats, tolerance: float) -> tuple[Floats, float]:
        options = {"maxiter": 3000, "maxfun": 6000, "ftol": tolerance, "gtol": 1e-9 if tolerance < 1e-9 else tolerance}
        with np.errstate(all="ignore"):
            found = optimize.minimize(self.value, start, jac=True, method="L-BFGS-B", options=options)
        return found.x, float(found.fun)

    def _descend_whitened(self, theta: Floats, counts: Floats | None) -> tuple[Floats, float]:
        """Return the end of a descent in coordinates in which all directions bend about the same at `theta`."""
        predicted, slopes = self.predict(theta)
        J, r = slopes / self.delta, np.abs(predicted - self.target) / self.delta
        weights = 1 / np.maximum(r, 1.0) * (1.0 if counts is None else counts)
        gram = (J * weights[:, None]).T @ J
        gram += np.diag(1e-9 * np.diag(gram) + 1e-12)
        try:
            out = np.linalg.inv(np.linalg.cholesky(gram)).T
        except np.linalg.LinAlgError:
            out = np.diag(1 / np.sqrt(np.diag(gram)))

        def value(z: Floats) -> tuple[float, Floats]:
            objective, gradient = self.value(theta + out @ z, counts)
            return objective, out.T @ gradient

        options = {"maxiter": 500, "maxfun": 1000, "ftol": 1e-11, "gtol": 1e-8, "maxcor": 10}
        with np.errstate(all="ignore"):
            found = optimize.minimize(value, np.zeros(5), jac=True, method="L-BFGS-B", options=options)
        return theta + out @ found.x, float(found.fun)


def _is_same(end: tuple[Floats, float], best: tuple[Floats, float]) -> bool:
    is_as_low = end[1] <= best[1] * (1 + _SAME_OBJECTIVE) + 1e-12
    return bool(is_as_low and np.abs(end[0][3:] - best[0][3:]).max() < _SAME_EXPONENT)


class _VariableProjection:
    """Sum of squares of L - E - a e^(-alpha x) - b e^(-beta y), with the best non-negative (E, a, b) for exponents."""

    def __init__(self, x: Floats, y: Floats, loss: Floats, delta: float, tolerance: float) -> None:
        self.x, self.y, self.target = x, y, loss

    def profile(self, exponents: Floats) -> tuple[float, Floats]:
        """Return the sum of squares and (E, a, b) for one pair of exponents."""
        alpha, beta = exponents
        if not (0 < alpha < 5 and 0 < beta < 5):
            return np.inf, np.zeros(3)
        basis = np.stack([np.ones_like(self.x), np.exp(-alpha * self.x), np.exp(-beta * self.y)])
        gram, right = basis @ basis.T, basis @ self.target
        linear = _non_negative(gram, right)
        residual = self.target - linear @ basis
        return float(residual @ residual), linear

    def fit(self) -> tuple[Floats, Convergence]:
        """Return the minimum: a grid of exponents, then a descent from 16 starts and from the best of the grid.

        Raises:
            FitError: fewer than half of the starts agree.
        """
        grid = np.linspace(0.04, 1.2, 30)
        table = np.array([[self.profile(np.array([a, b]))[0] for b in grid] for a in grid])
        row, column = np.unravel_index(int(np.argmin(table)), table.shape)
        starts = [np.array([grid[row], grid[column]])]
        starts += [np.array(pair) for pair in itertools.product((0.1, 0.3, 0.5, 0.8), repeat=2)]
        ends = [self._descend(start) for start in starts]
        best = min(ends, key=lambda end: end[1])
        negligible = 1e-9 * float(((self.target - self.target.mean()) ** 2).sum())
        agreeing = sum(
            end[1] <= best[1] * (1 + _SAME_OBJECTIVE) + negligible and np.abs(end[0] - best[0]).max() < _SAME_EXPONENT
            for end in ends
        )
        return self._theta(best[0]), _judged(True, len(starts), int(agreeing), best[1])

    def predict(self, theta: Floats) -> tuple[Floats, Floats]:
        """Return the predicted losses and their derivatives, [n] and [n, 5]."""
        a, b = np.exp(theta[0] - theta[3] * self.x), np.exp(theta[1] - theta[4] * self.y)
        floor = np.full_like(a, np.exp(theta[2]))
        return a + b + floor, np.stack([a, b, floor, -a * self.x, -b * self.y], axis=1)

    def refits(self, theta: Floats, targets: Floats, counts: Floats) -> Floats:
        """Return the minima near `theta` for other targets, each point counted `counts` times, [draws, 5]."""

        def model(many: Floats) -> tuple[Floats, Floats]:
            with np.errstate(all="ignore"):
                a = np.exp(many[:, :1] - many[:, 3:4] * self.x)
                b = np.exp(many[:, 1:2] - many[:, 4:5] * self.y)
                floor = np.exp(np.broadcast_to(many[:, 2:3], a.shape))
                return a + b + floor, np.stack([a, b, floor, -a * self.x, -b * self.y], axis=2)

        start = np.maximum(theta, [-30, -30, -12, 0.001, 0.001])  # a term at zero has no slope to return by
        return least_squares(model, targets, np.tile(start, (len(targets), 1)), weights=counts)[0]

    def _descend(self, start: Floats) -> tuple[Floats, float]:
        scale = max(self.profile(start)[0], 1e-300)
        simplex = start + np.array([[0.0, 0.0], [0.03, 0.0], [0.0, 0.03]])
        found = optimize.minimize(
            lambda pair: self.profile(pair)[0] / scale,
            start,
            method="Nelder-Mead",
            options={"xatol": 1e-7, "fatol": 1e-13, "maxiter": 800, "initial_simplex": simplex},
        )
        return found.x, float(found.fun * scale)

    def _theta(self, exponents: Floats) -> Floats:
        E, a, b = np.maximum(self.profile(exponents)[1], 1e-300)
        return np.array([np.log(a), np.log(b), np.log(E), *exponents])


_SUBSETS = [list(rows) for count in (2, 1) for rows in itertools.combinations(range(3), count)]


def _non_negative(gram: Floats, right: Floats) -> Floats:
    """Return the non-negative minimum of b' gram b / 2 - right' b in three dimensions, by its active sets."""
    try:
        found = np.linalg.solve(gram, right)
        if (found >= 0).all():
            return np.asarray(found, dtype=float)
    except np.linalg.LinAlgError:
        pass
    best, lowest = np.zeros(3), 0.0
    for rows in _SUBSETS:
        try:
            part = np.linalg.solve(gram[np.ix_(rows, rows)], right[rows])
        except np.linalg.LinAlgError:
            continue
        if (part >= 0).all() and (value := -0.5 * float(right[rows] @ part)) < lowest:
            best, lowest = np.zeros(3), value
            best[rows] = part
    return best


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


_EXCESS = 1.2


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
    noise = _run_noise(log_s - predicted, slopes, codes)
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


def _run_noise(residuals: Floats, slopes: Floats, codes: NDArray[np.int64]) -> Any:
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
        values, vectors = np.linalg.eigh(keep[np.ix_(rows, rows)])
        root = np.where(values > 1e-9, 1 / np.sqrt(np.maximum(values, 1e-9)), 0.0)
        grown[code, rows] = (vectors * root) @ vectors.T @ residuals[rows]
    return lambda rng, draws: rng.standard_normal((draws, runs)) @ grown


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
    return theta[best], _judged(bool(is_done[best]), len(starts), agreeing, float(cost[best]))


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
