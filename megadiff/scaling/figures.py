"""Figures of scaling fits as PNG, SVG and PDF files, and as SVG for a page that is read in light and in dark."""

from __future__ import annotations

import colorsys
import io
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from megadiff.scaling.batch_laws import Cell, IsoLoss
from megadiff.scaling.comparisons import speed_up
from megadiff.scaling.fit import PowerLaw, SlopesByGroup
from megadiff.scaling.fit_results import Comparison, NoiseFits, Results
from megadiff.scaling.flops import FlopCount
from megadiff.scaling.isoflop import Budget
from megadiff.scaling.laws import LawBook, Quantity
from megadiff.scaling.points import BEATEN, Point
from megadiff.scaling.resampling import FitError, Floats
from megadiff.scaling.surface_fit import floor_term

SERIES = ("#0072b2", "#d55e00", "#007a5a", "#b2589a", "#9a6a00", "#444444")
"""Colours of series, in the order of a report's palette on white paper."""
QUIET = "#5c6370"
"""Colour of what stands back: grid, ranges, remarks."""


def series(place: int) -> str:
    """Return the colour of a series; colours repeat after the sixth."""
    return SERIES[place % len(SERIES)]


def ordered(place: int, count: int) -> tuple[float, float, float]:
    """Return the colour of one of several ordered things: from blue to red, all about equally bright."""
    share = place / max(count - 1, 1)
    red, green, blue = colorsys.hls_to_rgb(0.60 + 0.42 * share, 0.52, 0.70)
    brightness = 0.2126 * red**2.2 + 0.7152 * green**2.2 + 0.0722 * blue**2.2
    factor = (0.21 / brightness) ** (1 / 2.2)
    return min(1.0, red * factor), min(1.0, green * factor), min(1.0, blue * factor)


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


_LAWS: dict[Quantity, str] = {
    "flops_per_token": "M*, FLOPs per token",
    "tokens": "D*, tokens",
    "loss": "L*, nats per token",
}
_REACH = 10.0
"""Factor of compute beyond the largest budget up to which laws are drawn."""


def bowls(figure: Any, fits: NoiseFits) -> None:
    """Draw the losses of each budget over size with their parabola, its vertex, and the vertex's interval."""
    assert fits.isoflop is not None
    axes = figure.subplots()
    budgets = fits.isoflop.budgets
    for place, budget in enumerate(budgets):
        _bowl(axes, fits.points, budget, ordered(place, len(budgets)))
    losses = [point.loss for point in fits.counted]
    low, high = min(losses), max(losses)
    axes.set_ylim(low / (high / low) ** 0.06, high * (high / low) ** 0.06)
    axes.set(xscale="log", xlabel="M, FLOPs per token", ylabel="loss, nats per token", title=fits.noise)
    axes.legend(fontsize="x-small", title="C, FLOPs", loc="center left", bbox_to_anchor=(1.0, 0.5))


def _bowl(axes: Any, points: Sequence[Point], budget: Budget, colour: Any) -> None:
    own = [p for p in points if abs(np.log(p.flops / budget.flops)) < 0.02 and p.excluded in ("", BEATEN)]
    for is_beaten, filled in ((False, colour), (True, "none")):
        shown = [p for p in own if bool(p.excluded) == is_beaten]
        size = 10 if is_beaten else 18
        axes.scatter(
            [p.flops_per_token for p in shown], [p.loss for p in shown], s=size, edgecolors=[colour],
            facecolors=filled, linewidths=0.8, label=None if is_beaten else f"{budget.flops:.2g}",
        )  # fmt: skip
    if not own or not np.isfinite(budget.coefficients).all():
        return
    sizes = np.geomspace(min(p.flops_per_token for p in own), max(p.flops_per_token for p in own), 80)
    u = np.log(sizes / budget.centre)
    c0, c1, c2 = budget.coefficients
    style = ":" if budget.excluded else "-"
    axes.plot(sizes, np.exp(np.clip(c0 + c1 * u + c2 * u * u, -50, 50)), style, color=colour, lw=1.2)
    if budget.excluded:
        return
    low, high = budget.size_interval
    if np.isfinite([low, high]).all():
        low, high = max(low, sizes[0] / 1.3), min(high, sizes[-1] * 1.3)
        axes.plot([low, high], [budget.loss] * 2, color="black", lw=1.2, marker="|", ms=7)
    axes.plot([budget.size], [budget.loss], "*", color="black", ms=9)


def laws(
    figure: Any, solved: Sequence[NoiseFits], flop_count: FlopCount = "deepseek", baseline: LawBook | None = None
) -> None:
    """Draw optimal size, tokens and loss over compute, with bands, and what is extrapolated dashed and hollow.

    Args:
        figure: an empty figure.
        solved: fits with laws.
        flop_count: their count of FLOPs.
        baseline: laws to draw beside those of the same noises and count, dotted.
    """
    for axes, (name, label) in zip(figure.subplots(1, 3), _LAWS.items(), strict=True):
        values: list[float] = []
        for place, fits in enumerate(solved):
            assert fits.isoflop is not None
            law, colour = fits.isoflop.laws[name], series(place)
            values += _law(axes, law, colour, f"{fits.noise}: C^{law.exponent:.3f}")
            shown = fits.isoflop.counted
            measured = {"flops_per_token": "size", "tokens": "tokens", "loss": "loss"}[name]
            y = [getattr(budget, measured) for budget in shown]
            axes.plot([budget.flops for budget in shown], y, "o", color=colour, ms=4)
            ahead = law.x_range[1] * np.array([2.0, 4.0, 8.0])
            axes.plot(ahead, law(ahead), "o", color=colour, mfc="none", ms=4)
            values += [*y, *law(ahead)]
            known = None if baseline is None else baseline.law(name, noise=fits.noise, flop_count=flop_count)
            if baseline is not None and known is not None:
                x = np.geomspace(law.x_range[0], law.x_range[1] * _REACH, 40)
                theirs = [known.value(float(at)) for at in x]
                label_of = f"{baseline.file_of(known).name}: C^{known.parameter('alpha'):.3f}"
                axes.plot(x, theirs, ":", color=colour, lw=1.4, label=label_of)
                values += [theirs[0], theirs[-1]]
        axes.set(xscale="log", yscale="log", xlabel="C, FLOPs", ylabel=label)
        axes.set_ylim(min(values) / 1.03, max(values) * 1.03 if name == "loss" else max(values) * 2)
        axes.legend(fontsize="small", loc="upper right" if name == "loss" else "upper left")
        if name == "loss":
            _plain_loss_ticks(axes)


def _law(axes: Any, law: PowerLaw, colour: str, label: str) -> list[float]:
    """Draw a law with its band, dashed beyond its range; return the values at its ends."""
    low, high = law.x_range
    inside, ahead = np.geomspace(low, high, 40), np.geomspace(high, high * _REACH, 20)
    axes.plot(inside, law(inside), color=colour, lw=1.4, label=label)
    axes.plot(ahead, law(ahead), "--", color=colour, lw=1.1)
    x = np.concatenate([inside, ahead])
    ends = np.array([law.interval_at(at) for at in x])
    if np.isfinite(ends).all():
        axes.fill_between(x, ends[:, 0], ends[:, 1], color=colour, alpha=0.18, lw=0)
    return [float(law(low)), float(law(high * _REACH))]


def _plain_loss_ticks(axes: Any) -> None:
    from matplotlib.ticker import ScalarFormatter

    _plain_ticks(axes, np.arange(1.0, 10.0, 0.25), ScalarFormatter())
    low, high = axes.get_ylim()
    if len([tick for tick in axes.get_yticks() if low <= tick <= high]) > 9:
        _plain_ticks(axes, (1.0, 1.5, 2.0, 3.0, 4.0, 5.0, 7.0), ScalarFormatter())


def _plain_ratio_ticks(axes: Any) -> None:
    from matplotlib.ticker import FuncFormatter

    low, high = axes.get_ylim()
    multiples = (1.0, 1.5, 2.0, 3.0, 5.0, 7.0) if high / low < 100 else (1.0, 3.0)
    _plain_ticks(axes, multiples, FuncFormatter(lambda value, _: f"{value:g}"))


def _plain_ticks(axes: Any, multiples: Sequence[float] | Floats, formatter: Any) -> None:
    """Mark multiples of powers of ten on the logarithmic y axis, and write them with a formatter."""
    from matplotlib.ticker import LogLocator, NullFormatter

    axes.yaxis.set_major_locator(LogLocator(base=10, subs=tuple(multiples), numticks=40))
    axes.yaxis.set_major_formatter(formatter)
    axes.yaxis.set_minor_formatter(NullFormatter())


def surface(figure: Any, fits: NoiseFits) -> None:
    """Draw lines of equal loss of the first surface over tokens and size, the points, and the frontier."""
    method, law = next(iter(fits.surfaces.items()))
    axes = figure.subplots()
    counted = fits.counted
    d, m = (np.array([getattr(point, name) for point in counted]) for name in ("tokens", "flops_per_token"))
    x, y = np.geomspace(d.min() / 2, d.max() * 2, 60), np.geomspace(m.min() / 2, m.max() * 2, 60)
    grid = law(*np.meshgrid(y, x, indexing="ij"))
    losses = np.array([point.loss for point in counted])
    lines = axes.contour(x, y, grid, levels=np.geomspace(losses.min() * 0.97, losses.max(), 10), colors=QUIET,
                         linewidths=0.8)  # fmt: skip
    axes.clabel(lines, fmt="%.2f", fontsize="x-small", inline_spacing=2)
    axes.scatter(d, m, s=10, color=series(0), label="runs at budgets")
    budgets = np.geomspace((d * m).min() / 4, (d * m).max() * 4, 30)
    best = np.array([law.optimum(c) for c in budgets])
    axes.plot(best[:, 1], best[:, 0], color="black", lw=1.4, label=f"frontier: M* ~ C^{law.size_exponent:.3f}")
    if fits.isoflop is not None:
        stars = fits.isoflop.counted
        axes.plot([b.tokens for b in stars], [b.size for b in stars], "*", color=series(1), ms=9, ls="none",
                  label="vertices of the bowls")  # fmt: skip
    axes.set(xscale="log", yscale="log", xlabel="D, tokens", ylabel="M, FLOPs per token", xlim=(x[0], x[-1]),
             ylim=(y[0], y[-1]), title=f"{fits.noise}: L = {floor_term(law.E)}{law.A:.3g} M^-{law.alpha:.3f} + "
             f"{law.B:.3g} D^-{law.beta:.3f} ({method})")  # fmt: skip
    figure.legend(fontsize="small", loc="outside lower center", ncols=3)


def residuals(figure: Any, noises: Sequence[NoiseFits]) -> None:
    """Draw what vertices and points differ from the law of the best loss and from the surface, over compute."""
    left, right = figure.subplots(1, 2)
    for place, fits in enumerate(noises):
        colour = series(place)
        if fits.isoflop is not None:
            law = fits.isoflop.laws["loss"]
            shown = fits.isoflop.counted
            off = [100 * (budget.loss / float(law(budget.flops)) - 1) for budget in shown]
            left.plot([budget.flops for budget in shown], off, "o-", color=colour, ms=4, lw=0.8, label=fits.noise)
        if fits.surfaces:
            law = next(iter(fits.surfaces.values()))
            counted = fits.counted
            predicted = [float(law(point.flops_per_token, point.tokens)) for point in counted]
            off = [100 * (point.loss / value - 1) for point, value in zip(counted, predicted, strict=True)]
            right.plot([point.flops for point in counted], off, "o", color=colour, mfc="none", ms=4, label=fits.noise)
    for axes, title in ((left, "vertices less the law of L*"), (right, "points less the surface")):
        axes.axhline(0, color=QUIET, lw=0.8)
        axes.set(xscale="log", xlabel="C, FLOPs", ylabel="% of the loss", title=title)
        if axes.get_legend_handles_labels()[0]:
            axes.legend(fontsize="small")


def exponents(figure: Any, solved: Sequence[NoiseFits]) -> None:
    """Draw the exponents of the laws: violins of the draws, and intervals."""
    for axes, (name, label) in zip(figure.subplots(1, 3), _LAWS.items(), strict=True):
        for place, fits in enumerate(solved):
            assert fits.isoflop is not None
            law = fits.isoflop.laws[name]
            drawn = law.draws["exponent"]
            if len(drawn) > 1 and np.ptp(drawn) > 0:
                kept = drawn[np.abs(drawn - np.median(drawn)) <= 6 * np.std(drawn)]
                parts = axes.violinplot([kept], positions=[place], showextrema=False)
                for body in parts["bodies"]:
                    body.set(facecolor=series(place), edgecolor=series(place), alpha=0.35)
            low, high = law.intervals["exponent"]
            if np.isfinite([low, high]).all():
                axes.plot([place, place], [low, high], color="black", lw=1.2)
            axes.plot([place], [law.exponent], "o", color="black", ms=4)
            axes.annotate(f"{law.exponent:.4f}", (place, law.exponent), xytext=(6, 0), textcoords="offset points",
                          fontsize="x-small", va="center")  # fmt: skip
            if (single := fits.isoflop.single) is not None:
                other = single.laws[name]
                axes.plot([place - 0.25] * 2, other.intervals["exponent"], color=QUIET, lw=1.2)
                axes.plot([place - 0.25], [other.exponent], "s", color=QUIET, mfc="white", ms=4)
        axes.set_xticks(range(len(solved)), [fits.noise for fits in solved])
        axes.set_xlim(-0.6, len(solved) - 0.4)
        axes.set(title=f"exponent of {label.split(',', maxsplit=1)[0]}")


def overlaid(figure: Any, solved: Sequence[NoiseFits], comparisons: Sequence[Comparison]) -> None:
    """Draw the best losses of all noises, below relative to the first, with crossings and their intervals."""
    top, below = figure.subplots(2, 1, sharex=True, height_ratios=(3, 2))
    laws_of = [fits.isoflop.laws["loss"] for fits in solved if fits.isoflop is not None]
    low = min(law.x_range[0] for law in laws_of)
    high = max(law.x_range[1] for law in laws_of)
    crossings = [each.crossing for each in comparisons if np.isfinite(each.crossing.flops)]
    near = [each.flops for each in crossings if low / 1e6 <= each.flops <= high * 1e6]
    start, end = min([low, *(at / 3 for at in near)]), max([high * _REACH, *(at * 3 for at in near)])
    x = np.geomspace(start, end, 80)
    for place, (fits, law) in enumerate(zip(solved, laws_of, strict=True)):
        assert fits.isoflop is not None
        colour, is_inside = series(place), (x >= law.x_range[0]) & (x <= law.x_range[1])
        ends = np.array([law.interval_at(at) for at in x])
        base = laws_of[0](x)
        for axes, scale in ((top, np.ones_like(x)), (below, base)):
            axes.plot(x, law(x) / scale, "--", color=colour, lw=0.9)
            axes.plot(x[is_inside], (law(x) / scale)[is_inside], color=colour, lw=1.5, label=fits.noise)
            if np.isfinite(ends).all():
                axes.fill_between(x, ends[:, 0] / scale, ends[:, 1] / scale, color=colour, alpha=0.15, lw=0)
        shown = fits.isoflop.counted
        flops, losses = (np.array([getattr(budget, name) for budget in shown]) for name in ("flops", "loss"))
        top.plot(flops, losses, "o", color=colour, ms=4)
        below.plot(flops, losses / laws_of[0](flops), "o", color=colour, ms=4)
    for found in crossings:
        if not start <= found.flops <= end:
            continue
        for axes in (top, below):
            axes.axvline(found.flops, color="black", lw=1, ls=":")
            left, right = max(found.interval[0], start), min(found.interval[1], end)
            axes.axvspan(left, right, color=QUIET, alpha=0.15, lw=0)
    top.set(xscale="log", yscale="log", ylabel="L*, nats per token")
    _plain_loss_ticks(top)
    gap = max(abs(law(x) / laws_of[0](x) - 1).max() for law in laws_of)
    below.set(ylim=(1 - 1.4 * gap - 1e-3, 1 + 1.4 * gap + 1e-3), xlim=(start, end), xlabel="C, FLOPs",
              ylabel=f"L* over that of {solved[0].noise}")  # fmt: skip
    top.legend(fontsize="small", loc="upper right")


def compute_saved(figure: Any, solved: Sequence[NoiseFits]) -> None:
    """Draw the compute that each noise needs over that of the first for the same loss, with intervals."""
    axes = figure.subplots()
    laws_of = [fits.isoflop.laws["loss"] for fits in solved if fits.isoflop is not None]
    base = laws_of[0]
    axes.axhline(1, color=series(0), lw=1.4, label=solved[0].noise)
    tops = [1.0]
    for place, (fits, law) in enumerate(zip(solved[1:], laws_of[1:], strict=True), start=1):
        found = []
        for flops in np.geomspace(base.x_range[0] / 2, base.x_range[1] * _REACH, 24):
            try:
                saved = speed_up(base, law, loss=float(base(flops)))
            except FitError:
                continue
            found.append((flops, saved.ratio, *saved.interval, saved.is_extrapolated))
        if not found:
            continue
        columns = np.array(found, dtype=float).T
        x, ratio, low, high = columns[:4]
        inside = columns[4] == 0
        axes.plot(x, ratio, "--", color=series(place), lw=1)
        axes.plot(x[inside], ratio[inside], color=series(place), lw=1.5, label=fits.noise)
        if not inside.any():
            axes.plot([], [], "--", color=series(place), lw=1, label=f"{fits.noise} (extrapolated)")
        if np.isfinite([low, high]).all():
            axes.fill_between(x, low, high, color=series(place), alpha=0.18, lw=0)
        tops += [*ratio]
    axes.set(xscale="log", yscale="log", xlabel=f"C of {solved[0].noise} for the loss, FLOPs",
             ylabel="compute over that", ylim=(min(tops) / 1.6, max(tops) * 1.6))  # fmt: skip
    _plain_ratio_ticks(axes)
    axes.legend(fontsize="small")


ENDINGS = ("png", "svg", "pdf")


@dataclass(frozen=True)
class Drawn:
    """One figure."""

    name: str
    """Name of its files without ending, and of its anchor in a page."""
    section: str
    """Section of a page that it belongs to."""
    caption: str
    inline: str
    """SVG element for a page."""


@dataclass(frozen=True)
class _Sketch:
    name: str
    section: str
    caption: str
    size: tuple[float, float]
    draw: Callable[[Any], None]


def draw_all(results: Results, folder: Path, baseline: LawBook | None = None) -> list[Drawn]:
    """Draw every figure that the results have data for, write its files, and return it for a page.

    Args:
        results: fits.
        folder: folder of the files.
        baseline: laws to draw beside those that were fitted.

    Raises:
        OSError: the folder cannot be written.
    """
    import matplotlib
    from matplotlib.figure import Figure

    folder.mkdir(parents=True, exist_ok=True)
    drawn = []
    with matplotlib.rc_context({"svg.hashsalt": "megadiff", "legend.frameon": False, "axes.titlesize": "medium"}):
        for sketch in _sketches(results, baseline):
            figure = Figure(figsize=sketch.size, layout="constrained")
            sketch.draw(figure)
            svg = io.StringIO()
            figure.savefig(svg, format="svg", metadata={"Date": None})
            figure.set_layout_engine("none")  # it is laid out now, and laying it out takes longer than drawing
            (folder / f"{sketch.name}.svg").write_text(svg.getvalue(), encoding="utf-8")
            figure.savefig(folder / f"{sketch.name}.png", dpi=110)
            figure.savefig(folder / f"{sketch.name}.pdf", metadata={"CreationDate": None})
            inline = inline_svg(svg.getvalue(), sketch.name, sketch.caption)
            drawn.append(Drawn(sketch.name, sketch.section, sketch.caption, inline))
    return drawn


def _sketches(results: Results, baseline: LawBook | None) -> Iterator[_Sketch]:
    count, dotted = results.gathered.flop_count, "" if baseline is None else "; dotted: the baseline's laws"
    solved = [fits for fits in results.noises if fits.isoflop is not None]
    for fits in solved:
        yield _Sketch(
            f"bowls-{_safe(fits.noise)}", "bowls",
            f"{fits.noise}: loss over size at equal compute. Stars: vertices that count, with their intervals; hollow "
            "points: runs that another batch or learning rate beats; dotted: bowls whose vertex does not count.",
            (7.5, 5), lambda figure, fits=fits: bowls(figure, fits),
        )  # fmt: skip
    if solved:
        yield _Sketch(
            "laws", "laws", "Optimal size, tokens and loss over compute, with the band of the intervals; dashed and "
            f"hollow beyond the budgets that were run{dotted}.", (11, 4.2),
            lambda figure: laws(figure, solved, count, baseline),
        )  # fmt: skip
    for fits in results.noises:
        if fits.surfaces:
            yield _Sketch(
                f"surface-{_safe(fits.noise)}", "surface",
                f"{fits.noise}: lines of equal loss of the fitted surface, the runs' points, the frontier of the best "
                "size at each budget, and the vertices of the bowls.",
                (7, 5), lambda figure, fits=fits: surface(figure, fits),
            )  # fmt: skip
    for fits in results.noises:
        if fits.batches.iso_losses:
            yield _Sketch(
                f"hyperbolas-{_safe(fits.noise)}", "batch",
                f"{fits.noise}: steps and batch that reach one loss, with their hyperbolas. Stars and the black line: "
                "the fewest tokens at each loss, and their law; hollow squares: batches at which they are 20 % more.",
                (11, 4.2), lambda figure, fits=fits: hyperbolas(figure, fits),
            )  # fmt: skip
        if fits.batches.batch or fits.batches.rate:
            yield _Sketch(
                f"batch-{_safe(fits.noise)}", "batch",
                f"{fits.noise}: best batch over tokens and best learning rate over batch, a line for each size; black: "
                "all sizes together.",
                (11, 4.4), lambda figure, fits=fits: batch_and_rate(figure, fits),
            )  # fmt: skip
    if results.gathered.noise_scales:
        yield _Sketch(
            "noise-scale", "batch", "Gradient noise scale over the tokens trained on, with standard errors and laws; "
            "dashed: laws of the best batch.", (8, 4.2), lambda figure: noise_scales(figure, results),
        )  # fmt: skip
    if solved or any(fits.surfaces for fits in results.noises):
        yield _Sketch(
            "residuals", "residuals", "Measured less fitted loss over compute: vertices against the law of the best "
            "loss, and all points against the surface.",
            (11, 3.8), lambda figure: residuals(figure, list(results.noises)),
        )  # fmt: skip
    if solved:
        yield _Sketch(
            "exponents", "exponents",
            "Exponents of the laws: violins of the redrawn sweeps, bars of the intervals; squares: by a single bowl.",
            (11, 3.6), lambda figure: exponents(figure, solved),
        )  # fmt: skip
    if results.comparisons:
        yield _Sketch(
            "noises", "noises", "Best loss over compute side by side, and relative to the first; vertical lines and "
            "shaded stretches: crossings and their intervals.",
            (8, 6.5), lambda figure: overlaid(figure, solved, results.comparisons),
        )  # fmt: skip
        yield _Sketch(
            "compute-saved", "noises", f"Compute that each needs over that of {solved[0].noise} for the same loss, "
            "with intervals; dashed where a law is used beyond its budgets.",
            (8, 4.2), lambda figure: compute_saved(figure, solved),
        )  # fmt: skip
    if len(results.gathered.branches) > 1:
        yield _Sketch(
            "cooldowns", "cooldowns", "Loss without a cooldown over the loss with one, a point for each branch; lines: "
            "mean and interval of each noise.",
            (8, 3.8), lambda figure: cooldowns(figure, results),
        )  # fmt: skip


def _safe(name: str) -> str:
    return "".join(c if c.isalnum() or c in "-_." else "_" for c in name)[:60]


_CLASSES = {colour: f"c{place}" for place, colour in enumerate(SERIES)} | {QUIET: "quiet"}
_STYLE = re.compile(r'\bstyle="([^"]*)"')
_NAMES = (re.compile(r'\bid="([^"]*)"'), re.compile(r'href="#([^"]*)"'), re.compile(r"url\(#([^)]*)\)"))


def inline_svg(text: str, name: str, label: str) -> str:
    """Return matplotlib's SVG as an element for a page: no style attributes, names of its own, colours that follow it.

    Black becomes the page's ink, the colours of series become its palette, and white backgrounds go.
    """
    from html import escape

    svg = text[text.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>|<style .*?</style>|<!--.*?-->", "", svg, flags=re.DOTALL)
    svg = _STYLE.sub(lambda match: _attributes(match[1]), svg)
    for pattern, form in zip(_NAMES, ('id="{}-{}"', 'href="#{}-{}"', "url(#{}-{})"), strict=True):
        svg = pattern.sub(lambda match, form=form: form.format(name, match[1]), svg)
    start = svg.index(">")
    box = re.search(r'viewBox="[^"]*"', svg[:start])
    assert box is not None
    opening = (
        f'<svg class="drawing" {box[0]} xmlns="http://www.w3.org/2000/svg" '
        f'xmlns:xlink="http://www.w3.org/1999/xlink" role="img" aria-label="{escape(label, quote=True)}"'
    )
    return opening + re.sub(r"\n\s*", "\n", svg[start:]).rstrip()


def _attributes(style: str) -> str:
    """Return a style as attributes of the same meaning."""
    pairs = [part.split(":", 1) for part in style.split(";") if ":" in part]
    values = {key.strip(): value.strip() for key, value in pairs}
    classes = dict.fromkeys(name for value in values.values() if (name := _CLASSES.get(value.lower())) is not None)
    ink = "var(--ink)" if classes else "currentColor"
    shown = {}
    for key, value in values.items():
        colour = value.lower()
        if colour in _CLASSES:
            shown[key] = "currentColor"
        elif colour in ("#000000", "black"):
            shown[key] = ink
        elif colour in ("#ffffff", "white"):
            shown[key] = "none"
        else:
            shown[key] = value
    own = [f'class="{" ".join(classes)}"'] if classes else []
    return " ".join([*own, *(f'{key}="{value}"' for key, value in shown.items())])
