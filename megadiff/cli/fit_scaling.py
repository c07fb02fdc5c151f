"""Fit scaling laws to the runs of a sweep, with intervals that resample whole runs.

Reads run folders or a CSV file of points, leaves out runs that cannot be used by name and reason, and writes laws,
tables and figures.
"""

from __future__ import annotations

import argparse
import csv
import importlib.util
import io
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megadiff.config.command_line import CommandParser
from megadiff.errors import ConfigError, DataError

if TYPE_CHECKING:
    from megadiff.scaling.fit_results import Results
    from megadiff.scaling.points import Gathered

_EPILOG = """examples:
  megadiff fit_scaling runs/sweep/* --output fits/masked
  megadiff fit_scaling runs/sweep/* --budgets 1e17 3e17 1e18 --min-steps 0
  megadiff fit_scaling --csv points.csv --columns params="Model Size" flops="Training FLOP" --flop-count chinchilla

The output folder gets law.yaml, fit.json, points.csv, excluded.csv, index.html and, with matplotlib, figures/. A law is
provisional if runs were left out, a vertex lies at an edge, or a fit was refused; the reasons are in every file.
"""


def main() -> None:
    """Read the command line, gather the points, fit, write, and print a summary."""
    arguments = _parser().parse_args()
    _check(arguments)

    from megadiff.scaling import csv_points, points
    from megadiff.scaling.fit_results import fit_points

    unknown = [reason for reason in arguments.keep if reason not in points.REASONS]
    if unknown:
        raise ConfigError(f"--keep {unknown[0]}: the reasons are {', '.join(points.REASONS)}")
    if arguments.csv is not None:
        gathered = csv_points.from_csv(arguments.csv, _columns(arguments.columns), flop_count=arguments.flop_count)
    else:
        gathered = points.from_runs(
            arguments.runs,
            budgets=arguments.budgets,
            flop_count=arguments.flop_count,
            min_steps=arguments.min_steps,
            window=arguments.window,
            kept=arguments.keep,
            varied=arguments.vary,
        )
    for found in gathered.excluded:
        print(f"left out: {found.run}: {found.reason}: {found.detail}")
    results = fit_points(
        gathered, level=arguments.level, draws=arguments.draws, seed=arguments.seed, run_noise=arguments.run_noise
    )
    print("\n".join(summary(results)))
    try:
        _write(results, arguments.output)
    except OSError as error:
        raise DataError(f"--output {arguments.output} cannot be written ({error.strerror or error})") from None
    print(f"{arguments.output}: law.yaml, fit.json, points.csv, excluded.csv, index.html")


def _parser() -> argparse.ArgumentParser:
    parser = CommandParser(description=__doc__, epilog=_EPILOG)
    parser.add_argument(
        "runs", nargs="*", type=Path, metavar="RUN", help="run folders, with metrics.jsonl and config.yaml"
    )
    parser.add_argument("--csv", type=Path, metavar="FILE", help="points instead of run folders, one a row")
    parser.add_argument("--columns", nargs="+", default=[], metavar="OURS=THEIRS", help="names of the file's columns")
    parser.add_argument("--output", type=Path, default=Path("fits"), help="folder to write (default: fits)")
    parser.add_argument(
        "--budgets", type=float, nargs="+", metavar="C", help="budgets in FLOPs (default: by factors of 2)"
    )
    parser.add_argument(
        "--flop-count", choices=("deepseek", "chinchilla"), default="deepseek", help="6P + 12LdS, or 6P, a token"
    )
    parser.add_argument(
        "--min-steps", type=int, default=5000, help="no loss before this step or 3 x warm-up counts (default: 5000)"
    )
    parser.add_argument("--window", type=float, default=1.25, help="factor of tokens around a budget (default: 1.25)")
    parser.add_argument("--keep", nargs="+", default=[], metavar="REASON", help="reasons that do not exclude")
    parser.add_argument(
        "--vary", nargs="+", default=[], metavar="KEY", help="more settings in which the runs may differ"
    )
    parser.add_argument("--run-noise", type=float, help="known standard deviation of log loss between seeds, as 0.001")
    parser.add_argument("--level", type=float, default=0.95, help="coverage of the intervals (default: 0.95)")
    parser.add_argument("--draws", type=int, default=1000, help="resampled sets of runs (default: 1000)")
    parser.add_argument("--seed", type=int, default=0, help="seed of the resampling")
    return parser


def _check(arguments: argparse.Namespace) -> None:
    if bool(arguments.runs) == (arguments.csv is not None):
        raise ConfigError("give run folders or --csv FILE, and not both")
    if arguments.columns and arguments.csv is None:
        raise ConfigError("--columns names columns of a CSV file; give --csv FILE too")
    if not 0.5 <= arguments.level < 1:
        raise ConfigError(f"--level is a coverage between 0.5 and 1, found {arguments.level:g}")
    if not 10 <= arguments.draws <= 100_000:
        raise ConfigError(f"--draws is between 10 and 100,000, found {arguments.draws}")
    if not 1.0 < arguments.window <= 100:
        raise ConfigError(f"--window is a factor above 1, found {arguments.window:g}")
    if arguments.seed < 0 or arguments.min_steps < 0:
        raise ConfigError("--seed and --min-steps are 0 or more")
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


def summary(results: Results) -> list[str]:
    """Return the lines that the command prints about its fits."""
    lines = []
    for fits in results.noises:
        lines.append(f"{fits.noise}: {len({point.run for point in fits.points if not point.excluded})} runs")
        if fits.isoflop is not None:
            counted = sum(not budget.excluded for budget in fits.isoflop.budgets)
            lines.append(f"  bowls: {counted} of {len(fits.isoflop.budgets)} vertices count; run noise "
                         f"{100 * fits.isoflop.run_noise:.2g} % of the loss")  # fmt: skip
            for name, law in fits.isoflop.laws.items():
                low, high = law.intervals["exponent"]
                lines.append(f"  {name} = {law.coefficient:.4g} C^{law.exponent:.4f} [{low:.4f}, {high:.4f}]")
            lines.append(f"  exponents of size and tokens add up to {fits.isoflop.exponents_add_to:.4f}, coefficients "
                         f"multiply to {fits.isoflop.coefficients_multiply_to:.4f}")  # fmt: skip
            if (held := fits.isoflop.held_out) is not None:
                lines.append(f"  held out: {held.flops:.3g} FLOPs, loss {held.loss:.4f}, predicted "
                             f"{held.predicted_loss:.4f} ({held.loss_error_percent:+.2f} %)")  # fmt: skip
        for method, law in fits.surfaces.items():
            low, high = law.intervals["size_exponent"]
            lines.append(
                f"  surface ({method}): {law.E:.4g} + {law.A:.4g} M^-{law.alpha:.4f} + {law.B:.4g} D^-{law.beta:.4f}; "
                f"M* ~ C^{law.size_exponent:.4f} [{low:.4f}, {high:.4f}]; {law.convergence.message}"
            )
        for name, slopes in (("best batch over tokens", fits.batch), ("best rate over batch", fits.rate)):
            if slopes is not None:
                lines.append(f"  {name}: {slopes.pooled.coefficient:.4g} x^{slopes.pooled.exponent:.4f}; one slope for "
                             f"all sizes: p = {slopes.p_value:.2g}")  # fmt: skip
    for c in results.comparisons:
        low, high = c.crossing.interval
        resolved = "" if c.crossing.is_resolved else " (not resolved)"
        lines.append(
            f"{c.first} and {c.second}: cross at {c.crossing.flops:.3g} FLOPs [{low:.3g}, {high:.3g}]{resolved}; the "
            f"second needs {c.speed_up.ratio:.3g} times the compute at a loss of {c.speed_up.loss:.4g}"
        )
    reservations = results.reservations
    lines += [f"provisional: {reason}" for reason in reservations]
    return lines


def _write(results: Results, folder: Path) -> None:
    import yaml

    from megadiff.files import write_atomically
    from megadiff.scaling.fit_results import as_mapping, plain

    folder.mkdir(parents=True, exist_ok=True)
    mapping = as_mapping(results)
    write_atomically(folder / "law.yaml", yaml.safe_dump(mapping, sort_keys=False, allow_unicode=True))
    bowls = {
        fits.noise: [budget.__dict__ for budget in fits.isoflop.budgets]
        for fits in results.noises
        if fits.isoflop is not None
    }
    write_atomically(folder / "fit.json", json.dumps({**mapping, "budgets": plain(bowls)}, indent=1) + "\n")
    write_atomically(folder / "points.csv", _points_table(results.gathered))
    excluded = [["run", "reason", "detail"], *([e.run, e.reason, e.detail] for e in results.gathered.excluded)]
    write_atomically(folder / "excluded.csv", _as_csv(excluded))
    figures: list[Path] = []
    if importlib.util.find_spec("matplotlib") is not None:
        from megadiff.scaling.figures import draw_all

        figures = draw_all(results, folder / "figures")
    else:
        print("matplotlib is not installed, so no figures; pip install matplotlib")
    write_atomically(folder / "index.html", _page(results, figures))


def _points_table(gathered: Gathered) -> str:
    names = ("run", "noise", "flops", "flops_per_token", "tokens", "params", "loss", "loss_stderr", "batch_tokens",
             "learning_rate", "seed", "excluded")  # fmt: skip
    rows: list[list[Any]] = [list(names)]
    rows += [["" if (v := getattr(point, name)) is None else v for name in names] for point in gathered.points]
    budgets = {found.run: f"{found.reason}: {found.detail}" for found in gathered.excluded}
    rows += [[run, *[""] * (len(names) - 2), reason] for run, reason in budgets.items()]
    return _as_csv(rows)


def _as_csv(rows: list[list[Any]]) -> str:
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows(rows)
    return text.getvalue()


def _page(results: Results, figures: list[Path]) -> str:
    """Return one page that loads nothing: figures inside, laws, and all that was left out."""
    from megadiff.report.markup import escaped, paragraph, section, table

    drawn = []
    for path in figures:
        svg = path.read_text(encoding="utf-8")
        drawn.append(f"<figure>{svg[svg.index('<svg') :]}</figure>")
    excluded = [(escaped(e.run), escaped(e.reason), escaped(e.detail)) for e in results.gathered.excluded]
    parts = [
        section("laws", "Laws", "<pre>" + escaped("\n".join(summary(results))) + "</pre>"),
        section("figures", "Figures", *drawn),
        section("left-out", "Runs left out", table(("run", "reason", "detail"), excluded, caption="By name and reason")
                if excluded else paragraph("No run was left out.")),
    ]  # fmt: skip
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>Scaling fits</title><meta http-equiv='
        "\"Content-Security-Policy\" content=\"default-src 'none'; style-src 'unsafe-inline'; img-src data:\">"
        "<style>body{font:15px/1.5 system-ui,sans-serif;max-width:84rem;margin:0 auto;padding:1rem}"
        "pre{white-space:pre-wrap}svg{max-width:100%;height:auto}td,th{text-align:left;padding:.2rem .8rem .2rem 0}"
        "figure{margin:0 0 1.5rem}</style></head><body><h1>Scaling fits</h1>"
        f"{paragraph('Source: ' + results.gathered.source)}{''.join(parts)}</body></html>\n"
    )
