"""The record of a fit: a law file that plans read, the rest of the evidence as plain values, tables, a summary."""

from __future__ import annotations

import csv
import io
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
from pydantic import ValidationError

from megadiff.files import write_atomically
from megadiff.scaling.batch_laws import BatchLaws
from megadiff.scaling.fit import PowerLaw, Surface
from megadiff.scaling.fit_results import NoiseFits, Results
from megadiff.scaling.isoflop import IsoFlop, SingleBowl
from megadiff.scaling.laws import Estimate, Excluded, Law, LawFile, UnseenPoint, write_law_file
from megadiff.scaling.points import Gathered
from megadiff.scaling.resampling import Fit, FitError, Floats, widening
from megadiff.scaling.surface_fit import floor_term

KEPT_DRAWS = 200
"""Number of draws written with a law."""

Written = tuple[Law, dict[str, Any]]
"""A law, and evidence about it for which the law file has no key."""


def law_file(results: Results, name: str, written: Sequence[Written]) -> LawFile:
    """Return the laws as a file that `laws.write_law_file` writes and `megadiff plan --laws` reads.

    Args:
        results: fits.
        name: word for the file in messages.
        written: their laws (`written_laws`).

    Raises:
        FitError: there is no law that the format can hold.
    """
    if not written:
        raise FitError("these points determine no law that a law file can hold")
    gathered, reservations = results.gathered, results.reservations
    runs = len({point.run for point in gathered.counted})
    return LawFile(
        name=name,
        source=f"megadiff fit_scaling of {gathered.source}",
        summary=f"Intervals cover {100 * results.level:g} % and hold the luck of whole runs, not the choice of form.",
        valid={**_ranges(results), **gathered.setting_ranges},
        runs=runs,
        provisional=bool(reservations),
        provisional_reasons=reservations,
        excluded=tuple(Excluded(run=e.run, reason=e.reason, detail=e.detail) for e in gathered.excluded),
        laws=tuple(law for law, _ in written),
    )


def _ranges(results: Results) -> dict[str, tuple[float, float]]:
    counted = results.gathered.counted
    found = {}
    for name in ("flops", "tokens", "flops_per_token", "params", "batch_tokens", "learning_rate"):
        values = [value for point in counted if (value := getattr(point, name)) is not None]
        if values:
            found[name] = (float(min(values)), float(max(values)))
    return found


def written_laws(results: Results) -> list[Written]:
    """Return every law with its evidence; one that the format cannot hold, such as a factor of 0, is left out."""
    found: list[Written] = []
    for fits in results.noises:
        for fields, more in _laws_of(fits):
            fields = {key: value for key, value in fields.items() if value is not None}
            try:
                law = Law(
                    noise=fits.noise,
                    flop_count=results.gathered.flop_count,
                    confidence=results.level,
                    provisional=bool(results.reservations),
                    **fields,
                )
            except ValidationError:
                continue
            found.append((law, more))
    return found


def _laws_of(fits: NoiseFits) -> Iterator[tuple[dict[str, Any], dict[str, Any]]]:
    """Yield the keys of each law of a noise, and its evidence."""
    if fits.isoflop is not None:
        held = _held_out(fits.isoflop)
        by_estimator = {"vertex": fits.isoflop.laws, "best_run": fits.isoflop.envelope}
        if fits.isoflop.single is not None:
            by_estimator["single_bowl"] = fits.isoflop.single.laws
        for estimator, laws in by_estimator.items():
            for quantity, law in laws.items():
                unseen = held.get(quantity, ()) if estimator == "vertex" else ()
                fields, more = _power(law, quantity, "flops", estimator)
                yield {**fields, "held_out": unseen}, {**more, "run_noise": fits.isoflop.run_noise}
    for method, law in fits.surfaces.items():
        yield _surface(law, method)
    yield from _of_batches(fits.batches)
    if fits.noise_scale is not None:
        yield _power(fits.noise_scale, "noise_scale", "tokens", "measured")
    for quantity, name, fit in (
        ("annealing_ratio", "ratio", fits.annealing),
        ("repeat_scale", "r_star", fits.repeats),
    ):
        if fit is not None:
            draws = _finite(fit.draws[name][:KEPT_DRAWS, None])
            fields, more = _errors(fit, {name: "value"}, draws)
            yield {**fields, "quantity": quantity, "form": "constant"}, more


def _of_batches(found: BatchLaws) -> Iterator[tuple[dict[str, Any], dict[str, Any]]]:
    for quantity, of, by_estimator in (
        ("batch_tokens", "tokens", found.batch),
        ("learning_rate", "batch_tokens", found.rate),
    ):
        for estimator, slopes in by_estimator.items():
            fields, more = _power(slopes.pooled, quantity, of, estimator)
            yield fields, {**more, "same_slope_p_value": slopes.p_value, "without_a_slope": slopes.skipped}
            for size, law in slopes.by.items():
                fields, more = _power(law, quantity, of, estimator)
                yield {**fields, "size": size}, more
    if found.token_optimal is not None:
        yield _power(found.token_optimal, "batch_tokens", "tokens", "hyperbola")
    for each in found.iso_losses:
        fields, more = _errors(each.fit, {"s_min": "S_min", "b_min": "B_min", "g": "g"}, None)
        points = {"steps": each.steps, "batches": each.batches}
        rest = {name: each.fit.estimates[name] for name in ("s_opt", "b_opt", "critical_batch")}
        ends = {f"{name}_interval": each.fit.intervals[name] for name in rest}
        yield (
            {**fields, "quantity": "batch_efficiency", "form": "hyperbola", "size": each.size, "at_loss": each.loss},
            {**more, **rest, **ends, **points, "is_inside": each.fit.is_inside},
        )


def _power(law: PowerLaw, quantity: str, of: str, estimator: str) -> tuple[dict[str, Any], dict[str, Any]]:
    names = {"coefficient": "A", "exponent": "alpha"} | ({"floor": "floor"} if law.floor else {})
    logs = _spread(law, law.draws["log_coefficient"], math.log(law.coefficient))
    columns = [np.exp(np.clip(logs, -700, 700)), _spread(law, law.draws["exponent"], law.exponent)]
    columns += [law.draws["floor"][:KEPT_DRAWS]] if law.floor else []
    fields, more = _errors(law, names, _finite(np.column_stack(columns)))
    r_squared = law.r_squared if math.isfinite(law.r_squared) else None
    kind = {"quantity": quantity, "of": of, "form": "power", "estimator": estimator}
    return {**kind, **fields, "valid": {of: law.x_range}, "r_squared": r_squared}, more


def _surface(law: Surface, method: str) -> tuple[dict[str, Any], dict[str, Any]]:
    names = {"E": "E", "A": "a", "alpha": "alpha", "B": "b", "beta": "beta"}
    columns = []
    for name in names:
        value, drawn = law.estimates[name], law.draws[name]
        with np.errstate(all="ignore"):
            is_log = name in ("A", "B")
            spread = _spread(law, np.log(drawn) if is_log else drawn, math.log(value) if is_log else value)
            columns.append(np.exp(spread) if is_log else spread)
    fields, more = _errors(law, names, _finite(np.column_stack(columns)))
    optimal = {
        name: {"value": law.estimates[name], "standard_error": law.standard_errors[name],
               "interval": law.intervals[name]}
        for name in ("size_exponent", "data_exponent", "loss_exponent")
    }  # fmt: skip
    valid = {"flops_per_token": law.n_range, "tokens": law.d_range}
    kind: dict[str, Any] = {"quantity": "loss", "form": "surface", "estimator": method}
    evidence = {**more, "optimum": optimal}
    if (held := law.held_out) is not None:
        kind["held_out"] = (UnseenPoint(at=held.product, predicted=held.predicted_loss, measured=held.loss),)
        evidence["held_out_points"] = held.points
    return {**kind, **fields, "valid": valid}, evidence


def _errors(law: Fit, names: Mapping[str, str], draws: Floats | None) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return a law's parameters with their errors, and the evidence of its fit."""
    parameters = {}
    for name, own in names.items():
        error, ends = law.standard_errors.get(name, math.nan), law.intervals.get(name, (math.nan, math.nan))
        parameters[own] = Estimate(
            value=law.estimates[name],
            standard_error=error if math.isfinite(error) else None,
            interval=(min(ends), max(ends)) if np.isfinite(ends).all() else None,
        )
    kept = None if draws is None or not len(draws) else tuple(map(tuple, draws.tolist()))
    return {"parameters": parameters, "draws": kept, "runs": law.runs}, {
        "points": law.points,
        "degrees_of_freedom": law.dof,
        "convergence": asdict(law.convergence),
        "notes": list(law.notes),
    }


def _finite(draws: Floats) -> Floats:
    """Return the draws, [draws, parameters], that are finite."""
    return draws[np.isfinite(draws).all(axis=1)]


def _spread(law: Fit, drawn: Floats, value: float) -> Floats:
    """Return draws whose own quantiles are the interval: spread for the error of the noise estimate."""
    factor = widening(law.level, law.dof)
    return value + (drawn[:KEPT_DRAWS] - value) * (factor if np.isfinite(factor) else 1.0)


def _held_out(found: IsoFlop) -> dict[str, tuple[UnseenPoint, ...]]:
    held = found.held_out
    if held is None:
        return {}
    return {
        "loss": (UnseenPoint(at=held.flops, predicted=held.predicted_loss, measured=held.loss),),
        "flops_per_token": (UnseenPoint(at=held.flops, predicted=held.predicted_size, measured=held.size),),
    }


def record(results: Results, file: LawFile, written: Sequence[Written]) -> dict[str, Any]:
    """Return everything that was found as plain values: the law file without draws, and the evidence beside it."""
    laws = [{**law.model_dump(mode="json", exclude={"draws"}, exclude_none=True), **more} for law, more in written]
    return plain(
        {
            **file.model_dump(mode="json", exclude={"laws"}),
            "runs_looked_at": results.gathered.runs,
            "laws": laws,
            "bowls": {
                fits.noise: {
                    "run_noise": fits.isoflop.run_noise,
                    "degrees_of_freedom": fits.isoflop.dof,
                    "exponents_add_to": fits.isoflop.exponents_add_to,
                    "coefficients_multiply_to": fits.isoflop.coefficients_multiply_to,
                    "held_out": None if fits.isoflop.held_out is None else asdict(fits.isoflop.held_out),
                    "single": _fit_of_single(fits.isoflop.single),
                    "budgets": [asdict(budget) for budget in fits.isoflop.budgets],
                }
                for fits in results.noises
                if fits.isoflop is not None
            },
            "best_settings": {fits.noise: [asdict(cell) for cell in fits.batches.cells] for fits in results.noises},
            "noise_scales": [asdict(scale) for scale in results.gathered.noise_scales],
            "cooldowns": [asdict(branch) for branch in results.gathered.branches],
            "refusals": {fits.noise: [*fits.refusals, *fits.batches.refusals] for fits in results.noises},
            "paired": [asdict(pair) for pair in results.paired],
            "comparisons": [
                {"first": c.first, "second": c.second, "crossing": asdict(c.crossing),
                 "crossing_is_resolved": c.crossing.is_resolved, "speed_up": asdict(c.speed_up),
                 "size_exponent_gap": c.exponent_gap, "size_exponent_gap_stderr": c.gap_stderr}
                for c in results.comparisons
            ],
        }
    )  # fmt: skip


def _fit_of_single(single: SingleBowl | None) -> dict[str, float] | None:
    """Return how well one bowl fits all budgets; its laws stand among the others."""
    if single is None:
        return None
    return {"curvature": single.curvature, "p_value": single.p_value, "misfit": single.misfit}


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


def summary(results: Results) -> list[str]:
    """Return the lines that the command prints about its fits."""
    lines = []
    for fits in results.noises:
        lines.append(f"{fits.noise}: {len({point.run for point in fits.counted})} runs")
        lines += [f"  {line}" for line in (*_bowl_lines(fits), *_surface_lines(fits, results), *_other_lines(fits))]
    for c in results.comparisons:
        doubts = ["not resolved"] * (not c.crossing.is_resolved) + ["extrapolated"] * c.crossing.is_extrapolated
        resolved = f" ({', '.join(doubts)})" if doubts else ""
        where = "do not cross" if math.isnan(c.crossing.flops) else (
            f"cross at {c.crossing.flops:.3g} FLOPs {_ends(c.crossing.interval, '.3g')}{resolved}")  # fmt: skip
        lines.append(
            f"{c.first} and {c.second}: {where}; the second needs {c.speed_up.ratio:.3g} times the compute "
            f"{_ends(c.speed_up.interval, '.3g')} at a loss of {c.speed_up.loss:.4g}"
            f"{' (extrapolated)' if c.speed_up.is_extrapolated else ''}"
        )
    for pair in results.paired:
        if pair.what == "best":
            d = pair.difference
            lines.append(
                f"best settings at {pair.flops:.3g} FLOPs over {d.sequences:,} sequences: {pair.first.describe()} less "
                f"{pair.second.describe()} {d.difference:+.4f} [{d.low:+.4f}, {d.high:+.4f}] nats per token"
            )
    if any(pair.what == "best" for pair in results.paired):
        lines.append("  these intervals are over sequences, between these runs; other seeds differ by the run noise")
    return [*lines, *(f"provisional: {reason}" for reason in results.reservations)]


def _ends(interval: Sequence[float], form: str) -> str:
    low, high = interval
    return f"[{low:{form}}, {high:{form}}]"


def _bowl_lines(fits: NoiseFits) -> Iterator[str]:
    found = fits.isoflop
    if found is None:
        return
    counted = len(found.counted)
    noise = "" if math.isnan(found.run_noise) else f"; run noise {100 * found.run_noise:.2g} % of the loss"
    yield f"bowls: {counted} of {len(found.budgets)} vertices count{noise}"
    for name, law in found.laws.items():
        yield f"{name} = {law.coefficient:.4g} C^{law.exponent:.4f} {_ends(law.intervals['exponent'], '.4f')}"
    if (single := found.single) is not None:
        law, loss = single.laws["flops_per_token"], single.laws["loss"]
        misfit = "" if math.isnan(single.p_value) else f"; misfit {single.misfit:.3g} (p = {single.p_value:.2g})"
        yield (
            f"a single bowl: M* ~ C^{law.exponent:.4f} {_ends(law.intervals['exponent'], '.4f')}, L* ~ "
            f"C^{loss.exponent:.4f} {_ends(loss.intervals['exponent'], '.4f')}{misfit}"
        )
    yield (
        f"exponents of size and tokens add up to {found.exponents_add_to:.4f}, coefficients multiply to "
        f"{found.coefficients_multiply_to:.4f}"
    )
    if (held := found.held_out) is not None:
        yield (
            f"held out: {held.flops:.3g} FLOPs, loss {held.loss:.4f}, predicted {held.predicted_loss:.4f} "
            f"({held.loss_error_percent:+.2f} %)"
        )


def _surface_lines(fits: NoiseFits, results: Results) -> Iterator[str]:
    for method, law in fits.surfaces.items():
        yield (
            f"surface ({method}): {floor_term(law.E)}{law.A:.4g} M^-{law.alpha:.4f} + {law.B:.4g} D^-{law.beta:.4f}; "
            f"M* ~ C^{law.size_exponent:.4f} {_ends(law.intervals['size_exponent'], '.4f')}; {law.convergence.message}"
        )
        if (held := law.held_out) is not None:
            yield (
                f"  held out: {held.points} point{'s' if held.points > 1 else ''} at {held.product:.3g} FLOPs, mean "
                f"loss {held.loss:.4f}, predicted {held.predicted_loss:.4f} ({held.loss_error_percent:+.2f} %)"
            )
        if results.gathered.flop_count == "chinchilla":
            factor = law.A * 6**-law.alpha
            terms = f"{factor:.4g} P^-{law.alpha:.4f} + {law.B:.4g} D^-{law.beta:.4f}"
            yield f"  over parameters, M = 6 P: {floor_term(law.E)}{terms}"


def _other_lines(fits: NoiseFits) -> Iterator[str]:
    for name, of, by_estimator in (
        ("best batch", "D", fits.batches.batch),
        ("best learning rate", "B", fits.batches.rate),
    ):
        for estimator, slopes in by_estimator.items():
            law = slopes.pooled
            same = "" if math.isnan(slopes.p_value) else f"; one slope for all sizes: p = {slopes.p_value:.2g}"
            interval = _ends(law.intervals["exponent"], ".4f")
            yield f"{name} ({estimator}): {law.coefficient:.4g} {of}^{law.exponent:.4f} {interval}{same}"
    if (law := fits.batches.token_optimal) is not None:
        interval = _ends(law.intervals["exponent"], ".4f")
        yield f"batch of the fewest tokens (hyperbolas): {law.coefficient:.4g} D^{law.exponent:.4f} {interval}"
    for each in fits.batches.iso_losses:
        found = each.fit.estimates
        yield (
            f"hyperbola of {each.size} at a loss of {each.loss:.3f}: fewest tokens at a batch of {found['b_opt']:.3g}, "
            f"20 % more at {found['critical_batch']:.3g} {_ends(each.fit.intervals['critical_batch'], '.3g')}"
        )
    if (law := fits.noise_scale) is not None:
        interval = _ends(law.intervals["exponent"], ".4f")
        yield f"gradient noise scale, tokens: {law.coefficient:.4g} D^{law.exponent:.4f} {interval}"
    if (fit := fits.annealing) is not None:
        yield (
            f"a cooldown divides the loss by {fit.estimates['ratio']:.4f} {_ends(fit.intervals['ratio'], '.4f')}, from "
            f"{fit.points} branches of {fit.runs} trunks"
        )
    if (fit := fits.repeats) is not None:
        yield f"repeated data: R* = {fit.estimates['r_star']:.3g} {_ends(fit.intervals['r_star'], '.3g')}"


_COLUMNS = ("run", "noise", "flops", "flops_per_token", "tokens", "params", "loss", "loss_stderr", "batch_tokens",
            "learning_rate", "seed", "unique_tokens", "excluded")  # fmt: skip


def write_fit(results: Results, folder: Path) -> dict[str, Any]:
    """Write `law.yaml`, `fit.json`, `points.csv` and `excluded.csv` into a folder; return the content of `fit.json`.

    Raises:
        OSError: the folder cannot be written.
        FitError: there is no law that a law file can hold.
    """
    name = folder.resolve().name or "fits"
    written = written_laws(results)
    laws = law_file(results, name, written)
    found = record(results, laws, written)
    folder.mkdir(parents=True, exist_ok=True)
    write_law_file(folder / "law.yaml", laws)
    write_atomically(folder / "fit.json", json.dumps(found, indent=1) + "\n")
    write_points(results.gathered, folder)
    return found


def write_points(gathered: Gathered, folder: Path) -> None:
    """Write `points.csv` and `excluded.csv` into a folder, which need no law.

    Raises:
        OSError: the folder cannot be written.
    """
    folder.mkdir(parents=True, exist_ok=True)
    write_atomically(folder / "points.csv", _points_table(gathered))
    excluded = [["run", "reason", "detail"], *([e.run, e.reason, e.detail] for e in gathered.excluded)]
    write_atomically(folder / "excluded.csv", _as_csv(excluded))


def _points_table(gathered: Gathered) -> str:
    """Return all points, and a row with the reason for each run that has none."""
    rows: list[list[Any]] = [list(_COLUMNS)]
    rows += [["" if (v := getattr(point, name)) is None else v for name in _COLUMNS] for point in gathered.points]
    reasons = {found.run: f"{found.reason}: {found.detail}" for found in gathered.excluded}
    rows += [[run, *[""] * (len(_COLUMNS) - 2), reason] for run, reason in reasons.items()]
    return _as_csv(rows)


def _as_csv(rows: Sequence[Sequence[Any]]) -> str:
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows(rows)
    return text.getvalue()
