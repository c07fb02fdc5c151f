"""Power before cost: a sweep simulated under a stated run-to-run noise, before anything is trained.

The simulation gives the standard error and bias of each exponent that
the sweep can hope for, how many budgets have a vertex that counts, and the chance to tell two noise processes apart.

The losses are those of the laws, and the runs are fitted as `fit_scaling` fits them. Of the batches and learning rates
of one size and seed a single run counts: the best one.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from megadiff.scaling.isoflop import GOOD_SIZES, MIN_BUDGETS, MIN_SIZES, Bowls, laws_of
from megadiff.scaling.laws import LawBook
from megadiff.scaling.resampling import LEVEL, FitError, Floats, as_points, t_width
from megadiff.scaling.sweep import Sweep
from megadiff.scaling.sweep_runs import SweepRun


@dataclass(frozen=True)
class LossSurface:
    """Loss over size and data, E + A M^-alpha + B D^-beta, that a simulated sweep samples."""

    A: float
    B: float
    alpha: float
    beta: float
    E: float = 0.0

    def __call__(self, size: Floats, tokens: Floats) -> Floats:
        """Return the loss of these FLOPs per token and tokens."""
        return self.E + self.A * size**-self.alpha + self.B * tokens**-self.beta

    @classmethod
    def from_optimum(cls, loss: tuple[float, float], size: tuple[float, float]) -> LossSurface:
        """Return the surface without a floor that has these optimal laws of loss and of FLOPs per token.

        Args:
            loss: (coefficient, exponent) of L* over C; the exponent is negative.
            size: (coefficient, exponent) of M* over C; the exponent lies between 0 and 1.
        """
        if not (loss[1] < 0 < size[1] < 1):
            raise FitError(f"a falling loss and a size exponent between 0 and 1 are wanted, found {loss[1]}, {size[1]}")
        total = -loss[1] / (size[1] * (1 - size[1]))
        alpha, beta = total * (1 - size[1]), total * size[1]
        a, b = beta / total * size[0] ** alpha, alpha / total * size[0] ** -beta
        return cls(A=loss[0] * a, B=loss[0] * b, alpha=alpha, beta=beta)


@dataclass(frozen=True)
class SweepDesign:
    """The runs of a sweep: every size at every budget unless `window` narrows it, every run repeated for each seed."""

    budgets: tuple[float, ...]
    """Budgets in FLOPs."""
    sizes: tuple[float, ...]
    """FLOPs per token of the sizes."""
    run_noise: float
    """Standard deviation of log loss between seeds, such as 0.001."""
    seeds: int = 1
    point_noise: float = 0.0
    """Standard deviation of log loss that every budget of a run has for itself, such as the evaluation's."""
    shares_runs: bool = True
    """Whether one run serves all its budgets; otherwise every budget has runs of its own."""
    window: float | None = None
    """A budget only has the sizes within this factor of its optimum; None for all."""


@dataclass(frozen=True)
class RunsDesign:
    """The runs of a sweep one by one, each with the budgets that it serves."""

    budgets: tuple[float, ...]
    """Budgets in FLOPs."""
    sizes: tuple[float, ...]
    """FLOPs per token of each run."""
    served: tuple[tuple[float, ...], ...]
    """Budgets of each run, a subset of `budgets`."""
    run_noise: float
    """Standard deviation of log loss between seeds, such as 0.001."""
    point_noise: float = 0.0
    """Standard deviation of log loss that every budget of a run has for itself, such as the evaluation's."""


Design = SweepDesign | RunsDesign


@dataclass(frozen=True)
class Power:
    """The errors that a sweep can hope for, by law: `flops_per_token`, `tokens`, `loss`."""

    standard_errors: dict[str, float]
    biases: dict[str, float]
    exponents: dict[str, float]
    """The exponents that were planted."""
    inner_budgets: float
    """Mean number of budgets with a vertex that counts."""
    budgets: int
    failed: float
    """Fraction of sweeps that leave fewer than three vertices."""
    runs: int
    flops: float
    """FLOPs of all runs together."""
    told_apart: dict[str, float] | None = None
    """Chance that the exponents of two noise processes differ significantly and in the right direction, by law."""


def simulate(
    design: Design, surface: LossSurface, *, draws: int = 400, seed: int = 0
) -> tuple[dict[str, Floats], Floats]:
    """Return the lines of each law, [draws, 2], and the number of vertices that count, [draws], of simulated sweeps."""
    bowls, fitted = _planted(design, surface)
    rng = np.random.default_rng(seed)
    shape = (draws, *bowls.present.shape)
    luck = rng.standard_normal((draws, shape[1], 1)) * design.run_noise
    losses = fitted + luck + rng.standard_normal(shape) * design.point_noise
    found = bowls.vertices(losses)
    return laws_of(bowls.log_flops, found), found.is_inside.sum(axis=1).astype(float)


def predict(
    design: Design, surface: LossSurface, other: LossSurface | None = None, *, other_design: Design | None = None,
    draws: int = 400, seed: int = 0, level: float = LEVEL,
) -> Power:  # fmt: skip
    """Return the errors to expect of a sweep.

    Args:
        design: the runs.
        surface: the losses that the sweep samples.
        other: the losses of another noise process; gives `told_apart`.
        other_design: the runs of the other noise process, if they differ.
        draws: number of simulated sweeps.
        seed: seed of the simulation.
        level: coverage at which a difference counts.

    Raises:
        FitError: no simulated sweep has three vertices that count.
    """
    laws, inner = simulate(design, surface, draws=draws, seed=seed)
    truth = _exponents(surface)
    usable = {name: line[np.isfinite(line[:, 1]), 1] for name, line in laws.items()}
    if len(usable["loss"]) < 2:
        raise FitError("no simulated sweep has three budgets with an inner optimum; widen the sizes or add budgets")
    bowls, _ = _planted(design, surface)
    size = _extent(bowls)
    told = None
    if other is not None:
        theirs, _ = simulate(other_design or design, other, draws=draws, seed=seed + 1)
        gaps = {name: truth[name] - value for name, value in _exponents(other).items()}
        dof = max(np.mean([len(rows) for rows in bowls.rows]) - 3, 1.0)
        width = t_width(level, 2 * float(dof))
        told = {name: _told_apart(laws[name][:, 1], theirs[name][:, 1], gaps[name], width) for name in laws}
    return Power(
        standard_errors={name: float(np.std(values, ddof=1)) for name, values in usable.items()},
        biases={name: float(values.mean() - truth[name]) for name, values in usable.items()},
        exponents=truth,
        inner_budgets=float(inner.mean()),
        budgets=len(design.budgets),
        failed=float(1 - len(usable["loss"]) / draws),
        runs=size.runs,
        flops=size.flops,
        told_apart=told,
    )


@dataclass(frozen=True)
class Extent:
    """Runs and FLOPs that a design takes."""

    runs: int
    flops: float
    """FLOPs of all runs together."""
    fewest_sizes: int
    """Number of different sizes at the budget that has the fewest."""


def extent(design: Design, surface: LossSurface) -> Extent:
    """Return what a design takes; a run ends at the last budget that it serves."""
    return _extent(_planted(design, surface)[0])


def _extent(bowls: Bowls) -> Extent:
    last = [int(places[-1]) for row in bowls.present if len(places := np.flatnonzero(row))]
    return Extent(len(last), float(np.exp(bowls.log_flops[last]).sum()), min(bowls.sizes))


def _told_apart(first: Floats, second: Floats, gap: float, width: float) -> float:
    spread = np.hypot(np.nanstd(first), np.nanstd(second))
    with np.errstate(invalid="ignore"):
        return float(np.mean((first - second) * np.sign(gap) > width * spread))


def _exponents(surface: LossSurface) -> dict[str, float]:
    total = surface.alpha + surface.beta
    size = surface.beta / total
    return {"flops_per_token": size, "tokens": 1 - size, "loss": -surface.alpha * surface.beta / total}


def _planted(design: Design, surface: LossSurface) -> tuple[Bowls, Floats]:
    """Return the bowls of a design and the planted log losses, [runs, budgets]."""
    columns = as_points(budgets=design.budgets), as_points(sizes=design.sizes)
    if design.run_noise < 0 or design.point_noise < 0 or (isinstance(design, SweepDesign) and design.seeds < 1):
        raise FitError("noises of 0 or more and at least one seed are wanted")
    log_flops = np.log(np.sort(columns[0]["budgets"]))
    if isinstance(design, RunsDesign):
        log_size = np.log(columns[1]["sizes"])
        order = np.argsort(log_size, kind="stable")
        served = [as_points(served=design.served[place])["served"] for place in order]
        present = np.array([np.isin(log_flops, np.log(each)) for each in served])
        log_size = log_size[order]
    else:
        log_size, present = _grid(design, np.log(np.sort(columns[1]["sizes"])), log_flops, surface)
    with np.errstate(divide="ignore"):
        losses = np.log(surface(np.exp(log_size)[:, None], np.exp(log_flops[None] - log_size[:, None])))
    return Bowls(log_flops, log_size, present), losses


def _grid(
    design: SweepDesign, log_sizes: Floats, log_flops: Floats, surface: LossSurface
) -> tuple[Floats, NDArray[np.bool_]]:
    """Return the sizes of the runs of a grid, and whether a run serves a budget, [runs, budgets]."""
    repeats = design.seeds * (1 if design.shares_runs else len(log_flops))
    log_size = np.repeat(log_sizes, repeats)
    present = np.ones((len(log_size), len(log_flops)), dtype=bool)
    if not design.shares_runs:
        own = np.tile(np.arange(repeats) // design.seeds, len(log_sizes))
        present &= own[:, None] == np.arange(len(log_flops))[None]
    if design.window is not None:
        present &= np.abs(log_size[:, None] - _log_optimum(log_flops, surface)[None]) <= np.log(design.window)
    return log_size, present


def _log_optimum(log_flops: Floats, surface: LossSurface) -> Floats:
    total = surface.alpha + surface.beta
    ratio = np.log(surface.alpha * surface.A / (surface.beta * surface.B)) / total
    return ratio + log_flops * surface.beta / total


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
