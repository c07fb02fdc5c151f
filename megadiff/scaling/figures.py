"""Figures of scaling fits as PNG, SVG and PDF files, and as SVG for a page that is read in light and in dark.

`law_figures` and `batch_figures` draw; this module chooses what there are data for, writes the files, and makes the SVG
fit for a page: without style attributes, which a strict content security policy forbids, and with the page's colours.
"""

from __future__ import annotations

import io
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megadiff.scaling import batch_figures, law_figures
from megadiff.scaling.figure_style import QUIET, SERIES
from megadiff.scaling.fit_results import Results
from megadiff.scaling.laws import LawBook

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
            (7.5, 5), lambda figure, fits=fits: law_figures.bowls(figure, fits),
        )  # fmt: skip
    if solved:
        yield _Sketch(
            "laws", "laws", "Optimal size, tokens and loss over compute, with the band of the intervals; dashed and "
            f"hollow beyond the budgets that were run{dotted}.", (11, 4.2),
            lambda figure: law_figures.laws(figure, solved, count, baseline),
        )  # fmt: skip
    for fits in results.noises:
        if fits.surfaces:
            yield _Sketch(
                f"surface-{_safe(fits.noise)}", "surface",
                f"{fits.noise}: lines of equal loss of the fitted surface, the runs' points, the frontier of the best "
                "size at each budget, and the vertices of the bowls.",
                (7, 5), lambda figure, fits=fits: law_figures.surface(figure, fits),
            )  # fmt: skip
    for fits in results.noises:
        if fits.batches.iso_losses:
            yield _Sketch(
                f"hyperbolas-{_safe(fits.noise)}", "batch",
                f"{fits.noise}: steps and batch that reach one loss, with their hyperbolas. Stars and the black line: "
                "the fewest tokens at each loss, and their law; hollow squares: batches at which they are 20 % more.",
                (11, 4.2), lambda figure, fits=fits: batch_figures.hyperbolas(figure, fits),
            )  # fmt: skip
        if fits.batches.batch or fits.batches.rate:
            yield _Sketch(
                f"batch-{_safe(fits.noise)}", "batch",
                f"{fits.noise}: best batch over tokens and best learning rate over batch, a line for each size; black: "
                "all sizes together.",
                (11, 4.4), lambda figure, fits=fits: batch_figures.batch_and_rate(figure, fits),
            )  # fmt: skip
    if results.gathered.noise_scales:
        yield _Sketch(
            "noise-scale", "batch", "Gradient noise scale over the tokens trained on, with standard errors and laws; "
            "dashed: laws of the best batch.", (8, 4.2), lambda figure: batch_figures.noise_scales(figure, results),
        )  # fmt: skip
    if solved or any(fits.surfaces for fits in results.noises):
        yield _Sketch(
            "residuals", "residuals", "Measured less fitted loss over compute: vertices against the law of the best "
            "loss, and all points against the surface.",
            (11, 3.8), lambda figure: law_figures.residuals(figure, list(results.noises)),
        )  # fmt: skip
    if solved:
        yield _Sketch(
            "exponents", "exponents", "Exponents of the laws: violins of the redrawn sweeps, bars of the intervals.",
            (11, 3.6), lambda figure: law_figures.exponents(figure, solved),
        )  # fmt: skip
    if results.comparisons:
        yield _Sketch(
            "noises", "noises", "Best loss over compute side by side, and relative to the first; vertical lines and "
            "shaded stretches: crossings and their intervals.",
            (8, 6.5), lambda figure: law_figures.overlaid(figure, solved, results.comparisons),
        )  # fmt: skip
        yield _Sketch(
            "compute-saved", "noises", f"Compute that each needs over that of {solved[0].noise} for the same loss, "
            "with intervals; dashed where a law is used beyond its budgets.",
            (8, 4.2), lambda figure: law_figures.compute_saved(figure, solved),
        )  # fmt: skip
    if len(results.gathered.branches) > 1:
        yield _Sketch(
            "cooldowns", "cooldowns", "Loss without a cooldown over the loss with one, a point for each branch; lines: "
            "mean and interval of each noise.",
            (8, 3.8), lambda figure: batch_figures.cooldowns(figure, results),
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
