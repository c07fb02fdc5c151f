"""Figures of batch, learning rate and cooldowns."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from megadiff.scaling.batch_laws import Cell, IsoLoss
from megadiff.scaling.figure_style import QUIET, ordered, series
from megadiff.scaling.fit import SlopesByGroup
from megadiff.scaling.fit_results import NoiseFits, Results

_PANELS = 4
"""Largest number of model sizes with a panel of their own."""


def hyperbolas(figure: Any, fits: NoiseFits) -> None:
    """Draw steps against batch at equal loss, a panel a size, with the points of fewest tokens."""
    by_size: dict[str, list[IsoLoss]] = {}
    for found in fits.batches.iso_losses:
        by_size.setdefault(found.size, []).append(found)
    names = list(by_size)
    if len(names) > _PANELS:
        names = [names[place] for place in np.unique(np.linspace(0, len(names) - 1, _PANELS).round().astype(int))]
    panels = figure.subplots(1, len(names), sharey=True, squeeze=False)[0]
    for axes, name in zip(panels, names, strict=True):
        own = by_size[name]
        for place, found in enumerate(own):
            colour = ordered(place, len(own))
            axes.plot(found.steps, found.batches, "o", color=colour, ms=4, label=f"{found.loss:.3f}")
            batch = np.geomspace(min(found.batches) / 1.5, max(found.batches) * 1.5, 120)
            steps = found.fit.steps(batch)
            seen = np.isfinite(steps) & (steps < 3 * max(found.steps))
            axes.plot(steps[seen], batch[seen], color=colour, lw=1.1)
            beyond = found.fit.estimates["critical_batch"]
            if min(found.batches) / 1.5 <= beyond <= max(found.batches) * 1.5:
                axes.plot([found.fit.steps(beyond)], [beyond], "s", color=colour, mfc="none", ms=6)
        inside = [found.fit.estimates for found in own if found.fit.is_inside]
        axes.plot([e["s_opt"] for e in inside], [e["b_opt"] for e in inside], "*", color="black", ms=8)
        if (law := fits.batches.token_optimal) is not None:
            tokens = np.geomspace(*law.x_range, 20)
            axes.plot(tokens / law(tokens), law(tokens), color="black", lw=1.2)
        axes.set(xscale="log", yscale="log", xlabel="steps", title=name)
        axes.legend(fontsize="x-small", title="loss", loc="upper right")
    panels[0].set_ylabel("batch, tokens")


def batch_and_rate(figure: Any, fits: NoiseFits) -> None:
    """Draw the best batch over tokens and the best rate over the batch, a line a size and one for all."""
    left, right = figure.subplots(1, 2)
    found = fits.batches
    estimator = "vertex" if "vertex" in found.batch or "vertex" in found.rate else "best_run"
    is_vertex = estimator == "vertex"
    batches = [(cell, cell.tokens, cell.batch_vertex if is_vertex else cell.batch) for cell in found.cells]
    rates = [
        (cell, batch, rate)
        for cell, _, batch in batches
        if (rate := cell.rate_vertex if is_vertex else cell.rate) is not None
    ]
    _by_size(left, batches, found.batch.get(estimator))
    left.set(xlabel="D, tokens", ylabel="B*, tokens", title="best batch")
    _by_size(right, rates, found.rate.get(estimator))
    right.set(xlabel="B*, tokens", ylabel="best base learning rate", title="best learning rate")


def _by_size(axes: Any, rows: Sequence[tuple[Cell, float, float]], slopes: SlopesByGroup | None) -> None:
    axes.set(xscale="log", yscale="log")
    names = list(dict.fromkeys(cell.size for cell, _, _ in rows))
    for place, name in enumerate(names):
        own = [(x, y) for cell, x, y in rows if cell.size == name]
        x, y = np.array(own).T
        colour = ordered(place, len(names))
        law = None if slopes is None else slopes.by.get(name)
        label = name if law is None else f"{name}: {law.exponent:.3f}"
        axes.plot(x, y, "o", color=colour, ms=4, label=label)
        if law is not None:
            ends = np.array([x.min(), x.max()])
            axes.plot(ends, law(ends), color=colour, lw=1)
    if slopes is not None:
        ends = np.array(slopes.pooled.x_range)
        same = "" if np.isnan(slopes.p_value) else f"\none slope: p = {slopes.p_value:.2g}"
        axes.plot(ends, slopes.pooled(ends), color="black", lw=1.4, label=f"all: {slopes.pooled.exponent:.3f}{same}")
    if rows:
        axes.legend(fontsize="x-small", loc="center left", bbox_to_anchor=(1.0, 0.5))
    else:
        axes.text(0.5, 0.5, "not varied", transform=axes.transAxes, ha="center", color=QUIET)


def noise_scales(figure: Any, results: Results) -> None:
    """Draw the measured gradient noise scales over tokens, with their errors, laws and the laws of the best batch."""
    axes = figure.subplots()
    for place, fits in enumerate(results.noises):
        own = [scale for scale in results.gathered.noise_scales if scale.noise == fits.noise]
        if not own:
            continue
        x, y = np.array([(scale.tokens, scale.scale) for scale in own]).T
        errors = np.nan_to_num([scale.stderr for scale in own])
        low = np.minimum(errors, 0.9 * y)
        axes.errorbar(x, y, yerr=np.array([low, errors]), fmt="o", ms=3, lw=0.8, color=series(place), label=fits.noise)
        ends = np.array([x.min(), x.max()])
        if fits.noise_scale is not None:
            law = fits.noise_scale
            axes.plot(ends, law(ends), color=series(place), lw=1.4, label=f"{fits.noise}: D^{law.exponent:.3f}")
        if (slopes := fits.batches.batch.get("vertex")) is not None:
            axes.plot(ends, slopes.pooled(ends), "--", color=series(place), lw=1, label=f"{fits.noise}: best batch")
    axes.set(xscale="log", yscale="log", xlabel="D, tokens", ylabel="noise scale, tokens")
    axes.legend(fontsize="small")


def cooldowns(figure: Any, results: Results) -> None:
    """Draw the ratio of each branch over its tokens, with the mean and interval of each noise."""
    axes = figure.subplots()
    for place, fits in enumerate(results.noises):
        own = [branch for branch in results.gathered.branches if branch.noise == fits.noise]
        if not own:
            continue
        colour = series(place)
        axes.plot([b.tokens for b in own], [b.unannealed / b.annealed for b in own], "o", color=colour, ms=5,
                  label=fits.noise)  # fmt: skip
        if fits.annealing is not None:
            axes.axhline(fits.annealing.estimates["ratio"], color=colour, lw=1.3)
            axes.axhspan(*fits.annealing.intervals["ratio"], color=colour, alpha=0.15, lw=0)
    axes.set(xscale="log", xlabel="D, tokens", ylabel="loss without over with a cooldown")
    axes.legend(fontsize="small")
