"""Figures of scaling fits, drawn with matplotlib: bowls, laws over compute, exponents."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from megadiff.scaling.fit_results import NoiseFits, Results

_LAWS = {
    "flops_per_token": "optimal FLOPs per token M*", "tokens": "optimal tokens D*", "loss": "loss L*, nats per token"
}  # fmt: skip


def draw_all(results: Results, folder: Path, endings: tuple[str, ...] = ("svg", "png")) -> list[Path]:
    """Draw every figure that the results have data for; return the files of the first ending.

    Raises:
        OSError: the folder cannot be written.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    matplotlib.rcParams["svg.hashsalt"] = "megadiff"
    folder.mkdir(parents=True, exist_ok=True)
    solved = [fits for fits in results.noises if fits.isoflop is not None]
    figures: dict[str, Callable[[Any], None]] = {}
    for fits in solved:
        figures[f"bowls-{_safe(fits.noise)}"] = lambda figure, fits=fits: _bowls(figure, fits)
    if solved:
        figures["laws"] = lambda figure: _laws(figure, solved)
        figures["exponents"] = lambda figure: _exponents(figure, solved)
    written = []
    for name, draw in figures.items():
        figure = pyplot.figure(figsize=(11, 4.2) if name in ("laws", "exponents") else (7, 5), layout="constrained")
        draw(figure)
        for ending in endings:
            metadata = {"Date": None} if ending == "svg" else {}
            figure.savefig(folder / f"{name}.{ending}", dpi=120, metadata=metadata)
        pyplot.close(figure)
        written.append(folder / f"{name}.{endings[0]}")
    return written


def _safe(name: str) -> str:
    return "".join(c if c.isalnum() or c in "-_." else "_" for c in name)[:60]


def _bowls(figure: Any, fits: NoiseFits) -> None:
    from matplotlib import colormaps

    assert fits.isoflop is not None
    axes = figure.subplots()
    budgets = fits.isoflop.budgets
    for place, budget in enumerate(budgets):
        colour = colormaps["viridis"](0.9 * place / max(len(budgets) - 1, 1))
        own = [p for p in fits.points if abs(np.log(p.flops / budget.flops)) < 0.02]
        for is_out, filled in ((False, colour), (True, "none")):
            shown = [p for p in own if bool(p.excluded) == is_out]
            axes.scatter(
                [p.flops_per_token for p in shown],
                [p.loss for p in shown],
                s=16,
                edgecolors=[colour],
                facecolors=filled,
            )
        if not own or not np.isfinite(budget.coefficients).all():
            continue
        sizes = np.geomspace(min(p.flops_per_token for p in own), max(p.flops_per_token for p in own), 80)
        u = np.log(sizes / budget.centre)
        c0, c1, c2 = budget.coefficients
        style = "-" if not budget.excluded else ":"
        axes.plot(
            sizes,
            np.exp(np.clip(c0 + c1 * u + c2 * u * u, -50, 50)),
            style,
            color=colour,
            lw=1,
            label=f"{budget.flops:.2g} FLOPs",
        )
        if not budget.excluded:
            low, high = budget.size_interval
            if np.isfinite([low, high]).all():
                axes.plot([low, high], [budget.loss] * 2, color="black", lw=1)
            axes.plot([budget.size], [budget.loss], "*", color="black", ms=9)
    axes.set_ylim(*_around([p.loss for p in fits.points]))
    axes.set(xscale="log", yscale="log", xlabel="FLOPs per token M", ylabel="loss, nats per token", title=fits.noise)
    axes.legend(fontsize="x-small", ncols=2, loc="upper right")


def _around(values: list[float]) -> tuple[float, float]:
    return 0.98 * min(values), 1.02 * max(values)


def _laws(figure: Any, solved: list[NoiseFits]) -> None:
    for axes, (name, label) in zip(figure.subplots(1, 3), _LAWS.items(), strict=True):
        for place, fits in enumerate(solved):
            assert fits.isoflop is not None
            law, colour = fits.isoflop.laws[name], f"C{place}"
            low, high = law.x_range
            x = np.geomspace(low / 2, high * 10, 60)
            axes.plot(x, law(x), color=colour, label=f"{fits.noise}: C^{law.exponent:.3f}")
            ends = np.array([law.interval_at(at) for at in x])
            axes.fill_between(x, ends[:, 0], ends[:, 1], color=colour, alpha=0.2, lw=0)
            for budget in fits.isoflop.budgets:
                if not budget.excluded:
                    value = {"flops_per_token": budget.size, "tokens": budget.tokens, "loss": budget.loss}[name]
                    axes.plot([budget.flops], [value], "o", color=colour, ms=4)
            axes.axvspan(high, high * 10, color="grey", alpha=0.08, lw=0)
        axes.set(xscale="log", yscale="log", xlabel="C, FLOPs", title=label)
        axes.legend(fontsize="small", loc="upper left")


def _exponents(figure: Any, solved: list[NoiseFits]) -> None:
    for axes, (name, label) in zip(figure.subplots(1, 3), _LAWS.items(), strict=True):
        names = []
        for place, fits in enumerate(solved):
            assert fits.isoflop is not None
            law = fits.isoflop.laws[name]
            names.append(fits.noise)
            drawn = law.draws["exponent"]
            if len(drawn) > 1 and np.ptp(drawn) > 0:
                axes.violinplot([drawn], positions=[place], showextrema=False)
            low, high = law.intervals["exponent"]
            if np.isfinite([low, high]).all():
                axes.plot([place, place], [low, high], color="black", lw=1)
            axes.plot([place], [law.exponent], "ko", ms=4)
        axes.set_xticks(range(len(names)), names)
        axes.set(title=f"exponent of {label}")
