"""Check that activations and updates keep their size over widths and depths (CompleteP).

    megadiff coordinate_check --output examples/coordinate_check/completep.txt
    megadiff coordinate_check --widths 128 256 512 --depths 2 4 8 --grid cross --without hidden_lr   # exits 1

Models of every size take a few optimizer steps on the same sequences. One table shows the measured sizes, a second one
the log-log slopes over width and depth with the band that each must stay in. If one does not, the exit code is 1 and a
sentence explains it.

`--without RULE` keeps one rule at its value for the smallest width and depth instead of scaling it. These are the rules
and the signs by which their absence is noticed:

    residual    4 / L on the branches. Stream and its change grow with depth.
    head        512 / d on the logits. Logits after the first step grow with width; later the loss is so low that
                gradients vanish, and the slope with them.
    hidden_init   0.4 / sqrt(d). The stream at the start grows with width.
    embed_init  0.02, free of d; without: 1 / sqrt(d), as hidden matrices. The embedding at the start shrinks with
    width;
                nothing behind it shows that, because the first norm divides it out.
    zero_head   0. Logits before the first step are not 0.
    hidden_lr     eta / d. The change of the stream grows with width.
    embed_lr, head_lr, gain_lr, bias_lr
                0.02 eta, free of d; without: eta / d, as hidden matrices. The change of the embedding, of the logits,
                of the norms' gains, of the biases shrinks with width. Gains and biases are measured in the parameters
                alone: a few steps of them hardly change the activations.
    eps         1e-8 / (d L). eps over the root mean square of the bulk's gradients grows with both. At the preset's eps
                the ratio is 1e-10, so that no activation can show it.
    decay       weight decay times d. The relative decay of the bulk matrices in the first step, in which their
                gradients are still 0, shrinks with width. The preset's decay is 0; the check sets 0.1.

The factor 0.02 itself, and beta1, beta2, do not scale with size: a coordinate check cannot see them.

Source: arXiv:2512.10858 (CompleteP as used there); the check follows Yang et al., arXiv:2203.03466, appendix D.1.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

from rich.console import Console
from rich.table import Table

from megadiff.config.command_line import SettingsParser, refuse_unknown
from megadiff.errors import ConfigError
from megadiff.platform.quiet import quiet
from megadiff.run.config import RunConfig
from megadiff.scaling.optimum import HEAD_DIM, RULES, STEPS, Size, Verdict, bands_of, judge, sizes

PRESET = Path(__file__).resolve().parents[2] / "examples" / "presets" / "gidd.yaml"


def report(measured: Mapping[Size, Mapping[str, float]], verdicts: Sequence[Verdict], console: Console) -> None:
    """Print two tables: the measured sizes, and the slopes."""
    grid = list(measured)
    table = Table(title=f"root mean squares; end: after {STEPS} steps, change: against the start")
    for name in ("statistic", *(f"d{width} L{depth}" for width, depth in grid)):
        table.add_column(name, justify="left" if name == "statistic" else "right", no_wrap=True)
    for name in measured[grid[0]]:
        table.add_row(name, *(f"{measured[size][name]:.3g}" for size in grid))
    console.print(table)
    slopes = Table(title="log-log slopes: the line nearest to its band's edge")
    for name in ("statistic", "over", "slope", "band", "lines", ""):
        slopes.add_column(name, no_wrap=True)
    for verdict in verdicts:
        band = verdict.band
        found = (f"{verdict.worst.slope:+.2f}", f"{band.low:+.2f} .. {band.high:+.2f}", str(verdict.lines))
        slopes.add_row(band.statistic, band.axis, *found, "" if verdict.holds else "BROKEN")
    console.print(slopes)


def main() -> None:
    """Parse the command line, measure, print the tables, and report the properties that do not hold."""
    parser = SettingsParser(description=__doc__)
    parser.add_argument("--config", type=Path, default=PRESET, help="run description to check (default: %(default)s)")
    parser.add_argument("--widths", type=int, nargs="+", default=[128, 256, 512, 1024], help=f"multiples of {HEAD_DIM}")
    parser.add_argument("--depths", type=int, nargs="+", default=[2, 4, 8, 16])
    parser.add_argument("--grid", choices=("full", "cross"), default="full", help="all pairs, or one line each")
    parser.add_argument("--without", choices=RULES, metavar="RULE", help=f"remove one rule: {', '.join(RULES)}")
    parser.add_argument("--output", type=Path, help="file to write the tables to as well")
    arguments = parser.parse_with_settings()
    refuse_unknown(arguments, RunConfig)
    if arguments.config == PRESET and not PRESET.is_file():
        raise ConfigError(f"--config is missing, and its default exists in a checkout of megadiff only: {PRESET}")

    import torch

    with quiet():
        from megadiff.parallel.topology import process_group
        from megadiff.platform.machine import detect
        from megadiff.testing.coordinates import check

    torch.set_num_threads(1)
    platform = detect("cpu")
    platform.prepare_megatron()
    started = time.monotonic()
    grid = sizes(arguments.widths, arguments.depths, arguments.grid)
    with process_group(platform, alone=True):
        measured, broken = check(grid, arguments.config, without=arguments.without, overrides=arguments.overrides)
    console = Console(record=arguments.output is not None, width=40 + 10 * len(grid))
    report(measured, judge(measured, bands_of(measured)), console)
    console.print("\n".join(broken) or "every promise is kept", soft_wrap=True)
    print(f"{len(grid)} models in {time.monotonic() - started:.0f} s")
    if arguments.output is not None:
        arguments.output.parent.mkdir(parents=True, exist_ok=True)
        arguments.output.write_text(console.export_text(), encoding="utf-8")
    if broken:
        sys.exit(1)
