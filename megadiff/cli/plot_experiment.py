"""Compare the runs of an experiment by one of their settings, in a table and a figure.

    megadiff plot_experiment runs/noise_interpolation/* --by noise.shift --output figure.png
    megadiff plot_experiment runs/batch_size_sweep/* --by batch.global_batch_size --targets 3.4 3.2 --output
    f.png

The left half shows the held-out bound against tokens, with its standard error, a line per run. The right half shows the
last bound by the setting or, with `--targets`, the tokens that each run needed to reach a bound, by the setting (the
fewest at the most economical setting). `--output` needs matplotlib; the table does not.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from rich.console import Console
from rich.table import Table

from megadiff.config.command_line import CommandParser
from megadiff.errors import DataError
from megadiff.metric_lines import read_metrics


@dataclass(frozen=True)
class Curve:
    """One run's held-out bound over training."""

    name: str
    setting: Any
    """Value of the setting by which the runs are compared."""
    tokens: np.ndarray
    bound: np.ndarray
    """Held-out bounds in nats per token."""
    stderr: np.ndarray

    def tokens_to(self, target: float) -> float | None:
        """Return the tokens at which the bound first fell to `target`, interpolated in log tokens; None if it never
        did."""
        below = np.flatnonzero(self.bound <= target)
        if not len(below):
            return None
        after = int(below[0])
        if after == 0 or self.tokens[after - 1] == 0:
            return float(self.tokens[after])
        (high, low), ends = self.bound[after - 1 : after + 1], np.log(self.tokens[after - 1 : after + 1])
        return float(np.exp(ends[0] + (high - target) / (high - low) * (ends[1] - ends[0])))


def read_run(folder: Path, setting: str) -> Curve:
    """Read the curve of a run folder.

    Raises:
        DataError: there is no run, the run has no evaluations, or it does not have the setting.
    """
    try:
        config = yaml.safe_load((folder / "config.yaml").read_text(encoding="utf-8"))
    except OSError:
        raise DataError(f"{folder}: no config.yaml here; a run folder is wanted") from None
    value = config
    for key in setting.split("."):
        if not isinstance(value, dict) or key not in value:
            raise DataError(f"{folder}: its config.yaml has no `{setting}`")
        value = value[key]
    lines = read_metrics(folder / "metrics.jsonl")
    found = [line for line in lines if line.get("eval_elbo") is not None]
    trained = [(line["step"], line["tokens"]) for line in lines if "tokens" in line]
    if not found or not trained:
        raise DataError(f"{folder}: metrics.jsonl holds no held-out bound yet; set data.valid and eval.every")
    steps, tokens = np.array([(0, 0), *trained], dtype=float).T
    return Curve(
        name=folder.name,
        setting=value,
        tokens=np.interp([line["step"] for line in found], steps, tokens),
        bound=np.array([line["eval_elbo"] for line in found]),
        stderr=np.array([line.get("eval_elbo_stderr") or 0.0 for line in found]),
    )


def ordered(curves: Sequence[Curve]) -> list[Curve]:
    """Order the curves by the setting if all its values are numbers, otherwise keep their order."""
    if all(isinstance(curve.setting, (int, float)) for curve in curves):
        return sorted(curves, key=lambda curve: curve.setting)
    return list(curves)


def summary(curves: Sequence[Curve], setting: str, targets: Sequence[float]) -> Table:
    """Return a table with a sequence per run."""
    table = Table(title="held-out bound, nats per token")
    for name in ("run", setting, "tokens", "bound", "standard error", *(f"tokens to {target:g}" for target in targets)):
        table.add_column(name, justify="left" if name in ("run", setting) else "right")
    for curve in curves:
        reached = (curve.tokens_to(target) for target in targets)
        table.add_row(
            curve.name,
            str(curve.setting),
            f"{curve.tokens[-1]:,.0f}",
            f"{curve.bound[-1]:.4f}",
            f"{curve.stderr[-1]:.4f}",
            *("-" if tokens is None else f"{tokens:,.0f}" for tokens in reached),
        )
    return table


def draw(curves: Sequence[Curve], setting: str, targets: Sequence[float], output: Path) -> None:
    """Draw both halves of the figure."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, (left, right) = pyplot.subplots(1, 2, figsize=(12, 4.5))
    for curve in curves:
        seen = curve.tokens > 0
        label = f"{curve.name} ({setting} {curve.setting})"
        left.errorbar(curve.tokens[seen], curve.bound[seen], yerr=curve.stderr[seen], label=label, capsize=2)
    left.set(xlabel="tokens", ylabel="held-out bound, nats per token", xscale="log")
    left.legend(fontsize="small")
    places = [str(curve.setting) for curve in curves]
    if len(set(places)) < len(places):
        places = [curve.name for curve in curves]
    if targets:
        for target in targets:
            reached = [curve.tokens_to(target) or np.nan for curve in curves]
            right.plot(places, reached, "o-", label=f"to {target:g} nats")
        right.set(xlabel=setting, ylabel="tokens to reach the bound", yscale="log")
        right.legend(fontsize="small")
    else:
        last = [(curve.bound[-1], curve.stderr[-1]) for curve in curves]
        right.errorbar(places, [b for b, _ in last], yerr=[e for _, e in last], fmt="o", capsize=3)
        right.set(xlabel=setting, ylabel="last held-out bound, nats per token")
    figure.savefig(output, dpi=80, bbox_inches="tight")


def main() -> None:
    """Parse the command line, print the table and draw the figure."""
    parser = CommandParser(description=__doc__)
    parser.add_argument("runs", type=Path, nargs="+", help="run folders")
    parser.add_argument(
        "--by", required=True, metavar="KEY", help="setting in which the runs differ, such as noise.shift"
    )
    parser.add_argument("--targets", type=float, nargs="+", default=[], help="bounds in nats per token")
    parser.add_argument("--output", type=Path, help="picture to write, such as figure.png")
    arguments = parser.parse_args()
    curves = ordered([read_run(folder, arguments.by) for folder in arguments.runs])
    Console(width=140).print(summary(curves, arguments.by, arguments.targets))
    if arguments.output is None:
        return
    if importlib.util.find_spec("matplotlib") is None:
        raise DataError(f"{arguments.output}: matplotlib is not installed, so no picture; pip install matplotlib")
    try:
        draw(curves, arguments.by, arguments.targets, arguments.output)
    except (OSError, ValueError) as error:
        raise DataError(f"{arguments.output}: the picture cannot be written: {error}") from None
    print(f"figure: {arguments.output}")
