"""Fit scaling laws to the runs of a sweep, with intervals that resample whole runs.

Reads run folders or a CSV file of points, leaves out runs that cannot be used by name and reason, and writes laws,
tables and figures.
"""

from __future__ import annotations

import argparse
import importlib.util
from dataclasses import replace
from datetime import datetime, timezone
from pathlib import Path
from typing import TYPE_CHECKING

from megadiff.config.command_line import CommandParser
from megadiff.errors import ConfigError, DataError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from megadiff.scaling.fit_results import Results
    from megadiff.scaling.laws import LawBook
    from megadiff.scaling.points import Gathered

_EPILOG = """examples:
  megadiff fit_scaling runs/sweep --output fits/sweep              # all runs of a sweep's folder
  megadiff fit_scaling runs/sweep/runs/masked-* --budgets 1e17 3e17 1e18 --min-steps 0
  megadiff fit_scaling --csv points.csv --columns params="N*1e6" tokens="D*1e9" loss=final_loss
  megadiff plan --laws fits/sweep/law.yaml --noise masked --flops 1e20

The output folder gets law.yaml, which `megadiff plan --laws` reads, fit.json, points.csv, excluded.csv, index.html and,
with matplotlib, figures/. A law is provisional if runs were left out, a vertex lies at an edge, or a fit was refused;
the reasons are in every file.
"""


def main() -> None:
    """Read the command line, gather the points, fit, write, and print a summary."""
    arguments = _parser().parse_args()
    _check(arguments)

    from megadiff.scaling.fit_record import write_points
    from megadiff.scaling.resampling import FitError

    output: Path = arguments.output
    baseline = _baseline(arguments.baseline)
    gathered = _gathered(arguments)
    print(f"{gathered.source}: FLOPs by the count {gathered.flop_count}")
    for found in gathered.excluded:
        print(f"left out: {found.run}: {found.reason}: {found.detail}")
    try:
        try:
            _fit(arguments, gathered, baseline)
        except FitError as error:
            write_points(gathered, output)
            before = ", and law.yaml there is of an earlier fit" if (output / "law.yaml").exists() else ""
            raise FitError(
                f"{error}; no law is written, but {output}/points.csv and excluded.csv have every point and every run "
                f"left out, with the reason{before}"
            ) from None
    except OSError as error:
        raise DataError(f"--output {output} cannot be written ({error.strerror or error})") from None
    print(f"{output}: law.yaml, fit.json, points.csv, excluded.csv, index.html")


def _gathered(arguments: argparse.Namespace) -> Gathered:
    """Return the points of the runs or of the CSV file."""
    from megadiff.scaling import points

    unknown = [reason for reason in arguments.keep if reason not in points.REASONS]
    if unknown:
        raise ConfigError(f"--keep {unknown[0]}: the reasons are {', '.join(points.REASONS)}")
    if arguments.csv is not None:
        names = _columns(arguments.columns)
        gathered = points.from_csv(arguments.csv, names, flop_count=arguments.flop_count)
    else:
        found = [_run_folders(given) for given in arguments.runs]
        gathered = points.from_runs(
            [run for runs, _ in found for run in runs],
            budgets=arguments.budgets,
            flop_count=arguments.flop_count or "deepseek",
            min_steps=arguments.min_steps,
            window=arguments.window,
            kept=arguments.keep,
            varied=arguments.vary,
        )
        gathered = replace(gathered, notes=(*gathered.notes, *(note for _, notes in found for note in notes)))
    if arguments.drop_highest and gathered.points:
        return points.without_highest(gathered, arguments.drop_highest)
    return gathered


def _run_folders(given: Path) -> tuple[list[Path], list[str]]:
    """Return a run folder, or those that have begun of a sweep's folder, with a note if others have not."""
    from megadiff.run.sweep_folder import read_manifest, sweep_of

    if (folder := sweep_of(given)) is None:
        return [given], []
    runs = [folder / "runs" / entry["name"] for entry in read_manifest(folder)["runs"]]
    begun = [run for run in runs if run.is_dir()]
    if not begun:
        raise DataError(f"{folder} is a sweep of which no run has begun; `megadiff sweep status {folder}` shows them")
    missing = len(runs) - len(begun)
    return begun, [f"{missing} of the {len(runs)} runs of {folder} have not begun"] if missing else []


def _baseline(named: str | None) -> LawBook | None:
    """Return the laws to draw beside the fit: those of a file, or the published ones."""
    from megadiff.scaling.laws import LawBook, published, read_law_file

    if named is None:
        return None
    return published() if named == "published" else LawBook((read_law_file(named),))


def _fit(arguments: argparse.Namespace, gathered: Gathered, baseline: LawBook | None) -> None:
    """Fit, print a summary and write everything.

    Raises:
        FitError: nothing can be fitted, or no law can be written.
        OSError: the disk refuses.
    """
    from megadiff.scaling.fit_record import summary
    from megadiff.scaling.fit_results import fit_points

    results = fit_points(
        gathered, level=arguments.level, draws=arguments.draws, seed=arguments.seed, run_noise=arguments.run_noise
    )
    lines = summary(results)
    print("\n".join(lines))
    _write(results, arguments.output, lines, baseline, with_figures=not arguments.no_figures)


def _parser() -> argparse.ArgumentParser:
    parser = CommandParser(description=__doc__, epilog=_EPILOG)
    parser.add_argument(
        "runs",
        nargs="*",
        type=Path,
        metavar="RUN",
        help="run folders; a sweep's folder means all of its runs",
    )
    parser.add_argument("--csv", type=Path, metavar="FILE", help="points instead of run folders, one a row")
    parser.add_argument(
        "--columns", nargs="+", default=[], metavar="OURS=THEIRS[*FACTOR]", help="names and units of the file's columns"
    )
    parser.add_argument("--output", type=Path, default=Path("fits"), help="folder to write (default: fits)")
    parser.add_argument(
        "--budgets", type=float, nargs="+", metavar="C", help="budgets in FLOPs (default: by factors of 2)"
    )
    parser.add_argument(
        "--flop-count",
        choices=("deepseek", "chinchilla", "full"),
        help="count of FLOPs (default: deepseek; chinchilla for a CSV file with parameters and no FLOPs per token)",
    )
    parser.add_argument(
        "--min-steps", type=int, default=5000, help="no loss before this step or 3 x warm-up counts (default: 5000)"
    )
    parser.add_argument("--window", type=float, default=1.25, help="factor of tokens around a budget (default: 1.25)")
    parser.add_argument("--keep", nargs="+", default=[], metavar="REASON", help="reasons that do not exclude")
    parser.add_argument(
        "--vary", nargs="+", default=[], metavar="KEY", help="more settings in which the runs may differ"
    )
    parser.add_argument(
        "--drop-highest", type=int, default=0, metavar="N", help="points with the highest losses to leave out"
    )
    parser.add_argument("--run-noise", type=float, help="known standard deviation of log loss between seeds, as 0.001")
    parser.add_argument(
        "--baseline", metavar="FILE", help="law file to draw beside the fit's laws, or `published` for the paper's"
    )
    parser.add_argument("--no-figures", action="store_true", help="draw none; laws, tables and the page alone")
    parser.add_argument("--level", type=float, default=0.95, help="coverage of the intervals (default: 0.95)")
    parser.add_argument("--draws", type=int, default=1000, help="resampled sets of runs (default: 1000)")
    parser.add_argument("--seed", type=int, default=0, help="seed of the resampling")
    return parser


def _check(arguments: argparse.Namespace) -> None:
    if bool(arguments.runs) == (arguments.csv is not None):
        raise ConfigError("give run folders or --csv FILE, and not both")
    if arguments.columns and arguments.csv is None:
        raise ConfigError("--columns names columns of a CSV file; give --csv FILE too")
    if arguments.baseline is not None and arguments.no_figures:
        raise ConfigError("--baseline draws laws into a figure; leave out --no-figures")
    if not 0.5 <= arguments.level < 1:
        raise ConfigError(f"--level is a coverage between 0.5 and 1, found {arguments.level:g}")
    if not 10 <= arguments.draws <= 100_000:
        raise ConfigError(f"--draws is between 10 and 100,000, found {arguments.draws}")
    if not 1.0 < arguments.window <= 100:
        raise ConfigError(f"--window is a factor above 1, found {arguments.window:g}")
    if arguments.seed < 0 or arguments.min_steps < 0 or arguments.drop_highest < 0:
        raise ConfigError("--seed, --min-steps and --drop-highest are 0 or more")
    if arguments.flop_count == "full" and arguments.csv is None:
        raise ConfigError("--flop-count full is for CSV files whose FLOPs count the head; for runs name another count")
    if arguments.run_noise is not None and not 0 < arguments.run_noise < 1:
        raise ConfigError(f"--run-noise is between 0 and 1, such as 0.001 for 0.1 %, found {arguments.run_noise:g}")
    if any(not 0 < budget < 1e40 for budget in arguments.budgets or []):
        raise ConfigError("--budgets are positive numbers of FLOPs")
    if arguments.output.exists() and not arguments.output.is_dir():
        raise ConfigError(f"--output {arguments.output} is a file; name a folder")


def _columns(given: list[str]) -> dict[str, str]:
    found = {}
    for text in given:
        own, separator, name = text.partition("=")
        if not separator or not name:
            raise ConfigError(f"--columns {text}: write it as OURS=THEIRS, such as loss=final_loss")
        found[own] = name
    return found


def _write(
    results: Results, folder: Path, lines: Sequence[str], baseline: LawBook | None, *, with_figures: bool
) -> None:
    """Write the laws, tables, figures and the page."""
    from megadiff.files import write_atomically
    from megadiff.report.fit_page import fit_page
    from megadiff.scaling.fit_record import write_fit

    found = write_fit(results, folder)
    drawn = []
    if with_figures and importlib.util.find_spec("matplotlib") is None:
        print("matplotlib is not installed, so no figures; pip install matplotlib")
    elif with_figures:
        from megadiff.scaling.figures import draw_all

        drawn = draw_all(results, folder / "figures", baseline)
    page = fit_page(found, drawn, lines, now=datetime.now(timezone.utc))
    write_atomically(folder / "index.html", page)
