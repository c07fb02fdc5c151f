"""Figures of laws over compute: bowls, optima, surfaces, residuals, exponents, and noises side by side."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from megadiff.scaling.comparisons import speed_up
from megadiff.scaling.figure_style import QUIET, ordered, series
from megadiff.scaling.fit import PowerLaw
from megadiff.scaling.fit_results import Comparison, NoiseFits
from megadiff.scaling.flops import FlopCount
from megadiff.scaling.isoflop import Budget
from megadiff.scaling.law_format import Quantity
from megadiff.scaling.laws import LawBook
from megadiff.scaling.points import BEATEN, Point
from megadiff.scaling.resampling import FitError, Floats
from megadiff.scaling.surface_fit import floor_term

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
