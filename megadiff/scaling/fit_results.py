"""All fits of a gathered sweep, and what is written of them: laws as a plain mapping, with reservations by name."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from megadiff.scaling.comparisons import Crossing, SpeedUp, crossing, speed_up
from megadiff.scaling.fit import PowerLaw, SlopesByGroup, Surface, slopes_by, surface
from megadiff.scaling.isoflop import IsoFlop, isoflop
from megadiff.scaling.points import Gathered, Point
from megadiff.scaling.resampling import LEVEL, Fit, FitError, Floats, widening

GOOD_BUDGETS, HELD_OUT_PERCENT = 5, 1.5
KEPT_DRAWS = 200
"""Number of draws written with a law."""


@dataclass(frozen=True)
class NoiseFits:
    """The fits of one noise; a fit that was refused is missing, with its sentence among the refusals."""

    noise: str
    points: tuple[Point, ...]
    isoflop: IsoFlop | None
    surfaces: dict[str, Surface]
    batch: SlopesByGroup | None
    """Best batch over tokens, by size."""
    rate: SlopesByGroup | None
    """Best learning rate over the best batch, by size."""
    refusals: tuple[str, ...]
    edge_cells: tuple[str, ...]
    """Budgets whose best batch or learning rate lies at the edge of the grid."""


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

    @property
    def reservations(self) -> tuple[str, ...]:
        """Reasons why the laws are provisional, one sentence each; none if they are not."""
        found = [
            f"{len([e for e in self.gathered.excluded if e.reason == reason])} run(s) left out: {reason}"
            for reason in dict.fromkeys(e.reason for e in self.gathered.excluded)
            if reason != "duplicate"
        ]
        for fits in self.noises:
            found += [f"{fits.noise}: {sentence}" for sentence in (*fits.refusals, *fits.edge_cells)]
            if fits.isoflop is None:
                continue
            found += [f"{fits.noise}: {sentence}" for sentence in _budget_notes(fits.isoflop)]
            counted = sum(not budget.excluded for budget in fits.isoflop.budgets)
            if counted < GOOD_BUDGETS:
                found.append(f"{fits.noise}: the laws rest on {counted} budgets")
            held = fits.isoflop.held_out
            if held is not None and abs(held.loss_error_percent) > HELD_OUT_PERCENT:
                found.append(
                    f"{fits.noise}: the largest budget's loss is predicted {held.loss_error_percent:+.2f} % off"
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
        FitError: no fit of any noise is possible.
    """
    noises = []
    for noise in dict.fromkeys(point.noise for point in gathered.points):
        points = [point for point in gathered.points if point.noise == noise]
        noises.append(_fits_of(noise, points, level, draws, seed, run_noise))
    if not any(fits.isoflop or fits.surfaces or fits.batch for fits in noises):
        raise FitError(f"these points determine no law: {'; '.join(noises[0].refusals)}")
    solved = [fits for fits in noises if fits.isoflop is not None]
    pairs = [(a, b) for place, a in enumerate(solved) for b in solved[place + 1 :]]
    return Results(gathered, tuple(noises), tuple(_compared(a, b) for a, b in pairs), level)


def _fits_of(
    noise: str, points: Sequence[Point], level: float, draws: int, seed: int, run_noise: float | None
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
        found = tried(f"surface ({method})", lambda m=method: surface(size, tokens, loss, m, groups=runs, **options))
        if found is not None:
            surfaces[method] = found
    batch, rate, edges = _batch_and_rate(points, level)
    return NoiseFits(noise, tuple(points), bowls, surfaces, batch, rate, tuple(refusals), tuple(edges))


def _batch_and_rate(
    points: Sequence[Point], level: float
) -> tuple[SlopesByGroup | None, SlopesByGroup | None, list[str]]:
    """Return the laws of the best batch and rate, and the cells whose best lies at an edge of the grid."""
    cells: dict[tuple[float, float], list[Point]] = {}
    for point in points:
        if point.batch_tokens is not None:
            cells.setdefault((point.flops_per_token, point.flops), []).append(point)
    found, edges = [], []
    for (size, flops), members in cells.items():
        batches = sorted({point.batch_tokens for point in members if point.batch_tokens is not None})
        if len(batches) < 3:
            continue
        best = min(members, key=lambda point: point.loss)
        if best.batch_tokens in (batches[0], batches[-1]):
            edges.append(f"edge optimum: the best batch of {size:.3g} FLOPs per token at {flops:.3g} FLOPs is the "
                         f"{'smallest' if best.batch_tokens == batches[0] else 'largest'} of its grid")  # fmt: skip
            continue
        found.append(best)
    if len(found) < 3:
        return None, None, edges
    labels, runs = [f"{point.flops_per_token:.4g}" for point in found], [point.run for point in found]
    try:
        batch = slopes_by(
            [point.tokens for point in found], [point.batch_tokens for point in found], labels, runs, level=level
        )
    except FitError:
        return None, None, edges
    rate = None
    if all(point.learning_rate is not None for point in found):
        try:
            rate = slopes_by(
                [point.batch_tokens for point in found],
                [point.learning_rate for point in found],
                labels,
                runs,
                level=level,
            )
        except FitError:
            rate = None
    return batch, rate, edges


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


def as_mapping(results: Results) -> dict[str, Any]:
    """Return the laws as plain values for YAML or JSON: no arrays, and null for what is not known."""
    laws: list[dict[str, Any]] = []
    for fits in results.noises:
        common = {"noise": fits.noise, "flop_count": results.gathered.flop_count, "confidence": results.level}
        if fits.isoflop is not None:
            held = _held_out(fits.isoflop)
            for estimator, found in (("vertex", fits.isoflop.laws), ("best_run", fits.isoflop.envelope)):
                laws += [
                    {**common, "quantity": name, "of": "flops", "estimator": estimator, **_power(law, "flops"),
                     "run_noise": fits.isoflop.run_noise,
                     "held_out": held.get(name, []) if estimator == "vertex" else []}
                    for name, law in found.items()
                ]  # fmt: skip
        laws += [
            {**common, "quantity": "loss", "estimator": method, **_surface(law)}
            for method, law in fits.surfaces.items()
        ]
        for name, of, slopes in (("batch_tokens", "tokens", fits.batch), ("learning_rate", "batch_tokens", fits.rate)):
            if slopes is None:
                continue
            for size, law in [("all", slopes.pooled), *slopes.by.items()]:
                laws.append(
                    {**common, "quantity": name, "of": of, "size": size, "estimator": "best_run", **_power(law, of)}
                )
            laws[-1 - len(slopes.by)]["same_slope_p_value"] = slopes.p_value
    reservations = results.reservations
    counted = results.gathered.counted
    return plain(
        {
            "source": results.gathered.source,
            "runs": len({point.run for point in counted}),
            "runs_looked_at": results.gathered.runs,
            "provisional": bool(reservations),
            "provisional_reasons": list(reservations),
            "range": {
                name: [min(values), max(values)]
                for name in ("flops", "tokens", "flops_per_token", "params")
                if (values := [value for point in counted if (value := getattr(point, name)) is not None])
            },
            "excluded": [
                {"run": left.run, "reason": left.reason, "detail": left.detail} for left in results.gathered.excluded
            ],
            "laws": laws,
            "comparisons": [
                {"first": c.first, "second": c.second, "crossing_flops": c.crossing.flops,
                 "crossing_interval": c.crossing.interval, "crossing_is_resolved": c.crossing.is_resolved,
                 "crossing_is_extrapolated": c.crossing.is_extrapolated, "speed_up": c.speed_up.ratio,
                 "speed_up_interval": c.speed_up.interval, "speed_up_at_loss": c.speed_up.loss,
                 "size_exponent_gap": c.exponent_gap, "size_exponent_gap_stderr": c.gap_stderr}
                for c in results.comparisons
            ],
        }
    )  # fmt: skip


def _power(law: PowerLaw, of: str) -> dict[str, Any]:
    names = {"coefficient": "A", "exponent": "alpha"} | ({"floor": "floor"} if law.floor else {})
    logs = _spread(law, law.draws["log_coefficient"], math.log(law.coefficient))
    columns = [np.exp(np.clip(logs, -700, 700)), _spread(law, law.draws["exponent"], law.exponent)]
    columns += [law.draws["floor"][:KEPT_DRAWS]] if law.floor else []
    return {"form": "power", **_errors(law, names, columns), "valid": {of: law.x_range}, "r_squared": law.r_squared}


def _surface(law: Surface) -> dict[str, Any]:
    names = {"E": "E", "A": "a", "alpha": "alpha", "B": "b", "beta": "beta"}
    columns = []
    for name in names:
        value, drawn = law.estimates[name], law.draws[name]
        is_log = name in ("A", "B")
        spread = _spread(law, np.log(drawn) if is_log else drawn, math.log(value) if is_log else value)
        columns.append(np.exp(spread) if is_log else spread)
    optimal = {
        name: {
            "value": law.estimates[name],
            "standard_error": law.standard_errors[name],
            "interval": law.intervals[name],
        }
        for name in ("size_exponent", "data_exponent", "loss_exponent")
    }
    valid = {"flops_per_token": law.n_range, "tokens": law.d_range}
    return {"form": "surface", **_errors(law, names, columns), "valid": valid, "optimum": optimal}


def _errors(law: Fit, names: Mapping[str, str], columns: Sequence[Floats]) -> dict[str, Any]:
    parameters = {
        own: {
            "value": law.estimates[name],
            "standard_error": law.standard_errors[name],
            "interval": None if not np.isfinite(law.intervals[name]).all() else law.intervals[name],
        }
        for name, own in names.items()
    }
    drawn = np.column_stack(columns) if len(columns[0]) else np.empty((0, len(names)))
    drawn = drawn[np.isfinite(drawn).all(axis=1)]
    return {
        "parameters": parameters,
        "draws": drawn.tolist() or None,
        "runs": law.runs,
        "points": law.points,
        "degrees_of_freedom": law.dof,
        "convergence": law.convergence.message,
        "notes": list(law.notes),
    }


def _spread(law: Fit, drawn: Floats, value: float) -> Floats:
    """Return draws whose own quantiles are the interval: spread for the error of the noise estimate."""
    factor = widening(law.level, law.dof)
    return value + (drawn[:KEPT_DRAWS] - value) * (factor if np.isfinite(factor) else 1.0)


def _held_out(found: IsoFlop) -> dict[str, list[dict[str, float]]]:
    held = found.held_out
    if held is None:
        return {}
    return {
        "loss": [{"at": held.flops, "predicted": held.predicted_loss, "measured": held.loss}],
        "flops_per_token": [{"at": held.flops, "predicted": held.predicted_size, "measured": held.size}],
    }


def plain(value: Any) -> Any:
    """Return the same tree with plain numbers, and None for numbers that are not finite."""
    if isinstance(value, Mapping):
        return {str(key): plain(part) for key, part in value.items()}
    if isinstance(value, list | tuple):
        return [plain(part) for part in value]
    if isinstance(value, bool | np.bool_):
        return bool(value)
    if isinstance(value, int | np.integer):
        return int(value)
    if isinstance(value, float | np.floating):
        return float(value) if math.isfinite(value) else None
    return value
