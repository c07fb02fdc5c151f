"""Fits of the loss as a surface over model size and tokens: by log-sum-exp, or by variable projection."""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from scipy import optimize

from megadiff.scaling.resampling import (
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
)

_SURFACE = ("E", "A", "B", "alpha", "beta")
_STARTS = tuple(itertools.product((0.1, 0.3, 0.6), (0.1, 0.3, 0.6), (0.2, 0.5, 0.8), (0.3, 0.7)))
"""Starting points of a surface: alpha, beta, E as a share of the lowest loss, share of the size in the rest."""
_SAME_OBJECTIVE, _SAME_EXPONENT = 1e-4, 0.01
"""Differences of minima that count as the same: relative of the objective, absolute of the exponents."""
_FURTHER = 1e-5
"""Relative decrease that a minimum must not allow; the tolerance that a caller gives does not change it."""

_FEW_RUNS = 20
"""Number of runs below which they are not drawn with replacement: too many draws would lack the outer sizes."""

_SUBSETS = [list(rows) for count in (2, 1) for rows in itertools.combinations(range(3), count)]


@dataclass(frozen=True)
class LargestProduct:
    """Losses of the points with the largest n d, predicted by a surface that was fitted without them."""

    product: float
    """The largest n d, which is the compute if n is FLOPs per token; points within 10 % of it are left out."""
    points: int
    """Number of points left out."""
    loss: float
    """Mean of their losses, nats per token."""
    predicted_loss: float
    """Mean of the losses that the surface of the other points gives at their sizes and tokens."""

    @property
    def loss_error_percent(self) -> float:
        """Return how far the predicted loss lies above the measured one, in per cent."""
        return 100 * (self.predicted_loss / self.loss - 1)


@dataclass(frozen=True)
class Surface(Fit):
    """Loss over size and data, L = E + A n^-alpha + B d^-beta, with estimates of these names.

    `size_exponent` and `data_exponent` are those of the compute-optimal n and d; with C proportional to n d they add up
    to one. `loss_exponent` is that of L - E along them.
    """

    method: str = "lse"
    n_range: tuple[float, float] = (np.nan, np.nan)
    d_range: tuple[float, float] = (np.nan, np.nan)
    held_out: LargestProduct | None = None
    """Prediction of the points with the largest n d; None if it was not wanted or the others determine no surface."""

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
    _check_spread(x, y)
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


def floor_term(floor: float) -> str:
    """Return the floor E with a plus sign, for a formula; nothing for a floor that is as good as zero."""
    return f"{floor:.4g} + " if floor >= 1e-3 else ""


def _check_spread(x: Floats, y: Floats) -> None:
    """Refuse points, [n] logarithms of sizes and tokens, that do not determine a surface."""
    for what, values in (("sizes", x), ("numbers of tokens", y)):
        if len(np.unique(values)) < 3:
            raise FitError(f"a surface needs at least 3 different {what}, found {len(np.unique(values))}")
    if len(x) < 8:
        raise FitError(f"a surface has 5 parameters and needs at least 8 points, found {len(x)}")


def _surface_hold_out(
    columns: dict[str, Floats], method: Literal["lse", "varpro"], delta: float, tolerance: float
) -> LargestProduct | None:
    """Return the prediction of the points with the largest n d, or None if the others determine no surface."""
    product = columns["n"] * columns["d"]
    kept = product < product.max() / 1.1
    n, d, loss = (columns[name] for name in ("n", "d", "loss"))
    try:
        rest = surface(n[kept], d[kept], loss[kept], method, delta=delta, tolerance=tolerance, draws=0)
    except FitError:
        return None
    predicted = rest(n[~kept], d[~kept])
    return LargestProduct(float(product.max()), int((~kept).sum()), float(loss[~kept].mean()), float(predicted.mean()))


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
    noise = run_noise(residuals, slopes, codes)(np.random.default_rng(seed), draws)
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
        return polished, judged(True, len(ends), agreeing, objective * self.delta**2)

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
        return self._theta(best[0]), judged(True, len(starts), int(agreeing), best[1])

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
