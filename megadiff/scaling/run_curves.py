"""Loss curves of run folders: what a run measured in its stable stretch, and why it cannot be used.

Nothing here compares runs; a folder that cannot be read gives a curve with a problem in place of points.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from megadiff.errors import DataError
from megadiff.files import UnreadableFileError, read_bytes, read_json_object, why
from megadiff.metric_lines import Line, number, read_lines
from megadiff.scaling.flops import FlopCount, flops_per_token
from megadiff.scaling.laws import NEXT_TOKEN
from megadiff.scaling.noise_scale import MEASURED, Components, noise_share_of, scale_of, step_windows
from megadiff.scaling.resampling import Floats

HARMLESS = (
    "platform", "transformer_impl", "parallel", "checkpoint", "eval", "log", "hooks", "health", "stop", "watchdog",
    "goodput", "batch.micro_batch_size", "objective.loss_kernel",
)  # fmt: skip
"""Settings that do not change what is learned."""

_MAX_CONFIG_BYTES, _MAX_LOG_BYTES = 2**20, 2**27
_CHANGED = re.compile(rb"changed since +([\w.]+)")


@dataclass(frozen=True)
class NoiseScale:
    """A gradient noise scale of a run, from its measurements within a factor of 2 in steps."""

    run: str
    noise: str
    tokens: float
    """Geometric mean of the tokens trained on by its measurements."""
    scale: float
    """tr S / |G|^2 in tokens."""
    stderr: float
    """Standard error of the scale in tokens; NaN if it is not known."""
    noise_share: float | None
    """Part of tr S that comes from noise draws, about 0 to 1."""


@dataclass(frozen=True)
class RunCurve:
    """The losses of one run in its stable stretch."""

    name: str
    settings: Mapping[str, Any]
    """Settings of its `config.yaml` by their full keys."""
    tokens: Floats
    loss: Floats
    stderr: Floats
    """Standard errors of the losses; NaN where they are not known."""
    is_training_loss: bool
    """Whether the losses are of training batches, for want of evaluations."""
    data: str
    """Fingerprint of the training data; empty if it is not recorded."""
    problem: tuple[str, str] | None
    """Reason and evidence why the run cannot be used; None if it can."""
    end: tuple[float, float] | None = None
    """Tokens and loss at the end, after a cooldown if there is one."""
    noise_scales: tuple[NoiseScale, ...] = ()
    """Gradient noise scales, where the run measured them in its stable stretch."""
    progress: tuple[Floats, Floats] | None = None
    """Tokens and steps over the run."""
    vocab_size: float | None = None
    """Number of token ids; None if neither settings nor `data.json` record it."""
    unique: tuple[Floats, Floats] | None = None
    """Tokens, and the number of different ones among them, over the run; None if its epochs are not recorded."""

    @property
    def trunk(self) -> Path | None:
        """Run folder from whose checkpoint the run started, as its settings name it; None if it has no trunk."""
        start = _branched_from(self.settings)
        if not isinstance(start, str):
            return None
        path = Path(start)
        return path.parent.parent if path.parent.name == "checkpoints" else path

    def setting(self, key: str) -> Any:
        """Return a setting by its full key; None if there is none."""
        return self.settings.get(key)

    def step_at(self, tokens: float) -> float | None:
        """Return the step after which a number of tokens is reached, in real numbers."""
        return None if self.progress is None else float(np.interp(tokens, *self.progress))

    def unique_tokens(self, tokens: float) -> float | None:
        """Return the number of different tokens among the first ones; None if it is not known."""
        return None if self.unique is None else float(np.interp(tokens, *self.unique))


def params_of(settings: Mapping[str, Any]) -> float:
    """Return the parameters that the laws count, without embedding and head, of a run's flat settings.

    The count is that of `megadiff.model.cost.paper_parameters`, from the settings that a run folder records:
    biases count twice.

    Raises:
        ValueError: a setting is missing or no positive whole number.
    """
    layers, d, heads = (_whole(settings, f"model.{name}") for name in ("layers", "hidden", "heads"))
    key_heads, width = _given(settings, "kv_heads", heads), _given(settings, "head_dim", d // heads)
    middle = _given(settings, "ffn_hidden", d * _given(settings, "ffn_multiple", 4))
    queries, keys, matrices = heads * width, key_heads * width, 2 + _is_gated(settings)
    gains = {"full": queries + keys, "none": 0}.get(str(settings.get("model.qk_norm", "head")), 2 * width)
    biases = {
        "mlp_bias": (matrices - 1) * middle + d,
        "qkv_bias": queries + 2 * keys,
        "attention_out_bias": d,
    }
    counted = 2 * sum(count for name, count in biases.items() if settings.get(f"model.{name}") is True)
    block = d * (2 * queries + 2 * keys + matrices * middle) + 2 * d + gains + counted
    return float(layers * block + d)


def _given(settings: Mapping[str, Any], name: str, default: int) -> int:
    """Return a setting of the model that may be null or absent."""
    key = f"model.{name}"
    return default if settings.get(key) is None else _whole(settings, key)


def _is_gated(settings: Mapping[str, Any]) -> bool:
    return settings.get("model.mlp") in ("swiglu", "geglu")


def flops_per_token_of(settings: Mapping[str, Any], count: FlopCount) -> float:
    """Return the training FLOPs of a token of a run's flat settings, by `deepseek` or `chinchilla`.

    Raises:
        ValueError: a setting is missing or no positive whole number.
    """
    layers, d, length = (_whole(settings, f"model.{name}") for name in ("layers", "hidden", "seq_length"))
    heads = _whole(settings, "model.heads")
    width = heads * _given(settings, "head_dim", d // heads)
    return flops_per_token(layers, d, length, method=count, params=params_of(settings), attention_width=width)


def _whole(settings: Mapping[str, Any], key: str) -> int:
    value = settings.get(key)
    if isinstance(value, bool) or not isinstance(value, int) or not 0 < value < 10**12:
        raise ValueError(f"its config.yaml has no positive whole number `{key}`")
    return value


def read_run(folder: Path, min_steps: int) -> RunCurve:
    """Return the curve of a run folder; one that cannot be used has its problem and no losses.

    Raises:
        DataError: the path is no folder.
    """
    empty = np.empty(0)

    def unusable(reason: str, detail: str) -> RunCurve:
        return RunCurve(str(folder), {}, empty, empty, empty, False, "", (reason, detail))

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
    inside = [evaluations[step] for step in sorted(evaluations) if first <= step <= last]
    is_planned = bool(settings.get("eval.at_flops") or settings.get("eval.at_steps"))
    is_training_loss = len(inside) < (1 if is_planned else 2)
    final = [line for step, line in sorted(evaluations.items()) if step >= 0.98 * steps[-1]][-1:]
    if _branched_from(settings):
        is_training_loss = not final
    key = "elbo_isotropic" if any("elbo_isotropic" in line for line in trained) else "elbo"
    rows = [line for line in trained if first <= line["step"] <= last and key in line] if is_training_loss else inside
    loss = _losses(rows, key if is_training_loss else "eval_elbo")
    spread = _losses(rows, "" if is_training_loss else "eval_elbo_stderr")
    at = np.interp([line["step"] for line in rows], steps, tokens) if rows else empty
    facts = _read_json(folder / "data.json")
    fingerprint = facts.get("fingerprint")
    finite = np.isfinite(loss)
    tail = [line for line in trained if key in line and line["step"] >= 0.98 * steps[-1]] if is_training_loss else final
    end = float(np.mean(found)) if len(found := _losses(tail, key if is_training_loss else "eval_elbo")) else np.nan
    gauged = [line for line in lines if f"gradient_noise/{MEASURED[0]}" in line and first <= line["step"] <= last]
    return RunCurve(
        name=str(folder),
        settings=settings,
        tokens=at[finite],
        loss=loss[finite],
        stderr=spread[finite],
        is_training_loss=is_training_loss,
        data=fingerprint if isinstance(fingerprint, str) else "",
        problem=_own_problem(folder, settings, trained, evaluations, loss, first),
        end=(float(tokens[-1]), end) if np.isfinite(end) else None,
        noise_scales=_noise_scales(folder, settings, gauged, (steps, tokens)),
        progress=(tokens, steps),
        vocab_size=number(facts, "vocab_size") or number(settings, "data.vocab_size"),
        unique=_unique(trained, facts),
    )


def _noise_scales(
    folder: Path, settings: Mapping[str, Any], lines: Sequence[Line], progress: tuple[Floats, Floats]
) -> tuple[NoiseScale, ...]:
    """Return the scales of windows of measurements; one in which the gradient drowns in its noise gives none."""
    measured, found = {}, []
    for line in lines:
        data, noise, signal = (number(line, f"gradient_noise/{name}") for name in MEASURED)
        tokens = float(np.interp(line["step"], *progress))
        if data is not None and noise is not None and signal is not None and tokens > 0:
            measured[line["step"]] = tokens, Components(data, noise, signal)
    for window in step_windows(measured):
        tokens = float(np.exp(np.mean([math.log(measured[step][0]) for step in window])))
        components = [measured[step][1] for step in window]
        (scale, error), (share, _) = scale_of(components), noise_share_of(components)
        if scale is not None and scale > 0:
            length = _whole(settings, "model.seq_length")
            stderr = math.nan if error is None else error * length
            found.append(NoiseScale(str(folder), noise_name(settings), tokens, scale * length, stderr, share))
    return tuple(found)


def _losses(rows: Sequence[Mapping[str, Any]], key: str) -> Floats:
    """Return a figure of each line; NaN where it is missing or not positive."""
    values = [number(line, key) for line in rows]
    return np.array([np.nan if value is None or value <= 0 else value for value in values], dtype=float)


def _unique(trained: Sequence[Mapping[str, Any]], facts: Mapping[str, Any]) -> tuple[Floats, Floats] | None:
    """Return tokens, and how many of them were different, from the epochs of each source."""
    sizes: dict[str, float] = {}
    sources = facts.get("train")
    for source in sources if isinstance(sources, list) else []:
        if isinstance(source, dict) and (size := number(source, "tokens")) is not None and size > 0:
            sizes[str(source.get("source"))] = size
    found = [(0.0, 0.0)]
    for line in trained:
        epochs, tokens = line.get("epochs"), number(line, "tokens")
        if not isinstance(epochs, dict) or tokens is None:
            continue
        passes = {name: value for name in epochs if (value := number(epochs, name)) is not None and value > 0}
        weights = sizes if passes.keys() <= sizes.keys() else dict.fromkeys(passes, 1.0)
        if not passes or (len(passes) > 1 and weights is not sizes):
            continue
        seen = sum(value * weights[name] for name, value in passes.items())
        different = sum(min(value, 1.0) * weights[name] for name, value in passes.items())
        found.append((tokens, tokens * different / seen))
    if len(found) < 2:
        return None
    columns = np.array(found).T
    return columns[0], np.maximum.accumulate(columns[1])


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
    rates = [(line["step"], rate) for line in trained if (rate := number(line, "lr")) is not None]
    if not rates:
        return math.inf
    top = max(rate for _, rate in rates)
    after = [step for step, rate in rates if rate >= 0.999 * top]
    falling = [step for step, rate in rates if step > after[-1] and rate < 0.999 * top]
    return after[-1] if falling else math.inf


def _read_json(path: Path) -> dict[str, Any]:
    """Return the object in a small JSON file; an empty one where there is none that can be read."""
    try:
        return read_json_object(path, max_bytes=_MAX_CONFIG_BYTES)
    except (OSError, UnreadableFileError):
        return {}


def _own_problem(
    folder: Path,
    settings: Mapping[str, Any],
    trained: Sequence[Mapping[str, Any]],
    evaluations: Mapping[int, Mapping[str, Any]],
    loss: Floats,
    first: float,
) -> tuple[str, str] | None:
    changed = [key for key in _changed_settings(folder) if not is_under(key, HARMLESS)]
    if any(key.startswith("data") for key in changed):
        return "other data", "it was resumed with other training data"
    if changed:
        return "changed settings", f"it was resumed with another {', '.join(sorted(set(changed)))}"
    nulls = [line["step"] for line in trained if "loss" in line and number(line, "loss") is None]
    nulls += [step for step, line in evaluations.items() if number(line, "eval_elbo") is None]
    if nulls:
        return "NaN", f"its loss is not finite at step {min(nulls)}"
    losses = np.array([value for line in trained if (value := number(line, "loss")) is not None])
    measured = loss if len(loss) > 2 else losses
    if len(measured) > 2 and measured[-1] > 1.3 * measured.min():
        return "diverged", f"its loss ends at {measured[-1]:.3g}, {measured[-1] / measured.min():.2g} times its lowest"
    status = _read_json(folder / "status.json")
    if status.get("exit_code") == 5:
        return "diverged", "the run ended itself because of its loss"
    planned = status.get("steps") or settings.get("schedule.steps")
    done = trained[-1]["step"]
    if isinstance(planned, int) and not isinstance(planned, bool) and done < planned:
        return "unfinished", f"it took {done:,} of {planned:,} steps"
    if not len(loss) and not _branched_from(settings):
        return "too short", f"it has no loss between step {first:,.0f} and its cooldown; see --min-steps"
    return None


def _branched_from(settings: Mapping[str, Any]) -> Any:
    """Return the checkpoint that a cooldown continues; None for a run from step 0, with another's weights or not."""
    return None if settings.get("checkpoint.weights_only") else settings.get("checkpoint.start_from") or None


def _changed_settings(folder: Path) -> list[str]:
    """Return the keys that the log records as changed when the run resumed."""
    try:
        text = read_bytes(folder / "log.txt", max_bytes=_MAX_LOG_BYTES)
    except (OSError, UnreadableFileError):
        return []
    return [match.decode() for match in _CHANGED.findall(text)]


def is_under(key: str, sections: Iterable[str]) -> bool:
    """Return whether a full key is one of these settings, or lies in one of these sections."""
    return any(key == section or key.startswith(f"{section}.") for section in sections)


def noise_name(settings: Mapping[str, Any]) -> str:
    """Return the name of a run's noise by its settings, or of its training method if that has none."""
    method, shift = settings.get("method.name"), settings.get("noise.shift")
    if method == NEXT_TOKEN:
        return NEXT_TOKEN
    return str(shift if shift is not None else method or "all")


_SLACK = math.log(1.02)
"""Distance in log tokens up to which a curve covers what lies beyond its ends; evaluations come in whole steps."""


def loss_at(
    tokens: Floats, loss: Floats, stderr: Floats, at: float, window: float, widest: float = math.inf
) -> tuple[float, float | None] | None:
    """Return the loss of a curve at a number of tokens, and its standard error; None if the curve does not cover it.

    The loss is a line of log loss over log tokens through the points within a factor `window`, or through the two
    nearest on both sides if there are fewer than three. Two per cent beyond its ends still count as covered. Where
    these two lie further apart in tokens than a factor `widest`, only a loss within two per cent of `at` counts: the
    line lies above the curve.
    """
    if not len(tokens) or not np.log(tokens[0]) - _SLACK <= np.log(at) <= np.log(tokens[-1]) + _SLACK:
        return None
    x, y = np.log(tokens) - np.log(at), np.log(loss)
    near = np.flatnonzero(np.abs(x) <= np.log(window))
    if len(near) < 3 or not (x[near].min() <= _SLACK and x[near].max() >= -_SLACK):
        if len(tokens) == 1:
            return float(loss[0]), float(stderr[0]) if np.isfinite(stderr[0]) else None
        right = int(np.clip(np.searchsorted(x, 0.0), 1, len(x) - 1))
        if x[right] - x[right - 1] > np.log(widest) and np.abs(x[right - 1 : right + 1]).min() > _SLACK:
            return None
        slope = (y[right] - y[right - 1]) / (x[right] - x[right - 1])
        nearest = stderr[right - 1 if abs(x[right - 1]) < abs(x[right]) else right]
        return float(np.exp(y[right] - slope * x[right])), float(nearest) if np.isfinite(nearest) else None
    design = np.column_stack([np.ones(len(near)), x[near]])
    b, *_ = np.linalg.lstsq(design, y[near], rcond=None)
    residual = y[near] - design @ b
    inverse = np.linalg.inv(design.T @ design)
    value = float(np.exp(b[0]))
    if np.isfinite(stderr[near]).all():  # evaluations share their noise, so their errors do not average out
        return value, float(stderr[near].mean())
    free = len(near) - 2
    return value, value * float(np.sqrt(inverse[0, 0] * residual @ residual / free)) if free > 0 else None
