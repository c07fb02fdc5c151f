"""Points of scaling fits from run folders or a CSV file, with every run that is left out and the reason.

A point is a loss at a budget of compute. A run folder gives a point for each budget that its curve covers: the loss is
a local linear fit over the log of tokens, within the run's stable stretch. A sweep is never complete, so a run that
cannot be used is excluded by name, and the fit goes on without it.
"""

from __future__ import annotations

import csv
import io
import math
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from megadiff.errors import DataError
from megadiff.files import UnreadableFileError, read_text, why
from megadiff.scaling.flops import FlopCount
from megadiff.scaling.resampling import cell_codes
from megadiff.scaling.run_curves import (
    HARMLESS,
    NoiseScale,
    RunCurve,
    flops_per_token_of,
    is_under,
    loss_at,
    noise_name,
    params_of,
    read_run,
)
from megadiff.scaling.sweep_runs import REPEATED_EPOCHS

REASONS = (
    "diverged", "unfinished", "changed settings", "other settings", "other data", "duplicate", "NaN", "unreadable",
    "too short", "no trunk",
)  # fmt: skip
"""Reasons for which a whole run is left out."""

SWEPT = (
    "name", "output_dir", "seed", "model.layers", "model.hidden", "model.heads", "model.ffn_multiple", "noise",
    "model.kv_heads", "model.head_dim", "model.ffn_hidden",
    "method.name", "batch.global_batch_size", "batch.micro_batch_size", "optimizer.lr", "optimizer.beta2", "schedule",
)  # fmt: skip
"""Settings, or sections, in which runs of one sweep may differ."""
COLUMNS = ("run", "noise", "flops", "tokens", "flops_per_token", "params", "loss", "loss_stderr", "batch_tokens",
           "learning_rate", "seed", "status", "unique_tokens")  # fmt: skip
"""Columns of a CSV file that mean something; `loss` is needed, and two of flops, tokens and size."""


BEATEN, REPEATED = "another batch or learning rate is better", "its data are repeated"
OUTLIER = "its loss is among the highest"
"""Reasons for which a point is left out while its run is not."""


@dataclass(frozen=True)
class Point:
    """The loss of a run at a budget."""

    run: str
    noise: str
    flops: float
    flops_per_token: float
    tokens: float
    loss: float
    loss_stderr: float | None = None
    params: float | None = None
    batch_tokens: float | None = None
    learning_rate: float | None = None
    seed: str = ""
    excluded: str = ""
    """Reason why the point is left out; empty if it counts."""
    unique_tokens: float | None = None
    """Number of different tokens among `tokens`; None if it is not known."""
    step: float | None = None
    """Step of the run at the budget, in real numbers; None if it is not known."""

    @property
    def is_candidate(self) -> bool:
        """Whether the point is left out at most because another batch or learning rate is better."""
        return self.excluded in ("", BEATEN)


@dataclass(frozen=True)
class Exclusion:
    """A run that is left out."""

    run: str
    reason: str
    """Reason, one of `REASONS`."""
    detail: str


@dataclass(frozen=True)
class Branch:
    """A cooldown from a checkpoint of another run, beside that run's loss without one."""

    run: str
    trunk: str
    noise: str
    tokens: float
    """Tokens at the end of the branch, at which both losses are taken."""
    unannealed: float
    annealed: float
    batch_tokens: float | None = None


@dataclass(frozen=True)
class Gathered:
    """The points of a sweep and the runs left out of it."""

    points: tuple[Point, ...]
    excluded: tuple[Exclusion, ...]
    flop_count: FlopCount
    source: str
    runs: int
    """Number of runs that were looked at."""
    noise_scales: tuple[NoiseScale, ...] = ()
    """Gradient noise scales of the runs that count."""
    branches: tuple[Branch, ...] = ()
    """Cooldown branches with their trunks."""
    notes: tuple[str, ...] = ()
    """Reservations about the points as a whole, a sentence each."""
    setting_ranges: Mapping[str, tuple[float, float]] = field(default_factory=dict)
    """Smallest and largest value of settings that laws depend on, such as `seq_length`."""

    @property
    def counted(self) -> list[Point]:
        """Points that are not left out."""
        return [point for point in self.points if not point.excluded]


def from_runs(
    folders: Sequence[Path],
    *,
    budgets: Sequence[float] | None = None,
    flop_count: FlopCount = "deepseek",
    min_steps: int = 5000,
    window: float = 1.25,
    kept: Iterable[str] = (),
    varied: Iterable[str] = (),
) -> Gathered:
    """Gather the points of run folders, none at all if no run can be used.

    Args:
        folders: run folders.
        budgets: FLOPs; None takes those at which the runs were evaluated (`eval.at_flops`), or budgets a factor 2
            apart, if at least three sizes cover them. A run that names its own gives no loss at another's.
        flop_count: `deepseek` or `chinchilla`.
        min_steps: points before this step, or before three times the warm-up, are not taken.
        window: factor of tokens around a budget within which the curve is fitted, and up to which two evaluations lie
            apart between which a loss at a budget of `budgets` is interpolated.
        kept: reasons of `REASONS` for which runs are not left out.
        varied: settings beside `SWEPT` in which the runs may differ.

    Raises:
        DataError: one of them is no folder.
    """
    unique = list({folder.resolve(): folder for folder in folders}.values())
    read = [read_run(folder, min_steps) for folder in unique]
    runs = [run for run in read if run.trunk is None]
    problems = _problems(runs, (*SWEPT, *varied))
    excluded = [
        Exclusion(run.name, *problem)
        for run, problem in zip(runs, problems, strict=True)
        if problem is not None and problem[0] not in kept
    ]
    left_out = {found.run for found in excluded}
    usable = [run for run in runs if run.name not in left_out and len(run.tokens)]
    sizes = {run.name: flops_per_token_of(run.settings, flop_count) for run in usable}
    own = {} if budgets else {run.name: found for run in usable if (found := _own_budgets(run, flop_count))}
    chosen = sorted(budgets) if budgets else _budgets(usable, sizes, own)
    points = [
        point
        for run in usable
        for point in _points_of(
            run,
            sizes[run.name],
            [budget for budget in chosen if _takes(own.get(run.name), budget)],
            window,
            widest=window if budgets or run.name in own else math.inf,
        )
    ]
    bare = [run for run in usable if not any(point.run == run.name for point in points)]
    excluded += [Exclusion(run.name, "too short", "its curve covers none of the budgets") for run in bare]
    branches, lost = pair_branches([run for run in read if run.trunk is not None], usable, window, kept)
    excluded += lost
    return Gathered(
        points=tuple(best_of_settings(without_repeats(points))),
        excluded=tuple(excluded),
        flop_count=flop_count,
        source=f"{len(unique)} run folders",
        runs=len(read),
        noise_scales=tuple(scale for run in usable for scale in run.noise_scales),
        branches=tuple(branches),
        notes=tuple(_mixed_losses(usable)),
        setting_ranges=_setting_ranges(usable),
    )


def _setting_ranges(runs: Sequence[RunCurve]) -> dict[str, tuple[float, float]]:
    """Return the smallest and largest sequence length and vocabulary; of runs that record no vocabulary, none."""
    values = {
        "seq_length": [float(run.setting("model.seq_length")) for run in runs],
        "vocab_size": [run.vocab_size for run in runs if run.vocab_size is not None],
    }
    return {name: (min(found), max(found)) for name, found in values.items() if found}


def _mixed_losses(runs: Sequence[RunCurve]) -> list[str]:
    trained = [run for run in runs if run.is_training_loss]
    if not trained or len(trained) == len(runs):
        return []
    named = ", ".join(run.name for run in trained[:3]) + (" and others" if len(trained) > 3 else "")
    return [f"{len(trained)} of {len(runs)} runs have too few evaluations, so training losses stand in ({named})"]


def pair_branches(
    branches: Sequence[RunCurve], trunks: Sequence[RunCurve], window: float, kept: Iterable[str] = ()
) -> tuple[list[Branch], list[Exclusion]]:
    """Return each branch beside its trunk, and the branches that have none or cannot be used.

    The trunk is the run whose folder the branch's settings name, or else the one of that name: sweeps get moved.
    """
    found, excluded = [], []
    for branch in branches:
        if branch.problem is not None and branch.problem[0] not in kept:
            excluded.append(Exclusion(branch.name, *branch.problem))
            continue
        assert branch.trunk is not None
        exact = [run for run in trunks if Path(run.name).resolve() == branch.trunk.resolve()]
        named = exact or [run for run in trunks if Path(run.name).resolve().name == branch.trunk.name]
        if len(named) != 1:
            detail = f"the run {branch.trunk.name} that it branched from is not among those that count"
            excluded.append(Exclusion(branch.name, "no trunk", detail))
            continue
        trunk = named[0]
        if branch.end is None or branch.is_training_loss != trunk.is_training_loss:
            excluded.append(Exclusion(branch.name, "too short", "it has no loss of its trunk's kind at its end"))
            continue
        if branch.data and trunk.data and branch.data != trunk.data:
            excluded.append(Exclusion(branch.name, "other data", "its data are not its trunk's"))
            continue
        tokens, annealed = branch.end
        unannealed = loss_at(trunk.tokens, trunk.loss, trunk.stderr, tokens, window)
        if unannealed is None:
            detail = f"its trunk has no loss before a cooldown at {tokens:.4g} tokens, where the branch ends"
            excluded.append(Exclusion(branch.name, "no trunk", detail))
            continue
        batch = _batch_tokens(branch)
        found.append(
            Branch(branch.name, trunk.name, noise_name(branch.settings), tokens, unannealed[0], annealed, batch)
        )
    return found, excluded


def _problems(runs: Sequence[RunCurve], swept: Sequence[str]) -> list[tuple[str, str] | None]:
    """Return each run's problem: its own, or one that shows in comparison with the others."""
    problems = [run.problem for run in runs]
    data = Counter(run.data for run in runs if run.problem is None and run.data)
    usual_data = data.most_common(1)[0][0] if data else ""
    keys = {
        key for run in runs if run.problem is None for key in run.settings if not is_under(key, (*swept, *HARMLESS))
    }
    usual = {
        key: Counter(repr(run.setting(key)) for run in runs if run.problem is None).most_common(1)[0][0] for key in keys
    }
    seen: dict[str, str] = {}
    for place, run in enumerate(runs):
        if problems[place] is not None:
            continue
        try:
            flops_per_token_of(run.settings, "deepseek")
        except ValueError as error:
            problems[place] = ("unreadable", str(error))
            continue
        if run.data and run.data != usual_data:
            problems[place] = (
                "other data",
                f"its data have the fingerprint {run.data[:12]}, the others' {usual_data[:12]}",
            )
            continue
        others = [key for key in sorted(keys) if repr(run.setting(key)) != usual[key] and not key.startswith("data")]
        if others:
            key = others[0]
            problems[place] = ("other settings", f"its {key} is {run.setting(key)!r}, the others' {usual[key]}")
            continue
        own = {k: v for k, v in run.settings.items() if k not in ("name", "output_dir") and not is_under(k, HARMLESS)}
        described = repr(sorted(own.items(), key=lambda item: item[0]))
        if described in seen:
            problems[place] = ("duplicate", f"its settings and seed are those of {seen[described]}")
        else:
            seen[described] = run.name
    return problems


def _own_budgets(run: RunCurve, count: FlopCount) -> list[float]:
    """Return the budgets at which a run was to be evaluated, by the FLOP count of the fit; empty if it names none."""
    named = run.setting("eval.at_flops")
    if run.setting("schedule.flop_count") != count or not isinstance(named, list):
        return []
    return [float(budget) for budget in named if isinstance(budget, int | float) and 0 < budget < 1e40]


def _takes(own: Sequence[float] | None, budget: float) -> bool:
    """Return whether a run with these budgets of its own has a loss at a budget; one that names none has at any."""
    return not own or any(math.isclose(each, budget, rel_tol=1e-6) for each in own)


def _budgets(
    runs: Sequence[RunCurve], sizes: Mapping[str, float], own: Mapping[str, Sequence[float]], most: int = 12
) -> list[float]:
    """Return the budgets at which the runs were evaluated, or budgets a factor 2 apart, downward from the largest.

    Three sizes must cover each; a run with budgets of its own covers no others.
    """

    def covered(budget: float) -> int:
        slack = 1.02
        return len({
            sizes[run.name] for run in runs
            if _takes(own.get(run.name), budget)
            and run.tokens[0] / slack <= budget / sizes[run.name] <= run.tokens[-1] * slack
        })  # fmt: skip

    planned = {budget for budgets in own.values() for budget in budgets}
    if found := [budget for budget in sorted(planned) if covered(budget) >= 3]:
        return found
    ends: dict[float, float] = {}
    for run in runs:
        size = sizes[run.name]
        if run.name not in own:
            ends[size] = max(ends.get(size, 0.0), size * run.tokens[-1])
    if len(ends) < 3:
        return []
    top = sorted(ends.values())[-3]
    for step in range(most):
        if covered(top / 2**step) < 3:
            break
        found.append(top / 2**step)
    return sorted(found)


def _points_of(run: RunCurve, size: float, budgets: Sequence[float], window: float, widest: float) -> Iterable[Point]:
    rate = run.setting("optimizer.lr")
    for budget in budgets:
        tokens = budget / size
        found = loss_at(run.tokens, run.loss, run.stderr, tokens, window, widest)
        if found is None:
            continue
        yield Point(
            run=run.name,
            noise=noise_name(run.settings),
            flops=budget,
            flops_per_token=size,
            tokens=tokens,
            loss=found[0],
            loss_stderr=found[1],
            params=params_of(run.settings),
            batch_tokens=_batch_tokens(run),
            learning_rate=float(rate) if isinstance(rate, int | float) else None,
            seed=str(run.setting("seed")),
            unique_tokens=run.unique_tokens(tokens),
            step=run.step_at(tokens),
        )


def _batch_tokens(run: RunCurve) -> float | None:
    batch, seq = run.setting("batch.global_batch_size"), run.setting("model.seq_length")
    return float(batch * seq) if isinstance(batch, int) and isinstance(seq, int) else None


def size_name(point: Point) -> str:
    """Return a short name of a point's model size."""
    if point.params is None:
        return f"{point.flops_per_token:.4g} FLOPs per token"
    for unit, letter in ((1e9, "B"), (1e6, "M"), (1e3, "k")):
        if point.params >= unit:
            return f"{point.params / unit:.4g}{letter}"
    return f"{point.params:.4g}"


def without_highest(gathered: Gathered, count: int) -> Gathered:
    """Return the points without the ones of the highest losses that count, marked as outliers."""
    losses = sorted((point.loss for point in gathered.counted), reverse=True)
    if count >= len(losses):
        raise DataError(f"leaving out the {count} highest losses leaves none of {len(losses)} points")
    limit = losses[count]
    points = tuple(
        replace(point, excluded=OUTLIER) if not point.excluded and point.loss > limit else point
        for point in gathered.points
    )
    return replace(gathered, points=points, notes=(*gathered.notes, f"the {count} highest losses are left out"))


def without_repeats(points: Sequence[Point]) -> list[Point]:
    """Mark the points whose tokens were seen more than one and a half times: the laws are of new data."""
    return [
        replace(point, excluded=REPEATED)
        if not point.excluded and point.unique_tokens and point.tokens > REPEATED_EPOCHS * point.unique_tokens
        else point
        for point in points
    ]


def best_of_settings(points: Sequence[Point]) -> list[Point]:
    """Mark the points whose batch or learning rate another one beats at the same noise, size and budget.

    Seeds of one setting are compared by their mean and stay together.
    """
    places = [place for place, point in enumerate(points) if not point.excluded]
    members: dict[tuple[Any, ...], dict[tuple[Any, ...], list[int]]] = {}
    for noise in dict.fromkeys(points[place].noise for place in places):
        own = [place for place in places if points[place].noise == noise]
        keys = cell_codes([points[place].flops_per_token for place in own], [points[place].flops for place in own])
        for place, cell in zip(own, keys, strict=True):
            setting = (points[place].batch_tokens, points[place].learning_rate)
            members.setdefault((noise, *cell), {}).setdefault(setting, []).append(place)
    found = list(points)
    for settings in members.values():
        means = {key: np.mean([points[place].loss for place in places]) for key, places in settings.items()}
        best = min(means, key=lambda key: means[key])
        for key, places in settings.items():
            for place in places if key != best else []:
                found[place] = replace(points[place], excluded=BEATEN)
    return found


_MAX_CSV_BYTES, _MAX_CSV_ROWS = 2**26, 200_000
_MAX_HEAD = 100_000
_NUMBERS = ("flops", "tokens", "flops_per_token", "params", "loss", "loss_stderr", "batch_tokens", "learning_rate",
            "unique_tokens")  # fmt: skip


def from_csv(path: Path, names: Mapping[str, str] | None = None, *, flop_count: FlopCount | None = None) -> Gathered:
    """Gather the points of a CSV file, a point a row, none at all if no row can be used.

    Args:
        path: the file; its first row names the columns.
        names: the file's name of each column of `COLUMNS` that is called otherwise or has another unit; `N*1e6` is the
            column N in units of a million.
        flop_count: count of the file's FLOPs; `chinchilla` takes FLOPs per token as 6 times the parameters. None takes
            it where parameters are all that says the size or agree with the FLOPs, and `deepseek` otherwise.

    Raises:
        DataError: the file cannot be read, or lacks columns.
    """
    rows = _rows(path)
    head = list(rows[0][1]) if rows else []
    known, factors = _named(path, names or {}, head)
    has = {own for own, name in known.items() if name in head}
    is_by_size = bool(has & {"flops_per_token"}) or {"flops", "tokens"} <= has
    count: FlopCount = flop_count or ("deepseek" if is_by_size else "chinchilla")
    if "loss" not in has or len(has & {"flops", "tokens", "flops_per_token"}) + ("params" in has) < 2:
        raise DataError(
            f"{path} needs a column loss and two of flops, tokens and flops_per_token (or params), found "
            f"{', '.join(head[:12])}; --columns gives the names of others, as in --columns loss=final_loss"
        )
    points, excluded = [], []
    seen: dict[tuple[Any, ...], str] = {}
    for line, row in rows:
        values = {own: (row.get(known[own]) or "").strip() for own in has}
        run = values.get("run") or f"row {line}"
        reason, point = _point_of(values, run, count, factors)
        if point is not None:
            key = (point.run, point.noise, point.flops, point.flops_per_token, point.seed) if "run" in has else (
                point.noise, point.flops, point.flops_per_token, point.loss, point.batch_tokens, point.learning_rate,
                point.seed,
            )  # fmt: skip
            if key in seen:
                reason, point = ("duplicate", f"line {line} repeats {seen[key]}"), None
            else:
                seen[key] = f"line {line}"
        if point is None and reason is not None:
            excluded.append(Exclusion(run, *reason))
        elif point is not None:
            points.append(point)
    dropped = {found.run for found in excluded if found.reason not in ("duplicate",)} if "run" in has else set()
    points = [point for point in points if point.run not in dropped]
    unique = list({(found.run, found.reason): found for found in excluded}.values())
    runs = len({point.run for point in points} | {found.run for found in unique})
    if flop_count is None and points and all(_is_by_parameters(point) for point in points):
        count = "chinchilla"
    source = path.name if "run" in has else f"{path.name}, each row a run of its own"
    return Gathered(tuple(best_of_settings(without_repeats(points))), tuple(unique), count, source, runs)


def _is_by_parameters(point: Point) -> bool:
    """Return whether a point's FLOPs are 6 times parameters times tokens."""
    return point.params is not None and abs(point.flops_per_token / (6 * point.params) - 1) < 0.01


def _named(path: Path, names: Mapping[str, str], head: Sequence[str]) -> tuple[dict[str, str], dict[str, float]]:
    """Return the file's name of each column, and the factors of those in other units."""
    known, factors = {own: own for own in COLUMNS}, {}
    for own, name in names.items():
        if own not in COLUMNS:
            raise DataError(f"--columns {own}={name}: the columns are {', '.join(COLUMNS)}")
        if name not in head:
            column, _, written = name.rpartition("*")
            try:
                factor = float(written)
            except ValueError:
                factor = math.nan
            if column.strip() in head or not math.isnan(factor):
                name, factors[own] = column.strip(), factor
                if own not in _NUMBERS or not 0 < factor < math.inf:
                    raise DataError(
                        f"--columns {own}={names[own]}: a factor is a positive number of a column of numbers"
                    )
        if name not in head:
            raise DataError(f"{path} has no column `{name}`; it has {', '.join(head[:12])}")
        known[own] = name
    return known, factors


def _separator(text: str) -> str:
    """Return the separator of the first line: a semicolon or a tab if it has them and no comma outside of quotes."""
    first = re.sub(r'"[^"]*"', "", text.split("\n", 1)[0][:_MAX_HEAD])
    return next((mark for mark in ";\t" if mark in first and "," not in first), ",")


def _rows(path: Path) -> list[tuple[int, dict[str, str]]]:
    try:
        text = read_text(path, max_bytes=_MAX_CSV_BYTES)
    except (OSError, UnreadableFileError) as error:
        raise DataError(f"{path} {why(error)}; give a CSV file with a row of names") from None
    if "\0" in text:
        raise DataError(f"{path} holds NUL characters; a CSV file is text")
    try:
        reader = csv.reader(io.StringIO(text, newline=""), strict=True, delimiter=_separator(text))
        head = [name.strip() for name in next(reader, [])]
        if not any(head):
            raise DataError(f"{path} is empty; its first row must name the columns")
        twice = [name for name, count in Counter(name for name in head if name).items() if count > 1]
        if twice:
            raise DataError(f"{path} names the column `{twice[0]}` twice")
        rows = []
        for row in reader:
            if not any(cell.strip() for cell in row):
                continue
            if len(row) != len(head):
                raise DataError(f"{path}:{reader.line_num}: {len(row)} cells where the first row has {len(head)}")
            rows.append((reader.line_num, dict(zip(head, row, strict=True))))
            if len(rows) > _MAX_CSV_ROWS:
                raise DataError(f"{path} has more than {_MAX_CSV_ROWS:,} rows; give points, not whole curves")
    except csv.Error as error:
        raise DataError(f"{path} is not a CSV file ({error})") from None
    if not rows:
        raise DataError(f"{path} has a row of names and nothing below it")
    return rows


def _point_of(
    values: Mapping[str, str], run: str, count: FlopCount, factors: Mapping[str, float]
) -> tuple[tuple[str, str] | None, Point | None]:
    status = values.get("status", "").lower()
    if status and status not in ("finished", "ok", "done", "complete", "completed"):
        reason = next((known for known in REASONS if known.lower() in status), "unfinished")
        return (reason, f"its status is {status[:40]}"), None
    found: dict[str, float | None] = {}
    for name in _NUMBERS:
        text = values.get(name, "")
        try:
            value = float(text) * factors.get(name, 1.0) if text else None
        except ValueError:
            return ("unreadable", f"its {name} is `{text[:40]}`, no number"), None
        if value is not None and (math.isnan(value) or math.isinf(value)):
            return ("diverged" if math.isinf(value) else "NaN", f"its {name} is {value}"), None
        if value is not None and value <= 0 and not (name == "loss_stderr" and value == 0):
            return ("unreadable", f"its {name} is {value:g}, not positive"), None
        found[name] = value
    size = found["flops_per_token"]
    if size is None and count == "chinchilla" and found["params"] is not None:
        size = 6 * found["params"]
    flops, tokens = found["flops"], found["tokens"]
    if flops is None and size is not None and tokens is not None:
        flops = size * tokens
    if size is None and flops is not None and tokens is not None:
        size = flops / tokens
    if tokens is None and flops is not None and size is not None:
        tokens = flops / size
    if flops is None or size is None or tokens is None or found["loss"] is None:
        if found["params"] is not None and size is None:
            return ("unreadable", f"parameters alone give no FLOPs per token by the count {count}"), None
        return ("unreadable", "it lacks a loss, or two of flops, tokens and flops_per_token"), None
    if not 0.98 < flops / (size * tokens) < 1.02:
        return ("unreadable", f"its flops are {flops / (size * tokens):.3g} times flops_per_token x tokens"), None
    return None, Point(
        run=run,
        noise=values.get("noise") or "all",
        flops=flops,
        flops_per_token=size,
        tokens=tokens,
        loss=found["loss"],
        loss_stderr=found["loss_stderr"],
        params=found["params"],
        batch_tokens=found["batch_tokens"],
        learning_rate=found["learning_rate"],
        seed=values.get("seed", ""),
        unique_tokens=found["unique_tokens"],
    )
