"""Power before cost: a sweep simulated under a stated run-to-run noise, before anything is trained.

The design is fitted as `fit_scaling` fits it. The simulation gives the standard error and bias of each exponent that
the sweep can hope for, how many budgets have a vertex that counts, and the chance to tell two noise processes apart.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from megadiff.scaling.isoflop import Bowls, laws_of
from megadiff.scaling.resampling import LEVEL, FitError, Floats, as_points, t_width


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
