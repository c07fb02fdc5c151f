"""Points of scaling fits from run folders or a CSV file, with every run that is left out and the reason.

A point is a loss at a budget of compute. A run folder gives a point for each budget that its curve covers: the loss is
a local linear fit over the log of tokens, within the run's stable stretch. A sweep is never complete, so a run that
cannot be used is excluded by name, and the fit goes on without it.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from megadiff.errors import DataError
from megadiff.metric_lines import number, read_lines
from megadiff.scaling.flops import FlopCount, flops_per_token
from megadiff.scaling.resampling import Floats
from megadiff.untrusted_files import UnreadableFileError, read_bytes, read_json_object, why

REASONS = (
    "diverged", "unfinished", "changed settings", "other settings", "other data", "duplicate", "NaN", "unreadable",
    "too short",
)  # fmt: skip
"""Reasons for which a whole run is left out."""

SWEPT = (
    "name", "output_dir", "seed", "model.layers", "model.hidden", "model.heads", "model.ffn_multiple", "noise",
    "method.name", "batch.global_batch_size", "batch.micro_batch_size", "optimizer.lr", "optimizer.beta2", "schedule",
)  # fmt: skip
"""Settings, or sections, in which runs of one sweep may differ."""
_HARMLESS = (
    "platform", "transformer_impl", "parallel", "checkpoint", "eval", "log", "hooks", "health", "stop", "watchdog",
    "goodput", "batch.micro_batch_size", "objective.loss_kernel",
)  # fmt: skip
"""Settings that do not change what is learned."""

COLUMNS = ("run", "noise", "flops", "tokens", "flops_per_token", "params", "loss", "loss_stderr", "batch_tokens",
           "learning_rate", "seed", "status")  # fmt: skip
"""Columns of a CSV file that mean something; `loss` is needed, and two of flops, tokens and size."""

_MAX_CONFIG_BYTES, _MAX_LOG_BYTES = 2**20, 2**27
_CHANGED = re.compile(rb"changed since +([\w.]+)")


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


@dataclass(frozen=True)
class Exclusion:
    """A run that is left out."""

    run: str
    reason: str
    """Reason, one of `REASONS`."""
    detail: str


@dataclass(frozen=True)
class Gathered:
    """The points of a sweep and the runs left out of it."""

    points: tuple[Point, ...]
    excluded: tuple[Exclusion, ...]
    flop_count: FlopCount
    source: str
    runs: int
    """Number of runs that were looked at."""

    @property
    def counted(self) -> list[Point]:
        """Points that are not left out."""
        return [point for point in self.points if not point.excluded]


@dataclass(frozen=True)
class _Run:
    name: str
    settings: Mapping[str, Any]
    tokens: Floats
    loss: Floats
    stderr: Floats
    is_training_loss: bool
    data: str
    problem: tuple[str, str] | None

    def setting(self, key: str) -> Any:
        return self.settings.get(key)


def params_of(settings: Mapping[str, Any]) -> float:
    """Return the parameters that the laws count, without embedding and head, of a run's flat settings.

    The count is that of `megadiff.model.cost.paper_parameters`, from the settings that a run folder records: MLP
    biases count twice.

    Raises:
        ValueError: a setting is missing or no positive whole number.
    """
    layers, d, heads = (_whole(settings, f"model.{name}") for name in ("layers", "hidden", "heads"))
    wide = d * (_whole(settings, "model.ffn_multiple") if "model.ffn_multiple" in settings else 4)
    gains = {"full": 2 * d, "none": 0}.get(str(settings.get("model.qk_norm", "head")), 2 * d // heads)
    biases = 2 * (wide + d) if settings.get("model.mlp_bias") is True else 0
    return float(layers * (4 * d * d + 2 * d * wide + 2 * d + gains + biases) + d)


def flops_per_token_of(settings: Mapping[str, Any], count: FlopCount) -> float:
    """Return the training FLOPs of a token of a run's flat settings, by `deepseek` or `chinchilla`.

    Raises:
        ValueError: a setting is missing or no positive whole number.
    """
    layers, d, length = (_whole(settings, f"model.{name}") for name in ("layers", "hidden", "seq_length"))
    return flops_per_token(layers, d, length, method=count, params=params_of(settings))


def _whole(settings: Mapping[str, Any], key: str) -> int:
    value = settings.get(key)
    if isinstance(value, bool) or not isinstance(value, int) or not 0 < value < 10**12:
        raise ValueError(f"its config.yaml has no positive whole number `{key}`")
    return value


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
    """Gather the points of run folders.

    Args:
        folders: run folders.
        budgets: FLOPs; None chooses budgets a factor 2 apart that at least three sizes cover.
        flop_count: `deepseek` or `chinchilla`.
        min_steps: points before this step, or before three times the warm-up, are not taken.
        window: factor of tokens around a budget within which the curve is fitted.
        kept: reasons of `REASONS` for which runs are not left out.
        varied: settings beside `SWEPT` in which the runs may differ.

    Raises:
        DataError: no run can be used; the message names the first reasons.
    """
    unique = list({folder.resolve(): folder for folder in folders}.values())
    runs = [_read_run(folder, min_steps) for folder in unique]
    problems = _problems(runs, (*SWEPT, *varied))
    excluded = [
        Exclusion(run.name, *problem)
        for run, problem in zip(runs, problems, strict=True)
        if problem is not None and problem[0] not in kept
    ]
    left_out = {found.run for found in excluded}
    usable = [run for run in runs if run.name not in left_out and len(run.tokens)]
    sizes = {run.name: flops_per_token_of(run.settings, flop_count) for run in usable}
    chosen = sorted(budgets) if budgets else _budgets(usable, sizes)
    points = [point for run in usable for point in _points_of(run, sizes[run.name], chosen, window, flop_count)]
    bare = [run for run in usable if not any(point.run == run.name for point in points)]
    excluded += [Exclusion(run.name, "too short", "its curve covers none of the budgets") for run in bare]
    if not points:
        named = "; ".join(f"{found.run}: {found.reason} ({found.detail})" for found in excluded[:4])
        raise DataError(f"none of {len(runs)} runs gives a point ({named or 'no budget is covered by three sizes'})")
    source = f"{len(unique)} run folders"
    return Gathered(tuple(best_of_settings(points)), tuple(excluded), flop_count, source, len(runs))


def _read_run(folder: Path, min_steps: int) -> _Run:
    empty = np.empty(0)

    def unusable(reason: str, detail: str) -> _Run:
        return _Run(str(folder), {}, empty, empty, empty, False, "", (reason, detail))

    if not folder.is_dir():
        raise DataError(f"{folder} is no folder; give run folders, which contain metrics.jsonl, or --csv FILE")
    try:
        settings = dict(_flat(yaml.safe_load(read_bytes(folder / "config.yaml", max_bytes=_MAX_CONFIG_BYTES))))
        lines = list(read_lines(folder / "metrics.jsonl"))
    except FileNotFoundError as error:
        return unusable("unreadable", f"{Path(str(error.filename)).name} is missing")
    except (OSError, UnreadableFileError) as error:
        return unusable("unreadable", why(error))
    except (ValueError, yaml.YAMLError, RecursionError):
        return unusable("unreadable", "config.yaml is not YAML")
    training = {line["step"]: line for line in lines if "tokens" in line}
    evaluations = {line["step"]: line for line in lines if "eval_elbo" in line}
    trained = [training[step] for step in sorted(training)]
    steps = np.array([0.0, *(line["step"] for line in trained)])
    tokens = np.array([0.0, *(number(line, "tokens") or np.nan for line in trained)])
    if len(trained) < 2 or np.isnan(tokens).any() or (np.diff(tokens) <= 0).any():
        return unusable("unreadable", "metrics.jsonl has no rising count of tokens")
    warmup = settings.get("schedule.warmup_steps")
    first = max(min_steps, 3 * warmup if isinstance(warmup, int) else 0)
    last = _end_of_stable_stretch(trained)
    inside = [step for step in sorted(evaluations) if first <= step <= last]
    is_training_loss = len(inside) < 2
    if is_training_loss:
        rows = [line for line in trained if first <= line["step"] <= last]
        key = "elbo_isotropic" if any("elbo_isotropic" in line for line in rows) else "elbo"
        rows = [line for line in rows if key in line]
        values, errors = [number(line, key) for line in rows], [None] * len(rows)
    else:
        rows = [evaluations[step] for step in inside]
        values = [number(line, "eval_elbo") for line in rows]
        errors = [number(line, "eval_elbo_stderr") for line in rows]
    loss = np.array([np.nan if value is None or value <= 0 else value for value in values], dtype=float)
    at = np.interp([line["step"] for line in rows], steps, tokens) if rows else empty
    data = _data_of(folder)
    problem = _own_problem(folder, settings, trained, evaluations, loss, first)
    finite = np.isfinite(loss)
    spread = np.array([np.nan if error is None else error for error in errors], dtype=float)
    return _Run(str(folder), settings, at[finite], loss[finite], spread[finite], is_training_loss, data, problem)


def _flat(tree: Any, prefix: str = "", depth: int = 0) -> Iterable[tuple[str, Any]]:
    if not isinstance(tree, dict):
        raise ValueError("not a mapping")
    for key, value in tree.items():
        name = f"{prefix}{key}"
        if isinstance(value, dict) and depth < 12:
            yield from _flat(value, f"{name}.", depth + 1)
        else:
            yield name, value


def _end_of_stable_stretch(trained: Sequence[Mapping[str, Any]]) -> float:
    """Return the last step before the learning rate falls: the laws are of unannealed losses."""
    rates = [(line["step"], rate) for line in trained if (rate := number(dict(line), "lr")) is not None]
    if not rates:
        return math.inf
    top = max(rate for _, rate in rates)
    after = [step for step, rate in rates if rate >= 0.999 * top]
    falling = [step for step, rate in rates if step > after[-1] and rate < 0.999 * top]
    return after[-1] if falling else math.inf


def _data_of(folder: Path) -> str:
    try:
        found = read_json_object(folder / "data.json", max_bytes=_MAX_CONFIG_BYTES).get("fingerprint")
    except (OSError, UnreadableFileError):
        return ""
    return found if isinstance(found, str) else ""


def _own_problem(
    folder: Path,
    settings: Mapping[str, Any],
    trained: Sequence[Mapping[str, Any]],
    evaluations: Mapping[int, Mapping[str, Any]],
    loss: Floats,
    first: float,
) -> tuple[str, str] | None:
    changed = [key for key in _changed_settings(folder) if not _is_under(key, _HARMLESS)]
    if any(key.startswith("data") for key in changed):
        return "other data", "it was resumed with other training data"
    if changed:
        return "changed settings", f"it was resumed with another {', '.join(sorted(set(changed)))}"
    nulls = [line["step"] for line in trained if "loss" in line and number(dict(line), "loss") is None]
    nulls += [step for step, line in evaluations.items() if number(dict(line), "eval_elbo") is None]
    if nulls:
        return "NaN", f"its loss is not finite at step {min(nulls)}"
    losses = np.array([value for line in trained if (value := number(dict(line), "loss")) is not None])
    measured = loss if len(loss) > 2 else losses
    if len(measured) > 2 and measured[-1] > 1.3 * measured.min():
        return "diverged", f"its loss ends at {measured[-1]:.3g}, {measured[-1] / measured.min():.2g} times its lowest"
    status = _status(folder)
    if status.get("exit_code") == 5:
        return "diverged", "the run ended itself because of its loss"
    planned = status.get("steps") or settings.get("schedule.steps")
    done = trained[-1]["step"]
    if isinstance(planned, int) and not isinstance(planned, bool) and done < planned:
        return "unfinished", f"it took {done:,} of {planned:,} steps"
    if not len(loss):
        return "too short", f"it has no loss between step {first:,.0f} and its cooldown; see --min-steps"
    return None


def _status(folder: Path) -> dict[str, Any]:
    try:
        return read_json_object(folder / "status.json", max_bytes=_MAX_CONFIG_BYTES)
    except (OSError, UnreadableFileError):
        return {}


def _changed_settings(folder: Path) -> list[str]:
    """Return the keys that the log records as changed when the run resumed."""
    try:
        text = read_bytes(folder / "log.txt", max_bytes=_MAX_LOG_BYTES)
    except (OSError, UnreadableFileError):
        return []
    return [match.decode() for match in _CHANGED.findall(text)]


def _is_under(key: str, sections: Iterable[str]) -> bool:
    return any(key == section or key.startswith(f"{section}.") for section in sections)


def _problems(runs: Sequence[_Run], swept: Sequence[str]) -> list[tuple[str, str] | None]:
    """Return each run's problem: its own, or one that shows in comparison with the others."""
    problems = [run.problem for run in runs]
    data = Counter(run.data for run in runs if run.problem is None and run.data)
    usual_data = data.most_common(1)[0][0] if data else ""
    keys = {
        key for run in runs if run.problem is None for key in run.settings if not _is_under(key, (*swept, *_HARMLESS))
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
        own = {k: v for k, v in run.settings.items() if k not in ("name", "output_dir") and not _is_under(k, _HARMLESS)}
        described = repr(sorted(own.items(), key=lambda item: item[0]))
        if described in seen:
            problems[place] = ("duplicate", f"its settings and seed are those of {seen[described]}")
        else:
            seen[described] = run.name
    return problems


def _budgets(runs: Sequence[_Run], sizes: Mapping[str, float], most: int = 12) -> list[float]:
    """Return budgets a factor 2 apart, downward from the largest that three sizes cover."""
    if not runs:
        return []
    ends: dict[float, float] = {}
    for run in runs:
        size = sizes[run.name]
        ends[size] = max(ends.get(size, 0.0), size * run.tokens[-1])
    if len(ends) < 3:
        return []
    top = sorted(ends.values())[-3]
    found = []
    for step in range(most):
        budget = top / 2**step
        covered = {
            sizes[run.name] for run in runs if run.tokens[0] <= budget / sizes[run.name] <= run.tokens[-1] * (1 + 1e-9)
        }
        if len(covered) < 3:
            break
        found.append(budget)
    return sorted(found)


def _points_of(run: _Run, size: float, budgets: Sequence[float], window: float, count: FlopCount) -> Iterable[Point]:
    batch, seq = run.setting("batch.global_batch_size"), run.setting("model.seq_length")
    rate = run.setting("optimizer.lr")
    for budget in budgets:
        tokens = budget / size
        found = loss_at(run.tokens, run.loss, run.stderr, tokens, window)
        if found is None:
            continue
        yield Point(
            run=run.name,
            noise=_noise_of(run),
            flops=budget,
            flops_per_token=size,
            tokens=tokens,
            loss=found[0],
            loss_stderr=found[1],
            params=params_of(run.settings),
            batch_tokens=float(batch * seq) if isinstance(batch, int) and isinstance(seq, int) else None,
            learning_rate=float(rate) if isinstance(rate, int | float) else None,
            seed=str(run.setting("seed")),
        )


def _noise_of(run: _Run) -> str:
    method = run.setting("method.name")
    if method == "next_token":
        return "next_token"
    return str(run.setting("noise.shift") if run.setting("noise.shift") is not None else method or "all")


def loss_at(
    tokens: Floats, loss: Floats, stderr: Floats, at: float, window: float
) -> tuple[float, float | None] | None:
    """Return the loss of a curve at a number of tokens, and its standard error; None if the curve does not cover it.

    The loss is a line of log loss over log tokens through the points within a factor `window`, or between the two
    neighbours if there are fewer than three.
    """
    if not len(tokens) or not tokens[0] * (1 - 1e-9) <= at <= tokens[-1] * (1 + 1e-9):
        return None
    x, y = np.log(tokens), np.log(loss)
    near = np.flatnonzero(np.abs(x - np.log(at)) <= np.log(window))
    if len(near) < 3 or not (x[near].min() <= np.log(at) <= x[near].max()):
        right = int(np.clip(np.searchsorted(tokens, at), 1, max(len(tokens) - 1, 1))) if len(tokens) > 1 else 0
        value = float(np.exp(np.interp(np.log(at), x, y)))
        nearest = stderr[right] if len(stderr) else np.nan
        return value, float(nearest) if np.isfinite(nearest) else None
    design = np.column_stack([np.ones(len(near)), x[near] - np.log(at)])
    b, *_ = np.linalg.lstsq(design, y[near], rcond=None)
    residual = y[near] - design @ b
    inverse = np.linalg.inv(design.T @ design)
    value = float(np.exp(b[0]))
    if np.isfinite(stderr[near]).all():  # evaluations share their noise, so their errors do not average out
        return value, float(stderr[near].mean())
    free = len(near) - 2
    return value, value * float(np.sqrt(inverse[0, 0] * residual @ residual / free)) if free > 0 else None


def best_of_settings(points: Sequence[Point]) -> list[Point]:
    """Mark the points whose batch or learning rate another one beats at the same noise, size and budget.

    Seeds of one setting are compared by their mean and stay together.
    """
    cells: dict[tuple[Any, ...], dict[tuple[Any, ...], list[int]]] = {}
    for place, point in enumerate(points):
        if point.excluded:
            continue
        cell = (point.noise, round(math.log(point.flops_per_token), 6), round(math.log(point.flops), 6))
        cells.setdefault(cell, {}).setdefault((point.batch_tokens, point.learning_rate), []).append(place)
    found = list(points)
    for settings in cells.values():
        means = {key: np.mean([points[place].loss for place in places]) for key, places in settings.items()}
        best = min(means, key=lambda key: means[key])
        for key, places in settings.items():
            for place in places if key != best else []:
                found[place] = replace(points[place], excluded="another batch or learning rate is better")
    return found
