"""Show the curves of one or more runs, in a table and a picture.

    megadiff plot_run runs/masked runs/uniform --output curves.png

The picture needs matplotlib; the table does not.
"""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from megadiff.config.command_line import CommandParser
from megadiff.errors import DataError
from megadiff.files import UnreadableFileError, why
from megadiff.files import lines as lines_of
from megadiff.metric_lines import MAX_LINE_BYTES, number, parsed


def read_metrics(run: Path) -> list[dict[str, Any]]:
    """Read a run folder's metric lines in the order of their steps; an incomplete last line is left out."""
    path = run / "metrics.jsonl"
    if not os.path.exists(path):
        raise DataError(f"{run}: no metrics.jsonl here; a run folder is wanted")
    found = []
    try:
        for place, raw in enumerate(lines_of(path, max_bytes=MAX_LINE_BYTES), start=1):
            line = parsed(raw)
            if line is not None:
                found.append(line)
            elif raw is None or (raw.strip() and raw.endswith(b"\n")):  # without a newline it is still being written
                raise DataError(f"{path}:{place}: a JSON object with a step is wanted")
    except (UnreadableFileError, OSError) as error:
        raise DataError(f"{path} {why(error)}; a run folder is wanted") from None
    return sorted(found, key=lambda line: line["step"])


def curve(lines: list[dict[str, Any]], key: str) -> list[tuple[int, float]]:
    """Return (step, value) of the lines that have a finite number under the key."""
    return [(line["step"], value) for line in lines if (value := number(line, key)) is not None]


def summary(runs: dict[str, list[dict[str, Any]]]) -> Table:
    """Return a table with a sequence per run: its progress, and its last and best values."""
    table = Table(title="runs (nats per noisy token)")
    for name in ("run", "step", "tokens", "loss", "elbo", "held-out elbo", "best held-out", "tokens/s"):
        table.add_column(name, justify="left" if name == "run" else "right")
    for name, lines in runs.items():
        last = {key: value for line in lines for key in line if (value := number(line, key)) is not None}
        held_out = [value for _, value in curve(lines, "eval_elbo")]
        error = last.get("eval_elbo_stderr")
        table.add_row(
            name,
            *(f"{int(last[key]):,}" if key in last else "-" for key in ("step", "tokens")),
            *(f"{last[key]:.4f}" if key in last else "-" for key in ("loss", "elbo")),
            f"{held_out[-1]:.4f}" + (f" ± {error:.4f}" if error is not None else "") if held_out else "-",
            f"{min(held_out):.4f}" if held_out else "-",
            f"{last['tokens_per_s']:,.0f}" if "tokens_per_s" in last else "-",
        )
    return table


def draw(runs: dict[str, list[dict[str, Any]]], output: Path) -> None:
    """Draw the training bound as a line and the held-out bound as points with their standard error, a colour per
    run."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(8, 5))
    for name, lines in runs.items():
        train = curve(lines, "elbo")
        (drawn,) = axes.plot(*zip(*train, strict=True), alpha=0.6, label=name) if train else axes.plot([], label=name)
        held_out = [line for line in lines if number(line, "eval_elbo") is not None]
        if held_out:
            steps, bounds = [line["step"] for line in held_out], [line["eval_elbo"] for line in held_out]
            errors = [number(line, "eval_elbo_stderr") or 0.0 for line in held_out]
            axes.errorbar(steps, bounds, yerr=errors, fmt="o", color=drawn.get_color(), label=f"{name}, held out")
    axes.set(xlabel="step", ylabel="ELBO, nats per noisy token")
    axes.legend()
    figure.savefig(output, dpi=150, bbox_inches="tight")


def check_picture(path: Path) -> None:
    """Refuse a picture that could not be written.

    Raises:
        DataError: there is no folder for it, or matplotlib is not installed.
    """
    if not path.absolute().parent.is_dir():
        raise DataError(f"{path}: there is no folder {path.parent}; make it first")
    if importlib.util.find_spec("matplotlib") is None:
        raise DataError(f"{path}: matplotlib is not installed, so no picture; pip install matplotlib")


@contextmanager
def writing_picture(path: Path) -> Iterator[None]:
    """Turn what matplotlib raises into a sentence.

    Raises:
        DataError: the picture cannot be written, or its ending is of no known format.
    """
    try:
        yield
    except (OSError, ValueError) as error:
        raise DataError(f"{path}: the picture cannot be written: {error}") from None


def main() -> None:
    """Parse the command line, print the table and draw the curves."""
    parser = CommandParser(description=__doc__)
    parser.add_argument("runs", type=Path, nargs="+", help="run folders, each with a metrics.jsonl")
    parser.add_argument("--output", type=Path, help="picture to write, such as curves.png")
    arguments = parser.parse_args()
    runs = {str(run): read_metrics(run) for run in arguments.runs}
    Console().print(summary(runs))
    if arguments.output is None:
        return
    check_picture(arguments.output)
    with writing_picture(arguments.output):
        draw(runs, arguments.output)
    print(f"curves: {arguments.output}")
