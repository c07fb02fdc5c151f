"""IsoFLOP bowls: at each compute budget a parabola of log loss over log size, whose vertices give the optimal laws.

One run usually serves several budgets, so an unlucky run pulls all bowls the same way. The residuals of the bowls give
the covariance of a run's luck between budgets; whole runs are redrawn from it, and all bowls and laws fitted again.

The same points are also fitted by a single bowl: one curvature for all budgets, and vertices that lie on a power law.
With budgets b, x = log size and c_b = log FLOPs,

    log L = h_b + k/2 (x - m_0 - m_1 c_b)^2 = a_b - (u + v c_b) x + k/2 x^2,    m_0 = u/k,  m_1 = v/k

is linear in (a_b, u, v, k), so B budgets need B + 3 parameters instead of 3 B. Where the points allow that form, which
a test says, its exponents are sharper.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from megadiff.scaling.fit import PowerLaw, power_law_from_draws
from megadiff.scaling.resampling import (
    LEVEL,
    SAME_SIZE,
    FitError,
    Floats,
    as_points,
    budget_codes,
    group_codes,
    spread_interval,
    t_width,
)

_NEAR_SIZE = 0.05
"""Relative difference up to which FLOPs per token are one size of a bowl."""
_ROUNDING = 1e-9
"""Relative difference up to which ratios of squares are equal: where a run has one luck for all budgets, all are."""
MIN_SIZES, GOOD_SIZES, MIN_BUDGETS = 3, 5, 3


class Bowls:
    """The design of a sweep, runs by budgets, with the linear algebra of its parabolas.

    Args:
        log_flops: logarithms of the budgets, [budgets].
        log_size: logarithm of each run's size, [runs].
        present: whether a run has a loss at a budget, [runs, budgets].
    """

    def __init__(self, log_flops: Floats, log_size: Floats, present: NDArray[np.bool_]) -> None:
        self.log_flops, self.log_size, self.present = log_flops, log_size, present
        self.rows = [np.flatnonzero(column) for column in present.T]
        self.centres = np.array([log_size[rows].mean() if len(rows) else 0.0 for rows in self.rows])
        self.sizes = [_different(log_size[rows]) for rows in self.rows]
        self.designs = [
            np.vander(log_size[r] - c, 3, increasing=True) for r, c in zip(self.rows, self.centres, strict=True)
        ]
        self.inverses = [
            np.linalg.pinv(X) if n >= MIN_SIZES else None for X, n in zip(self.designs, self.sizes, strict=True)
        ]

    def vertices(self, log_loss: Floats) -> Vertices:
        """Return the vertices of log losses [draws, runs, budgets]."""
        shape = (len(log_loss), len(self.rows))
        place, height, curvature = np.full(shape, np.nan), np.full(shape, np.nan), np.full(shape, np.nan)
        is_inside = np.zeros(shape, dtype=bool)
        for column, (rows, inverse) in enumerate(zip(self.rows, self.inverses, strict=True)):
            if inverse is None:
                continue
            c0, c1, c2 = inverse @ log_loss[:, rows, column].T
            with np.errstate(all="ignore"):
                at = -c1 / (2 * c2)
            place[:, column], height[:, column] = at + self.centres[column], c0 + c1 * at / 2
            curvature[:, column] = 2 * c2
            x = self.log_size[rows]
            is_inside[:, column] = (c2 > 0) & (place[:, column] > x.min()) & (place[:, column] < x.max())
        return Vertices(place, height, curvature, is_inside)

    def lowest(self, log_loss: Floats) -> Vertices:
        """Return the best run of each budget in place of the vertex: the envelope of all runs."""
        seen = np.where(self.present[None], log_loss, np.inf)
        best = seen.argmin(axis=1)
        height = np.take_along_axis(seen, best[:, None], axis=1)[:, 0]
        is_inside = np.isfinite(height) & (np.array(self.sizes) >= MIN_SIZES)
        return Vertices(self.log_size[best], height, np.full_like(height, np.nan), is_inside)

    def single(self, log_loss: Floats) -> tuple[Vertices, Floats]:
        """Return the vertices of a single bowl that moves with compute, and its residuals [draws, points].

        Budgets with two sizes or more take part, whether or not a bowl of their own would have a vertex. Log losses are
        [draws, runs, budgets].
        """
        run, budget = np.nonzero(self.present & (np.array(self.sizes) > 1))
        mean_flops, mean_size = self.log_flops.mean(), self.log_size.mean()
        c, x = self.log_flops - mean_flops, self.log_size[run] - mean_size
        count = len(c)
        design = np.zeros((len(run), count + 3))
        design[np.arange(len(run)), budget] = 1.0
        design[:, count:] = np.column_stack([-x, -x * c[budget], x**2 / 2])
        values = log_loss[:, run, budget]
        found = values @ np.linalg.pinv(design).T
        u, v, k = (found[:, place, None] for place in range(count, count + 3))
        with np.errstate(all="ignore"):
            at = (u + v * c) / k
        is_used = np.isin(np.arange(count), budget)
        vertices = Vertices(
            log_size=np.where(is_used, at + mean_size, np.nan),
            log_loss=np.where(is_used, found[:, :count] - k * at**2 / 2, np.nan),
            curvature=np.where(is_used, k, np.nan),
            is_inside=np.broadcast_to(is_used & (k > 0), at.shape),
        )
        return vertices, values - found @ design.T

    def residuals(self, log_loss: Floats) -> tuple[Floats, Floats]:
        """Return fitted log losses and residuals, both of the shape of `log_loss`, [runs, budgets] or draws of it; NaN
        where a run has no loss or no parabola."""
        fitted = np.full(log_loss.shape, np.nan)
        for column, (rows, X, inverse) in enumerate(zip(self.rows, self.designs, self.inverses, strict=True)):
            if inverse is not None:
                fitted[..., rows, column] = log_loss[..., rows, column] @ inverse.T @ X.T
        return fitted, log_loss - fitted

    @property
    def freedom(self) -> int:
        """Number of points that the bowls with a parabola of their own leave beyond its three parameters."""
        return sum(len(rows) - 3 for rows, inverse in zip(self.rows, self.inverses, strict=True) if inverse is not None)

    def squares(self, log_loss: Floats) -> Floats:
        """Return the sum of the squared residuals of the bowls, [draws], for log losses [draws, runs, budgets]."""
        return np.nansum(self.residuals(log_loss)[1] ** 2, axis=(1, 2))

    def noise(self, residuals: Floats) -> tuple[Floats, float]:
        """Return the covariance of a run's luck between budgets [budgets, budgets], and its degrees of freedom.

        The expectation of the product of two budgets' residuals is the covariance times the trace of the product of
        their projections; where few runs are in both, the mean correlation of the other pairs is taken.
        """
        runs, budgets = self.present.shape
        keep = np.zeros((budgets, runs, runs))
        for column, (rows, X, inverse) in enumerate(zip(self.rows, self.designs, self.inverses, strict=True)):
            if inverse is not None:
                keep[column][np.ix_(rows, rows)] = np.eye(len(rows)) - X @ inverse
        seen = np.nan_to_num(residuals)
        traces = np.einsum("cij,dij->cd", keep, keep)
        products = seen.T @ seen
        is_known = np.diag(traces) > 0.5
        if not is_known.any():
            return np.full((budgets, budgets), np.nan), 0.0
        variance = np.full(budgets, np.diag(products)[is_known].sum() / np.diag(traces)[is_known].sum())
        variance[is_known] = np.diag(products)[is_known] / np.diag(traces)[is_known]
        spread = np.sqrt(np.maximum(variance, 1e-300))
        is_pair = (traces > 1.5) & ~np.eye(budgets, dtype=bool)
        scaled = products / np.outer(spread, spread)
        mean = scaled[is_pair].sum() / traces[is_pair].sum() if is_pair.any() else 0.0
        correlation = np.where(is_pair, scaled / np.where(is_pair, traces, 1.0), mean)
        np.fill_diagonal(correlation, 1.0)
        values, vectors = np.linalg.eigh((correlation + correlation.T) / 2)
        correlation = (vectors * np.maximum(values, 0.0)) @ vectors.T
        used = [len(rows) for rows, inverse in zip(self.rows, self.inverses, strict=True) if inverse is not None]
        freedom = sum(np.trace(part) for part in keep) * self.present.any(axis=1).sum() / sum(used)
        return correlation * np.outer(spread, spread), float(freedom)


def _different(log_size: Floats) -> int:
    """Return the number of sizes that differ by more than a few per cent from the next smaller one."""
    return int((np.diff(np.sort(log_size)) > np.log1p(_NEAR_SIZE)).sum()) + 1 if len(log_size) else 0


@dataclass(frozen=True)
class Vertices:
    """Lowest points of bowls, each array [draws, budgets]."""

    log_size: Floats
    log_loss: Floats
    curvature: Floats
    is_inside: NDArray[np.bool_]
    """Whether a vertex counts: curvature positive, and inside the sizes."""


def lines(log_flops: Floats, values: Floats, counted: NDArray[np.bool_]) -> Floats:
    """Return (value at log_flops 0, slope) of the least-squares line through the counted values, [draws, 2].

    A draw with fewer than three counted values has NaN.
    """
    w = counted.astype(float)
    y = np.where(counted, values, 0.0)
    total = np.maximum(w.sum(axis=1), 1.0)
    x_mean, y_mean = (w @ log_flops) / total, y.sum(axis=1) / total
    x = log_flops[None] - x_mean[:, None]
    with np.errstate(all="ignore"):
        slope = (w * x * (y - y_mean[:, None])).sum(axis=1) / (w * x**2).sum(axis=1)
    found = np.column_stack([y_mean - slope * x_mean, slope])
    found[w.sum(axis=1) < MIN_BUDGETS] = np.nan
    return found


def laws_of(log_flops: Floats, found: Vertices) -> dict[str, Floats]:
    """Return the lines of log optimal size, tokens and loss over log FLOPs, each [draws, 2]."""
    return {
        "flops_per_token": lines(log_flops, found.log_size, found.is_inside),
        "tokens": lines(log_flops, log_flops[None] - found.log_size, found.is_inside),
        "loss": lines(log_flops, found.log_loss, found.is_inside),
    }


@dataclass(frozen=True)
class Budget:
    """One bowl."""

    flops: float
    sizes: int
    """Number of different sizes at this budget."""
    size: float
    """Optimal FLOPs per token; NaN if the vertex does not count."""
    size_interval: tuple[float, float]
    tokens: float
    loss: float
    curvature: float
    """Second derivative of log loss over log size at the vertex."""
    coefficients: tuple[float, float, float]
    """Log loss as a polynomial of log size - log `centre`."""
    centre: float
    best_size: float
    """Size of the run with the lowest loss; over a grid it is biased low by the runs' luck."""
    best_loss: float
    excluded: str = ""
    """Reason why the vertex does not count; empty if it does."""


@dataclass(frozen=True)
class LargestBudget:
    """Prediction of the largest budget by laws fitted without it."""

    flops: float
    loss: float
    """Loss at the vertex of the held-out budget."""
    predicted_loss: float
    loss_error_percent: float
    size: float
    predicted_size: float
    is_within: bool
    """Whether both differences lie within their intervals."""


@dataclass(frozen=True)
class SingleBowl:
    """A bowl of one curvature that moves along a power law of size, fitted to all budgets at once."""

    laws: dict[str, PowerLaw]
    """Laws over FLOPs of `flops_per_token`, `tokens` and `loss`; intervals are widened by `misfit`. The vertices lie on
    the laws of size and tokens by construction, so these have no R squared."""
    curvature: float
    """Second derivative of log loss over log size."""
    p_value: float
    """Probability of a misfit at least this large by the luck of runs; NaN without draws or degrees of freedom.

    The luck is that which the budgets' own bowls show, also where the noise of runs is stated.
    """
    misfit: float
    """Spread of the residuals over that around the budgets' own bowls, by degrees of freedom; at least 1, and 1 where
    there are none."""


@dataclass(frozen=True)
class IsoFlop:
    """The optimal laws of a sweep at equal compute."""

    budgets: tuple[Budget, ...]
    laws: dict[str, PowerLaw]
    """Laws over FLOPs through the vertices: `flops_per_token`, `tokens`, `loss`, and `params` where they were given."""
    envelope: dict[str, PowerLaw]
    """The same through the best run of each budget."""
    single: SingleBowl | None
    """The fit by a single bowl; None if its curvature is not positive."""
    run_noise: float
    """Standard deviation of log loss between runs of one size at one budget; NaN if the data leave none."""
    dof: float
    runs: int
    held_out: LargestBudget | None
    notes: tuple[str, ...] = field(default=())

    @property
    def counted(self) -> list[Budget]:
        """Budgets whose vertices count."""
        return [budget for budget in self.budgets if not budget.excluded]

    @property
    def exponents_add_to(self) -> float:
        """Sum of the exponents of size and tokens, 1 if C = M D holds exactly."""
        return self.laws["flops_per_token"].exponent + self.laws["tokens"].exponent

    @property
    def coefficients_multiply_to(self) -> float:
        """Product of the coefficients of size and tokens, 1 if C = M D holds exactly."""
        return self.laws["flops_per_token"].coefficient * self.laws["tokens"].coefficient


def isoflop(
    flops: Any,
    size: Any,
    loss: Any,
    runs: Sequence[Any] | None = None,
    params: Any = None,
    *,
    run_noise: float | None = None,
    level: float = LEVEL,
    draws: int = 1000,
    seed: int = 0,
) -> IsoFlop:
    """Fit a bowl at each budget and power laws through the vertices that count.

    Args:
        flops: budget of each point; budgets within 2 % of each other are one.
        size: FLOPs per token of each point.
        loss: nats per token.
        runs: the run of each point; None: every point is a run of its own.
        params: parameters of each point, for their own law.
        run_noise: standard deviation of log loss between runs, if it is known; None estimates it from the bowls.
        level: coverage of the intervals.
        draws: number of redrawn sweeps.
        seed: seed of the redrawing.

    Raises:
        FitError: fewer than three vertices count; the message names why the others do not.
    """
    columns = as_points(flops=flops, size=size, loss=loss, **({} if params is None else {"params": params}))
    codes = group_codes(runs, len(columns["flops"]))
    bowls, log_loss = _design(columns, codes)
    found, raw = bowls.vertices(log_loss[None]), bowls.lowest(log_loss[None])
    reasons = [_reason(bowls, found, column) for column in range(len(bowls.rows))]
    counted = sum(not reason for reason in reasons)
    if counted < MIN_BUDGETS:
        named = "; ".join(
            f"{np.exp(c):.3g} FLOPs: {reason}" for c, reason in zip(bowls.log_flops, reasons, strict=True) if reason
        )
        raise FitError(f"{counted} of {len(reasons)} budgets have a vertex that counts, and a law needs 3 ({named})")
    fitted, residuals = bowls.residuals(log_loss)
    covariance, dof = bowls.noise(residuals)
    if dof < 1:
        covariance = np.full_like(covariance, np.nan)
    shown = luck = _redrawn_luck(bowls, covariance, draws, seed)
    if run_noise is not None:
        covariance, dof = np.full((len(reasons),) * 2, run_noise**2), np.inf
        luck = _redrawn_luck(bowls, covariance, draws, seed)
    redrawn = np.where(np.isnan(fitted), log_loss, fitted) + luck
    drawn, drawn_raw = bowls.vertices(redrawn), bowls.lowest(redrawn)
    facts = {"dof": dof, "level": level, "runs": int(codes.max()) + 1}
    laws = _laws(bowls, found, drawn, facts)
    if params is not None:
        by_run = np.array([columns["params"][codes == code].mean() for code in range(int(codes.max()) + 1)])
        other = Bowls(bowls.log_flops, np.log(by_run), bowls.present)
        found_p, drawn_p = other.vertices(log_loss[None]), other.vertices(redrawn)
        if int(found_p.is_inside.sum()) >= MIN_BUDGETS:
            laws["params"] = _law(
                other, found_p, found_p.log_size[0], lines(other.log_flops, drawn_p.log_size, drawn_p.is_inside), facts
            )
    budgets = tuple(
        _budget(bowls, found, drawn, raw, log_loss, column, reason, level, dof) for column, reason in enumerate(reasons)
    )
    notes = [f"{budget.flops:.3g} FLOPs: {budget.excluded}" for budget in budgets if budget.excluded]
    thin = [budget for budget in budgets if not budget.excluded and budget.sizes < GOOD_SIZES]
    notes += [f"{budget.flops:.3g} FLOPs: the bowl has only {budget.sizes} sizes" for budget in thin]
    if np.isnan(covariance).any():
        notes.append("no budget has more points than a parabola needs, so there are no intervals; state the run noise")
    spread = np.sqrt(np.nanmean(np.diag(covariance))) if np.isfinite(covariance).any() else np.nan
    return IsoFlop(
        budgets=budgets,
        laws=laws,
        envelope=_laws(bowls, raw, drawn_raw, facts),
        single=_single(bowls, log_loss, redrawn, shown, facts),
        run_noise=float(spread),
        dof=dof,
        runs=facts["runs"],
        held_out=_hold_out(bowls.log_flops, found, drawn, level, dof) if counted > MIN_BUDGETS else None,
        notes=tuple(notes),
    )


def _design(columns: dict[str, Floats], codes: NDArray[np.int64]) -> tuple[Bowls, Floats]:
    """Return the bowls, and log losses [runs, budgets] with NaN where a run has none.

    Raises:
        FitError: a run has two sizes, or two losses at one budget.
    """
    budgets = budget_codes(columns["flops"])
    runs, count = int(codes.max()) + 1, int(budgets.max()) + 1
    log_loss, log_size = np.full((runs, count), np.nan), np.empty(runs)
    for run in range(runs):
        sizes = np.log(columns["size"][codes == run])
        if np.ptp(sizes) > SAME_SIZE:
            raise FitError(f"run number {run} has sizes from {np.exp(sizes.min()):g} to {np.exp(sizes.max()):g}")
        log_size[run] = sizes[0]
    for run, budget, value in zip(codes, budgets, np.log(columns["loss"]), strict=True):
        if not np.isnan(log_loss[run, budget]):
            raise FitError(
                f"run number {run} has two losses at a budget of about {columns['flops'][codes == run][0]:.3g}"
            )
        log_loss[run, budget] = value
    log_flops = np.array([np.log(columns["flops"][budgets == budget]).mean() for budget in range(count)])
    return Bowls(log_flops, log_size, ~np.isnan(log_loss)), log_loss


def _reason(bowls: Bowls, found: Vertices, column: int) -> str:
    sizes = bowls.sizes[column]
    if sizes < MIN_SIZES:
        return f"{'two-point' if sizes == 2 else 'one-point'}: a parabola needs 3 sizes, found {sizes}"
    if not found.curvature[0, column] > 0:
        return "the curvature is not positive"
    if not found.is_inside[0, column]:
        x = bowls.log_size[bowls.rows[column]]
        side = "smallest" if found.log_size[0, column] <= x.min() else "largest"
        return f"edge optimum: the vertex lies beyond the {side} size"
    return ""


def _redrawn_luck(bowls: Bowls, covariance: Floats, draws: int, seed: int) -> Floats:
    """Return what luck adds to the log losses of redrawn runs, [draws, runs, budgets]; no draw of a NaN covariance."""
    runs, budgets = bowls.present.shape
    if np.isnan(covariance).any():
        return np.empty((0, runs, budgets))
    values, vectors = np.linalg.eigh(covariance)
    root = vectors * np.sqrt(np.maximum(values, 0.0))
    return np.random.default_rng(seed).standard_normal((draws, runs, budgets)) @ root.T


def _laws(bowls: Bowls, found: Vertices, drawn: Vertices, facts: dict[str, Any]) -> dict[str, PowerLaw]:
    values = {
        "flops_per_token": found.log_size[0], "tokens": bowls.log_flops - found.log_size[0], "loss": found.log_loss[0]
    }  # fmt: skip
    spread = laws_of(bowls.log_flops, drawn)
    return {name: _law(bowls, found, value, spread[name], facts) for name, value in values.items()}


def _single(bowls: Bowls, log_loss: Floats, redrawn: Floats, luck: Floats, facts: dict[str, Any]) -> SingleBowl | None:
    """Return the fit by a single bowl.

    Args:
        log_loss: [runs, budgets].
        redrawn: log losses of redrawn runs, [draws, runs, budgets], which give the intervals.
        luck: redrawn residuals alone, [draws, runs, budgets], which the misfit is judged by. Only ratios of their
            squares are used, so how one run's luck differs between budgets is what counts; a stated noise does not
            tell that.
    """
    found, residuals = bowls.single(log_loss[None])
    is_used = found.is_inside[0]
    if is_used.sum() < MIN_BUDGETS:
        return None
    drawn = bowls.single(redrawn)[0]
    free, misfit, p_value = residuals.shape[1] - int(is_used.sum()) - 3, 1.0, np.nan
    own_squares = bowls.squares(log_loss[None])[0]
    if min(free, bowls.freedom) > 0 and own_squares > 0:
        ratio = (residuals[0] ** 2).sum() / own_squares
        misfit = max(1.0, float(np.sqrt(ratio * bowls.freedom / free)))
        if len(luck):
            ratios = (bowls.single(luck)[1] ** 2).sum(axis=1) / bowls.squares(luck)
            p_value = float((1 + (ratios >= ratio * (1 - _ROUNDING)).sum()) / (1 + len(ratios)))

    def widened(own: Floats, draws: Floats) -> Floats:
        return own + misfit * (draws - own)

    wider = Vertices(
        widened(found.log_size, drawn.log_size),
        widened(found.log_loss, drawn.log_loss),
        drawn.curvature,
        drawn.is_inside,
    )
    laws = _laws(bowls, found, wider, facts)
    for name in ("flops_per_token", "tokens"):
        laws[name] = replace(laws[name], r_squared=np.nan)
    return SingleBowl(laws, float(found.curvature[0, is_used][0]), p_value, misfit)


def _law(bowls: Bowls, found: Vertices, values: Floats, drawn: Floats, facts: dict[str, Any]) -> PowerLaw:
    counted = found.is_inside
    line = lines(bowls.log_flops, values[None], counted)[0]
    x, y = bowls.log_flops[counted[0]], values[counted[0]]
    residual, variance = y - line[0] - line[1] * x, ((y - y.mean()) ** 2).sum()
    return power_law_from_draws(
        float(line[0]),
        float(line[1]),
        drawn[np.isfinite(drawn).all(axis=1)],
        points=len(x),
        x_range=(float(np.exp(x.min())), float(np.exp(x.max()))),
        r_squared=float(1 - residual @ residual / variance) if variance > 0 else np.nan,
        **facts,
    )


def _budget(
    bowls: Bowls, found: Vertices, drawn: Vertices, raw: Vertices, log_loss: Floats, column: int, reason: str,
    level: float, dof: float,
) -> Budget:  # fmt: skip
    rows, inverse = bowls.rows[column], bowls.inverses[column]
    c = tuple(map(float, inverse @ log_loss[rows, column])) if inverse is not None else (np.nan,) * 3
    size = float(np.exp(found.log_size[0, column])) if not reason else np.nan
    ends = (np.nan, np.nan)
    if not reason:
        inside = np.where(drawn.is_inside[:, column], drawn.log_size[:, column], np.nan)
        low, high = spread_interval(float(found.log_size[0, column]), inside, level=level, dof=dof)
        ends = float(np.exp(low)), float(np.exp(high))
    flops = float(np.exp(bowls.log_flops[column]))
    return Budget(
        flops=flops,
        sizes=bowls.sizes[column],
        size=size,
        size_interval=ends,
        tokens=flops / size,
        loss=float(np.exp(found.log_loss[0, column])) if not reason else np.nan,
        curvature=float(found.curvature[0, column]),
        coefficients=(c[0], c[1], c[2]),
        centre=float(np.exp(bowls.centres[column])),
        best_size=float(np.exp(raw.log_size[0, column])),
        best_loss=float(np.exp(raw.log_loss[0, column])),
        excluded=reason,
    )


def _hold_out(log_flops: Floats, found: Vertices, drawn: Vertices, level: float, dof: float) -> LargestBudget:
    last = int(np.flatnonzero(found.is_inside[0])[-1])
    is_within = True
    predicted = {}
    for name in ("log_loss", "log_size"):
        differences = []
        for vertices in (found, drawn):
            values, counted = getattr(vertices, name), vertices.is_inside.copy()
            counted[:, last] = False
            line = lines(log_flops, values, counted)
            guess = line[:, 0] + line[:, 1] * log_flops[last]
            predicted.setdefault(name, float(guess[0]) if len(guess) else np.nan)
            differences.append(np.where(vertices.is_inside[:, last], values[:, last] - guess, np.nan))
        spread = float(np.nanstd(differences[1])) if len(differences[1]) else np.nan
        is_within &= bool(abs(differences[0][0]) <= t_width(level, dof) * spread)
    loss, guess = float(np.exp(found.log_loss[0, last])), float(np.exp(predicted["log_loss"]))
    return LargestBudget(
        flops=float(np.exp(log_flops[last])),
        loss=loss,
        predicted_loss=guess,
        loss_error_percent=100 * (guess / loss - 1),
        size=float(np.exp(found.log_size[0, last])),
        predicted_size=float(np.exp(predicted["log_size"])),
        is_within=is_within,
    )
