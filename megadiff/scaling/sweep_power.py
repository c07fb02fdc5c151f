"""Power of a described sweep before it is paid for: errors of its exponents, and a cheaper design of equal power.

The runs of the description are simulated with the losses of the laws and a stated run-to-run noise, and fitted as
`fit_scaling` fits them. Of the batches and learning rates of one size and seed a single run counts: the best one.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from megadiff.scaling.isoflop import GOOD_SIZES, MIN_BUDGETS, MIN_SIZES
from megadiff.scaling.laws import LawBook
from megadiff.scaling.power import LossSurface, Power, RunsDesign, SweepDesign, extent, predict
from megadiff.scaling.resampling import FitError
from megadiff.scaling.sweep import Sweep
from megadiff.scaling.sweep_runs import SweepRun

EXPONENT = "flops_per_token"
"""Law by whose exponent designs and noises are compared: M*."""

_AS_GOOD = 1.02
_WORTH_IT = 0.95
_SIZES, _SEEDS, _BUDGETS, _SPANS, _WINDOWS = (
    (5, 7, 9, 12, 15, 19),
    (1, 2, 3, 5),
    (3, 4, 5, 7, 9),
    (1.0, 1.5),
    (4.0, 8.0),
)
_MOST_RUNS = 200


def surface_of(book: LawBook, noise: str, sweep: Sweep) -> LossSurface | None:
    """Return the losses that the laws expect of a noise by the sweep's count; None where they do not know it.

    The first file that knows is taken: the surface with the optima of its laws of loss and size, or else the surface
    that it has.
    """
    count = sweep.budgets.flop_count
    for file in book.files:
        laws = LawBook((file,))
        loss = laws.law("loss", noise=noise, flop_count=count)
        size = laws.law("flops_per_token", noise=noise, flop_count=count)
        if loss is not None and size is not None and "floor" not in loss.parameters:
            lines = [(law.parameter("A"), law.parameter("alpha")) for law in (loss, size)]
            return LossSurface.from_optimum(lines[0], lines[1])
        fitted = laws.law("loss", noise=noise, flop_count=count, form="surface")
        if fitted is not None:
            a, b, alpha, beta, floor = (fitted.parameter(name) for name in ("a", "b", "alpha", "beta", "E"))
            return LossSurface(A=a, B=b, alpha=alpha, beta=beta, E=floor)
    return None


def design_of(runs: Sequence[SweepRun], noise: str, run_noise: float) -> RunsDesign:
    """Return the runs of one noise as they are simulated: one for each size and seed, with all budgets of its cell."""
    cells: dict[object, tuple[float, set[float]]] = {}
    for run in runs:
        if run.noise == noise and run.budgets:
            size, served = cells.setdefault(run.cell, (run.flops_per_token, set()))
            served.update(run.budgets)
            cells[run.cell] = (size, served)
    budgets = sorted({flops for _, served in cells.values() for flops in served})
    sizes = tuple(size for size, _ in cells.values())
    return RunsDesign(tuple(budgets), sizes, tuple(tuple(sorted(served)) for _, served in cells.values()), run_noise)


@dataclass(frozen=True)
class SweepPower:
    """Prediction of what a sweep finds out."""

    by_noise: dict[str, Power | str]
    """Errors to expect for each noise, or a sentence on why there is no prediction."""
    apart: dict[tuple[str, str], float]
    """Chance that the exponents of M* of two noises are distinguished."""
    cheaper: str
    """Sentence about a cheaper design of equal power."""


def sweep_power(
    sweep: Sweep, runs: Sequence[SweepRun], book: LawBook, *, run_noise: float, draws: int = 400, seed: int = 0
) -> SweepPower:
    """Simulate a sweep and return what it can be expected to find out.

    Args:
        sweep: the description.
        runs: its runs.
        book: the laws whose losses are planted.
        run_noise: standard deviation of log loss between runs that differ in their seed alone.
        draws: number of simulated sweeps.
        seed: seed of the simulation.
    """
    noises = list(dict.fromkeys(run.noise for run in runs))
    designs = {noise: design_of(runs, noise, run_noise) for noise in noises}
    surfaces = {noise: surface_of(book, noise, sweep) for noise in noises}
    by_noise: dict[str, Power | str] = {}
    for noise in noises:
        surface = surfaces[noise]
        if surface is None:
            by_noise[noise] = "no law file knows its loss; name one of your own under `laws`"
            continue
        try:
            by_noise[noise] = predict(designs[noise], surface, draws=draws, seed=seed)
        except FitError as error:
            by_noise[noise] = str(error)
    known = [noise for noise in noises if isinstance(by_noise[noise], Power)]
    apart = {}
    for one, other in itertools.combinations(known, 2):
        first, second = surfaces[one], surfaces[other]
        assert first is not None
        assert second is not None
        found = predict(designs[one], first, second, other_design=designs[other], draws=draws, seed=seed).told_apart
        assert found is not None
        apart[one, other] = found[EXPONENT]
    cheaper = ""
    if known:
        worst = max(known, key=lambda noise: _error(by_noise[noise]))
        surface, power = surfaces[worst], by_noise[worst]
        assert surface is not None
        assert isinstance(power, Power)
        cheaper = f"{worst}: {_cheaper(designs[worst], surface, power, draws=min(draws, 200), seed=seed)}"
    return SweepPower(by_noise, apart, cheaper)


def _error(power: Power | str) -> float:
    return power.standard_errors[EXPONENT] if isinstance(power, Power) else math.inf


def _cheaper(design: RunsDesign, surface: LossSurface, power: Power, *, draws: int, seed: int) -> str:
    """Return a sentence about the cheapest grid whose exponent of M* is as certain.

    It lies between the first and the last budget that enough sizes of the design serve.
    """
    wanted = power.standard_errors[EXPONENT]
    off = max(abs(power.biases[EXPONENT]), 0.5 * wanted)
    affordable: list[tuple[float, SweepDesign]] = []
    for grid in _grids(design):
        its = extent(grid, surface)
        if its.flops <= _WORTH_IT * power.flops and its.fewest_sizes >= GOOD_SIZES:
            affordable.append((its.flops, grid))
    for flops, grid in sorted(affordable, key=lambda each: each[0]):
        try:
            found = predict(grid, surface, draws=draws, seed=seed)
        except FitError:
            continue
        is_as_good = found.standard_errors[EXPONENT] <= _AS_GOOD * wanted and abs(found.biases[EXPONENT]) <= off
        if is_as_good and found.failed <= power.failed + 0.01:
            return _words(grid, found, flops / power.flops)
    return "no regular grid of sizes, budgets and seeds is as certain for less"


def _words(grid: SweepDesign, found: Power, share: float) -> str:
    """Return a grid with its error, runs, and share of the FLOPs."""
    window = "all of them at every budget" if grid.window is None else f"within {grid.window:g}x of the optimum"
    factor = (grid.sizes[-1] / grid.sizes[0]) ** (1 / (len(grid.sizes) - 1))
    seeds = "1 seed" if grid.seeds == 1 else f"{grid.seeds} seeds"
    return (
        f"{len(grid.sizes)} sizes from {grid.sizes[0]:.3g} to {grid.sizes[-1]:.3g} FLOPs a token, {factor:.3g}x apart, "
        f"{window}, {len(grid.budgets)} budgets, {seeds}: standard error {found.standard_errors[EXPONENT]:.3f} with "
        f"{found.runs} runs and {100 * share:.0f} % of the FLOPs"
    )


def _grids(design: RunsDesign) -> Iterator[SweepDesign]:
    """Yield grids between the budgets that count in a design, and over its sizes or a wider range."""
    low, high = min(design.sizes), max(design.sizes)
    pairs = list(zip(design.sizes, design.served, strict=True))
    counted = [
        flops for flops in design.budgets if len({size for size, served in pairs if flops in served}) >= MIN_SIZES
    ]
    if len(counted) < MIN_BUDGETS or high == low:
        return
    first, last = counted[0], counted[-1]
    for number, span, budgets, seeds in itertools.product(_SIZES, _SPANS, _BUDGETS, _SEEDS):
        if number * seeds > _MOST_RUNS:
            continue
        middle, half = math.sqrt(low * high), span * math.log(high / low) / 2
        sizes = tuple(middle * math.exp(half * (2 * k / (number - 1) - 1)) for k in range(number))
        steps = tuple(first * (last / first) ** (k / (budgets - 1)) for k in range(budgets))
        for window in (None, *_WINDOWS):
            yield SweepDesign(
                steps, sizes, design.run_noise, seeds=seeds, point_noise=design.point_noise, window=window
            )
