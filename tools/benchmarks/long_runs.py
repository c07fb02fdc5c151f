"""CPU time and memory with which a run of many lines of metrics is resumed and reported."""

from __future__ import annotations

import argparse
import json
import math
import os
import platform as host
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

from processor import processor

from megadiff.config.command_line import CommandParser
from megadiff.errors import run_command

_EPILOG = """example:
  python tools/benchmarks/long_runs.py --lines 100000 1000000 --repeats 5 --before ../megadiff-before

"resume" opens `metrics.jsonl` as a run does that goes on ten steps before its end; "report" is the whole command.
User and system time of a process of its own each, and its largest memory; medians. --before runs the same from another
checkout as well, in turns with this one.
"""

_RESUME = """
import sys
from pathlib import Path
from megadiff.train.hooks.metrics_file import MetricsFile
MetricsFile(Path(sys.argv[1]), after_step=int(sys.argv[2])).close()
"""


def main() -> None:
    """Print the table."""
    parser = CommandParser(description=__doc__, epilog=_EPILOG)
    parser.add_argument("--lines", type=int, nargs="+", default=[100_000, 1_000_000], help="training lines of a run")
    parser.add_argument("--repeats", type=int, default=5, help="processes of each kind (default 5)")
    parser.add_argument("--before", type=Path, help="checkout of another version to compare with")
    arguments = parser.parse_args()
    sides = {"now": Path(__file__).resolve().parents[2]}
    if arguments.before:
        sides["before"] = arguments.before.resolve()
    print(f"machine   {processor()}, {os.cpu_count()} cores, Python {host.python_version()}")
    print(f"{'lines':>9}  {'what':<8}{'side':<8}{'CPU s':>8}{'MiB':>8}   medians of {arguments.repeats}")
    for count in arguments.lines:
        _measure(count, sides, arguments)


def _measure(count: int, sides: dict[str, Path], arguments: argparse.Namespace) -> None:
    with tempfile.TemporaryDirectory() as folder:
        metrics = Path(folder, "metrics.jsonl")
        with metrics.open("w") as file:
            file.writelines(_line(step) for step in range(1, count + 1))
        commands = {
            "resume": ["-c", _RESUME, str(metrics), str(count - 10)],
            "report": ["-m", "megadiff", "report", folder, "--output", f"{folder}/report.html"],
        }
        for name, command in commands.items():
            found: dict[str, list[tuple[float, float]]] = {side: [] for side in sides}
            for _ in range(arguments.repeats):
                for side, checkout in sides.items():
                    found[side].append(_spent(command, checkout))
            for side, figures in found.items():
                seconds, mib = (statistics.median(column) for column in zip(*figures, strict=True))
                print(f"{count:>9}  {name:<8}{side:<8}{seconds:>8.2f}{mib:>8.0f}", flush=True)


def _line(step: int) -> str:
    """Return a training line with the figures that a run writes."""
    loss = 3.0 + 5.0 / math.sqrt(step) + 0.05 * math.sin(step * step)
    line = {"step": step, "loss": loss, "elbo": 1.2 * loss, "kl": 0.9 * loss, "itakura_saito": 0.1 * loss}
    line |= {"weight": 0.5, "noisy_tokens": 4096, "tokens": 4096 * step, "lr": 1e-3, "grad_norm": 0.1 * loss}
    line |= {"tokens_per_s": 8192.0 + loss, "mfu": 0.41, "peak_bytes": 2**34, "skipped": None}
    bins = [[low, low + 3.0, loss * (1.0 - low / 20.0)] for low in (-9.0, -6.0, -3.0, 0.0, 3.0, 6.0)]
    return json.dumps({**line, "loss_by_log_snr": bins}) + "\n"


def _spent(command: list[str], checkout: Path) -> tuple[float, float]:
    """Return the CPU seconds and the largest memory in MiB of a Python process."""
    environment = {**os.environ, "PYTHONPATH": str(checkout)}
    process = subprocess.Popen([sys.executable, *command], cwd=checkout, env=environment, stdout=subprocess.DEVNULL)
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise SystemExit(f"{command} ended with exit code {process.returncode}")
    return usage.ru_utime + usage.ru_stime, usage.ru_maxrss / 1024


if __name__ == "__main__":
    run_command(main)
