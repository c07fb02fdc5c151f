"""Write one HTML page about one or more runs.

It shows curves, noise levels, goodput, samples, checkpoints, and differences in settings.
"""

from __future__ import annotations

from datetime import datetime, timezone
from pathlib import Path

from megadiff.config.command_line import CommandParser
from megadiff.errors import DataError

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
    if output.suffix not in (".html", ".htm"):
        raise DataError(f"--output {output}: a name that ends in .html is wanted, so that no file of a run is replaced")
    if not output.parent.is_dir():
        raise DataError(f"--output {output}: there is no folder {output.parent}; make it, or name another one")
    if output.is_dir():
        raise DataError(f"--output {output}: this is a folder; name a file")

    from megadiff.files import write_atomically
    from megadiff.report.page import report_page
    from megadiff.report.run_record import read_runs

    runs = read_runs(arguments.runs)
    page = report_page(runs, axis=arguments.x, now=datetime.now(timezone.utc))
    try:
        write_atomically(output, page)
    except OSError as error:
        raise DataError(f"--output {output} cannot be written ({error.strerror or error}); name another one") from None
    print(f"{output}: {len(runs)} run{'s' if len(runs) > 1 else ''}, {len(page.encode()) / 1e6:.1f} MB")
