"""Fits of hyperbolas of batch against steps at equal loss, and their critical batch."""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from typing import Any

import numpy as np

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
