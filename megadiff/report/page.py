"""The report as one self-contained HTML page, which contains no address of another machine and loads nothing.

Its content security policy allows only the page's own style and script, by their hashes. The charts do not depend on
the script, which only shows the values under the pointer.
"""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Sequence
from datetime import datetime

from megadiff.report import run_tables
from megadiff.report.line_chart import Chart
from megadiff.report.markup import escaped, paragraph, section
from megadiff.report.page_script import SCRIPT
from megadiff.report.page_style import STYLE
from megadiff.report.progress import Axis
from megadiff.report.run_charts import RunCharts
from megadiff.report.run_record import RunRecord
from megadiff.report.wall_time import goodput_part

_NAMED = 4


def report_page(runs: Sequence[RunRecord], *, axis: Axis = "tokens", now: datetime) -> str:
    """Return the whole page.

    Args:
        runs: at least one.
        axis: quantity on the x axis of the curves.
        now: time of writing, with a time zone.
    """
    names = ", ".join(run.label for run in runs[:_NAMED])
    title = names + (f" and {len(runs) - _NAMED} more" if len(runs) > _NAMED else "")
    policy = (
        f"default-src 'none'; style-src 'sha256-{_hash(STYLE)}'; script-src 'sha256-{_hash(SCRIPT)}'; "
        "base-uri 'none'; form-action 'none'"
    )
    return f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="{policy}">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{escaped(title)}: training report</title>
<style>{STYLE}</style>
</head>
<body>
<input type="radio" name="axes" id="linear" checked>
<input type="radio" name="axes" id="log">
<header>
<h1>{escaped(title)}</h1>
<p class="remark">Training report, written {escaped(now.isoformat(timespec="seconds"))}</p>
<nav aria-label="Axes of the charts"><label for="linear">linear axes</label><label for="log">logarithmic axes</label>
</nav>
</header>
<main>
{_sections(runs, axis)}
</main>
<div id="tip" aria-hidden="true" hidden></div>
<script>{SCRIPT}</script>
</body>
</html>
"""


def _sections(runs: Sequence[RunRecord], axis: Axis) -> str:
    charts = RunCharts(runs, axis)
    over_training = charts.levels_over_training()
    missing = "" if over_training else paragraph("No run recorded figures by noise level.")
    parts = (
        section("standing", "Runs", run_tables.standing(runs)),
        section("learning", "Learning", _grid(charts.learning()), run_tables.by_source(runs)),
        section("data", "Data", run_tables.data(runs)),
        section("levels", "By noise level", missing, _grid([charts.last_levels(), *over_training])),
        section("unusual", "Skipped steps and spikes", run_tables.unusual(runs)),
        section("speed", "Speed", _grid(charts.speed())),
        section("goodput", "Goodput", goodput_part(runs)),
        section("samples", "Samples", run_tables.samples(runs)),
        section("checkpoints", "Checkpoints", run_tables.checkpoints(runs)),
        section("configuration", "Configuration", run_tables.configuration(runs)),
    )
    return "\n".join(parts)


def _grid(charts: Sequence[Chart]) -> str:
    return f'<div class="grid">{"".join(chart.figure() for chart in charts)}</div>'


def _hash(text: str) -> str:
    return base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
