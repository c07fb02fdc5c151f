"""Find the best learning rate at several widths and depths with short runs of the real trainer.

    megadiff learning_rate_sweep --config examples/learning_rate_sweep/sweep.yaml --sizes 64x2 256x2 64x8

Under CompleteP the best rate should be the same at every size; under the standard parametrisation it should not. Runs
are ordinary run folders and are trained one after the other in this process; finished runs are not repeated. They are
compared by the held-out ELBO after the last step, on the same sequences and noise for all, averaged over `--seeds`.

Source: the learning-rate transfer of arXiv:2512.10858, section 3.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean

from rich.console import Console
from rich.progress import track
from rich.table import Table

from megadiff.cli.plot_run import check_picture, writing_picture
from megadiff.config.command_line import SettingsParser, refuse_unknown
from megadiff.config.load import load_config
from megadiff.errors import ConfigError, TrainingError
from megadiff.metric_lines import read_metrics
from megadiff.platform.quiet import quiet
from megadiff.run.config import RunConfig
from megadiff.scaling.optimum import Optimum, grid_steps_apart, optimum

HEAD_DIM = 32
FACTOR = 2.0
"""Ratio of neighbouring rates."""

PARAMETRISATIONS = {
    "completep": ("optimizer.parametrisation=completep", "model.resid_scale=completep", "model.head_scale=completep"),
    "standard": ("optimizer.parametrisation=standard", "model.resid_scale=1.0", "model.head_scale=1.0"),
}
"""Settings by parametrisation; `standard` has one rate for all parameters and no multipliers, but the same first
weights."""

Size = tuple[int, int]
"""(width, depth)."""


def size(text: str) -> Size:
    """Parse a size, such as `64x8` to (64, 8)."""
    width, _, depth = text.partition("x")
    if not (width.isdigit() and depth.isdigit() and int(width) % HEAD_DIM == 0 and int(depth) > 0):
        raise argparse.ArgumentTypeError(f"WIDTHxDEPTH is wanted, the width a multiple of {HEAD_DIM}, got {text}")
    return int(width), int(depth)


def rates(first: float, count: int) -> list[float]:
    """Return `count` rates from `first` upwards."""
    return [first * FACTOR**i for i in range(count)]


def run(
    config: Path, parametrisation: str, at: Size, rate: float, overrides: Sequence[str] = (), *, seed: int = 0
) -> float:
    """Train one run unless it is done; return its last held-out ELBO in nats, infinity if it diverged."""
    width, depth = at
    own = (f"model.hidden={width}", f"model.layers={depth}", f"model.heads={width // HEAD_DIM}")
    name = f"{parametrisation}-d{width}-L{depth}-lr{rate:g}" + (f"-seed{seed}" if seed else "")
    settings = (*PARAMETRISATIONS[parametrisation], *own, f"optimizer.lr={rate}", f"seed={seed}", f"name={name}")
    described = load_config(config, [*overrides, *settings], RunConfig)
    if not described.data.valid:
        raise ConfigError(f"{config}: data.valid is empty; the sweep compares held-out bounds")
    if (found := _last_bound(described)) is None:
        with quiet():
            from megadiff.run import build
        with contextlib.redirect_stdout(io.StringIO()), contextlib.suppress(TrainingError):
            build.run(described)
        found = _last_bound(described)
    return math.inf if found is None or math.isnan(found) else found


def _last_bound(config: RunConfig) -> float | None:
    lines = read_metrics(config.folder / "metrics.jsonl")
    return next((line["eval_elbo"] for line in lines if line["step"] == config.steps and "eval_elbo" in line), None)


def table(title: str, losses: Mapping[Size, Mapping[float, float]], best: Mapping[Size, Optimum]) -> Table:
    """Return a table with a sequence per size: the bound at every rate, and the optimum."""
    made = Table(title=title)
    grid = sorted({rate for found in losses.values() for rate in found})
    for name in ("width x depth", *(f"{rate:g}" for rate in grid), "best", "parabola"):
        made.add_column(name, justify="right", no_wrap=True)
    for at, found in losses.items():
        shown = (f"{found[rate]:.3f}{'*' if rate == best[at].rate else ''}" for rate in grid)
        edge = "" if best[at].is_inside else " (edge)"
        made.add_row(f"{at[0]} x {at[1]}", *shown, f"{best[at].rate:g}{edge}", f"{best[at].vertex:.3g}")
    return made


def draw(panels: Mapping[str, Mapping[Size, Mapping[float, float]]], path: Path) -> None:
    """Draw the bound against the rate, a panel for each title and a line for each size, its best point marked."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(4.5 * len(panels), 3.5), layout="constrained")
    axes = figure.subplots(1, len(panels), squeeze=False)[0]
    for axis, (title, losses) in zip(axes, panels.items(), strict=True):
        for (width, depth), found in losses.items():
            rates_of = sorted(found)
            (line,) = axis.plot(rates_of, [found[rate] for rate in rates_of], label=f"width {width}, depth {depth}")
            best = min(found, key=found.__getitem__)
            axis.plot([best], [found[best]], "o", color=line.get_color())
        axis.set(title=title, xscale="log", xlabel="optimizer.lr", ylabel="held-out ELBO, nats per token")
        axis.legend()
    figure.savefig(path)


def main() -> None:
    """Parse the command line, train the missing runs, and print a table per parametrisation."""
    parser = SettingsParser(description=__doc__)
    parser.add_argument("--config", type=Path, required=True, help="run description that the sweep changes")
    parser.add_argument("--sizes", type=size, nargs="+", default=[(64, 2), (256, 2), (64, 8)], metavar="WIDTHxDEPTH")
    parser.add_argument("--parametrisations", nargs="+", choices=sorted(PARAMETRISATIONS), default=["completep"])
    parser.add_argument("--first", type=float, default=0.05, help="smallest rate (default: %(default)s)")
    parser.add_argument(
        "--count", type=int, default=6, help="number of rates, each twice the previous (default: %(default)s)"
    )
    parser.add_argument("--seeds", type=int, default=1, help="number of runs to average (default: %(default)s)")
    parser.add_argument("--figure", type=Path, help="picture of the table to write, such as rates.svg")
    arguments = parser.parse_with_settings()
    refuse_unknown(arguments, RunConfig)
    if arguments.figure is not None:
        check_picture(arguments.figure)
    console, panels = Console(width=40 + 9 * arguments.count), {}
    for name in arguments.parametrisations:
        runs = [(at, rate) for at in arguments.sizes for rate in rates(arguments.first, arguments.count)]
        losses: dict[Size, dict[float, float]] = {at: {} for at in arguments.sizes}
        for at, rate in track(runs, description=name, console=console, transient=True):
            seeds = range(arguments.seeds)
            losses[at][rate] = fmean(run(arguments.config, name, at, rate, arguments.overrides, seed=s) for s in seeds)
        best = {at: optimum(found) for at, found in losses.items()}
        console.print(table(f"{name}: held-out ELBO, nats per token, by learning rate", losses, best))
        apart = grid_steps_apart(best.values(), factor=FACTOR)
        console.print(f"{name}: best rates lie {apart:.0f} grid step(s) apart")
        panels[name] = losses
    if arguments.figure is not None:
        with writing_picture(arguments.figure):
            draw(panels, arguments.figure)
        console.print(f"figure: {arguments.figure}")
