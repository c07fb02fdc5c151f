"""Write one HTML page about one or more runs.

It shows curves, noise levels, goodput, samples, checkpoints, and differences in settings.
"""

from __future__ import annotations

from datetime import datetime, timezone
from pathlib import Path

from megadiff.config.command_line import CommandParser

_EPILOG = """examples:
  megadiff report runs/demo
  megadiff report runs/masked runs/uniform --output compare.html
  megadiff report runs/sweep/* --x steps --output sweep.html

Run folders are only read; a run that is still training may be among them. Open the page in any browser: it needs no
network and loads nothing.
"""


def main() -> None:
    """Read the command line, read the runs, write the page."""
    parser = CommandParser(description=__doc__, epilog=_EPILOG)
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="run folders, which contain metrics.jsonl")
    parser.add_argument("--output", type=Path, default=Path("report.html"), help="the page (default: report.html)")
    parser.add_argument("--x", choices=("tokens", "steps"), default="tokens", help="x axis of the curves")
    arguments = parser.parse_args()
    output: Path = arguments.output
    from megadiff.report.markup import check_page_file, write_page

    check_page_file("--output", output)
    from megadiff.report.page import report_page
    from megadiff.report.run_record import read_runs

    runs = read_runs(arguments.runs)
    page = report_page(runs, axis=arguments.x, now=datetime.now(timezone.utc))
    write_page("--output", output, page)
    print(f"{output}: {len(runs)} run{'s' if len(runs) > 1 else ''}, {len(page.encode()) / 1e6:.1f} MB")
