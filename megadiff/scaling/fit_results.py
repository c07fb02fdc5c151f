"""All fits of a gathered sweep, with every reservation about them in a sentence."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from megadiff.scaling.batch_laws import BatchLaws, batch_laws
from megadiff.scaling.comparisons import (
    Crossing,
    PairedRuns,
    SpeedUp,
    annealing_ratio,
    crossing,
    paired_runs,
    repeats,
    speed_up,
)
from megadiff.scaling.fit import PowerLaw, Surface, power_law, surface
from megadiff.scaling.isoflop import IsoFlop, isoflop
from megadiff.scaling.points import REPEATED, Branch, Gathered, Point
from megadiff.scaling.resampling import LEVEL, Fit, FitError
from megadiff.scaling.run_curves import NoiseScale

GOOD_BUDGETS, HELD_OUT_PERCENT = 5, 1.5


@dataclass(frozen=True)
class NoiseFits:
    """The fits of one noise; a fit that was refused is missing, with its sentence among the refusals."""

    noise: str
    points: tuple[Point, ...]
    isoflop: IsoFlop | None
    surfaces: dict[str, Surface]
    batches: BatchLaws
    annealing: Fit | None
    """Ratio of losses without a cooldown over those with one; None without branches."""
    noise_scale: PowerLaw | None
    """Gradient noise scale, in tokens, over the tokens trained on; None if the runs did not measure it."""
    repeats: Fit | None
    """R* of repeated data; None without runs that repeat theirs."""
    refusals: tuple[str, ...]

    @property
    def counted(self) -> list[Point]:
        """Points that count."""
        return [point for point in self.points if not point.excluded]


@dataclass(frozen=True)
class Comparison:
    """Two noises side by side."""

    first: str
    second: str
    crossing: Crossing
    speed_up: SpeedUp
    """Compute that the second needs over that of the first, at its loss in the middle of the range."""
    exponent_gap: float
    """Difference of the exponents of the optimal size, first less second."""
    gap_stderr: float


@dataclass(frozen=True)
class Results:
    """All fits of a sweep."""

    gathered: Gathered
    noises: tuple[NoiseFits, ...]
    comparisons: tuple[Comparison, ...]
    level: float
    paired: tuple[PairedRuns, ...] = ()
    """Runs of two noises compared over the same validation sequences."""
    paired_refusals: tuple[str, ...] = ()

    @property
    def reservations(self) -> tuple[str, ...]:
        """Reasons why the laws are provisional, one sentence each; none if they are not."""
        found = [
            f"{len([e for e in self.gathered.excluded if e.reason == reason])} run(s) left out: {reason}"
            for reason in dict.fromkeys(e.reason for e in self.gathered.excluded)
            if reason != "duplicate"
        ]
        found += (*self.gathered.notes, *self.paired_refusals)
        for fits in self.noises:
            found += [f"{fits.noise}: {sentence}" for sentence in (*fits.refusals, *fits.batches.edges)]
            if fits.isoflop is None:
                continue
            found += [f"{fits.noise}: {sentence}" for sentence in _budget_notes(fits.isoflop)]
            counted = len(fits.isoflop.counted)
            if counted < GOOD_BUDGETS:
                found.append(f"{fits.noise}: the laws rest on {counted} budgets")
            held = fits.isoflop.held_out
            if held is not None and abs(held.loss_error_percent) > HELD_OUT_PERCENT:
                others = [(name, law.held_out) for name, law in fits.surfaces.items() if law.held_out is not None]
                by_surfaces = ", ".join(f"{at.loss_error_percent:+.2f} % by {name}" for name, at in others)
                found.append(
                    f"{fits.noise}: the largest budget's loss is predicted {held.loss_error_percent:+.2f} % off by the "
                    f"power law of the others{f'; by their surfaces, {by_surfaces}' if by_surfaces else ''}"
                )
        return tuple(found)


def _budget_notes(found: IsoFlop) -> list[str]:
    """Return the notes about budgets, those of one kind as one."""
    kinds: dict[str, list[str]] = {}
    for note in found.notes:
        place, separator, reason = note.partition(": ")
        kinds.setdefault(reason if separator and place.endswith("FLOPs") else note, []).append(place)
    return [
        kind if len(places) == 1 and places[0] == kind else f"{', '.join(places[:6])}{_more(len(places) - 6)}: {kind}"
        for kind, places in kinds.items()
    ]


def _more(count: int) -> str:
    return f" and {count} more" if count > 0 else ""


def fit_points(
    gathered: Gathered, *, level: float = LEVEL, draws: int = 1000, seed: int = 0, run_noise: float | None = None
) -> Results:
    """Fit what the points of each noise determine; what they do not is refused in a sentence, and the rest is fitted.

    Raises:
        FitError: there is no point, or no fit of any noise is possible; the message names the first reasons.
    """
    if not gathered.points:
        named = "; ".join(f"{found.run}: {found.reason} ({found.detail})" for found in gathered.excluded[:4])
        why = named or "no budget is covered by three sizes"
        raise FitError(f"{gathered.source}: none of {gathered.runs} runs gives a point ({why})")
    noises = []
    for noise in dict.fromkeys(point.noise for point in gathered.points):
        points = [point for point in gathered.points if point.noise == noise]
        branches = [branch for branch in gathered.branches if branch.noise == noise]
        scales = [scale for scale in gathered.noise_scales if scale.noise == noise]
        noises.append(_fits_of(noise, points, branches, scales, level, draws, seed, run_noise))
    if not any(fits.isoflop or fits.surfaces or fits.batches.batch or fits.batches.iso_losses for fits in noises):
        repeated = sum(point.excluded == REPEATED for point in noises[0].points)
        why = [f"{repeated} point(s) saw their data more than 1.5 times and are left out"] if repeated else []
        raise FitError(f"these points determine no law: {'; '.join([*why, *noises[0].refusals])}")
    solved = [fits for fits in noises if fits.isoflop is not None]
    pairs = [(a, b) for place, a in enumerate(solved) for b in solved[place + 1 :]]
    paired, refusals = paired_runs(gathered.counted) if len(noises) > 1 else ([], [])
    compared = tuple(_compared(a, b) for a, b in pairs)
    return Results(gathered, tuple(noises), compared, level, tuple(paired), tuple(refusals))


def _fits_of(
    noise: str,
    points: Sequence[Point],
    branches: Sequence[Branch],
    scales: Sequence[NoiseScale],
    level: float,
    draws: int,
    seed: int,
    run_noise: float | None,
) -> NoiseFits:
    counted = [point for point in points if not point.excluded]
    refusals: list[str] = []

    def tried(name: str, fit: Callable[[], Any]) -> Any:
        try:
            return fit()
        except FitError as error:
            refusals.append(f"{name}: {error}")
            return None

    flops, size, tokens, loss = (
        np.array([getattr(point, name) for point in counted]) for name in ("flops", "flops_per_token", "tokens", "loss")
    )
    runs = [point.run for point in counted]
    params = None
    if all(point.params is not None for point in counted):
        params = np.array([point.params or np.nan for point in counted])
    options: dict[str, Any] = {"level": level, "draws": draws, "seed": seed}
    bowls = tried("IsoFLOP", lambda: isoflop(flops, size, loss, runs, params, run_noise=run_noise, **options))
    surfaces = {}
    for method in ("lse", "varpro"):
        found = tried(
            f"surface ({method})",
            lambda m=method: surface(size, tokens, loss, m, groups=runs, hold_out=True, **options),
        )
        if found is not None:
            surfaces[method] = found
    batches = batch_laws([point for point in points if point.is_candidate], level=level, seed=seed)
    annealing = repeated = scale_law = None
    if scales:
        x, y = [scale.tokens for scale in scales], [scale.scale for scale in scales]
        scale_runs = [scale.run for scale in scales]
        scale_law = tried("noise scale", lambda: power_law(x, y, scale_runs, **options))
    if branches:
        unannealed, annealed = [b.unannealed for b in branches], [b.annealed for b in branches]
        trunks = [branch.trunk for branch in branches]
        annealing = tried("annealing", lambda: annealing_ratio(unannealed, annealed, trunks, **options))
    again = [point for point in points if point.excluded == REPEATED]
    if again:
        repeated = tried("repeats", lambda: _repeats_of(again, surfaces, options))
    return NoiseFits(noise, tuple(points), bowls, surfaces, batches, annealing, scale_law, repeated, tuple(refusals))


def _repeats_of(points: Sequence[Point], surfaces: dict[str, Surface], options: dict[str, Any]) -> Fit:
    """Return R* of points with repeated data, in the first surface fitted to the others.

    Raises:
        FitError: there is no surface, or the points do not bound R*.
    """
    if not surfaces:
        raise FitError("R* needs a surface fitted to runs without repeated data")
    return repeats(
        [point.flops_per_token for point in points],
        [point.unique_tokens for point in points],
        [point.tokens for point in points],
        [point.loss for point in points],
        next(iter(surfaces.values())),
        [point.run for point in points],
        **{**options, "draws": min(options["draws"], 200)},
    )


def _compared(first: NoiseFits, second: NoiseFits) -> Comparison:
    assert first.isoflop is not None
    assert second.isoflop is not None
    laws = first.isoflop.laws, second.isoflop.laws
    middle = math.sqrt(laws[1]["loss"].x_range[0] * laws[1]["loss"].x_range[1])
    sizes = [law["flops_per_token"] for law in laws]
    return Comparison(
        first.noise,
        second.noise,
        crossing(laws[0]["loss"], laws[1]["loss"]),
        speed_up(laws[0]["loss"], laws[1]["loss"], flops=middle),
        sizes[0].exponent - sizes[1].exponent,
        math.hypot(*(law.standard_errors["exponent"] for law in sizes)),
    )
