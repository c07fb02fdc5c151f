"""Draw six charts of a run's report as one SVG file, for the documentation.

    python docs/images/report_picture.py runs/demo docs/images/report.svg

The charts and the style are those of the report page; only the arrangement is made here.
"""

from __future__ import annotations

import re
import sys
from pathlib import Path

from megadiff.report.line_chart import Chart
from megadiff.report.page import STYLE
from megadiff.report.run_charts import RunCharts
from megadiff.report.run_record import read_runs

WIDTH, HEIGHT, COLUMNS, GAP, TITLE = 460, 270, 3, 24, 28
_LINEAR = re.compile(r'<svg class="plot only-linear" viewBox="[^"]*"[^>]*>(.*?)</svg>', re.DOTALL)


def main() -> None:
    """Read the two arguments and write the picture."""
    run, output = Path(sys.argv[1]), Path(sys.argv[2])
    charts = RunCharts(read_runs([run]), "tokens")
    output.write_text(picture([*charts.learning(), charts.last_levels()]), encoding="utf-8")


def picture(charts: list[Chart]) -> str:
    """Return the charts in a grid, with their titles, as one SVG in the page's light colours."""
    parts = []
    for place, chart in enumerate(charts):
        found = _LINEAR.search(chart.figure())
        if found is None:
            raise SystemExit(f"the run recorded nothing for the chart `{chart.title}`; take another run")
        across = GAP + place % COLUMNS * (WIDTH + GAP)
        down = GAP + place // COLUMNS * (HEIGHT + TITLE + GAP)
        title = f'<text x="0" y="16" style="font-weight: 600; font-size: 15px">{chart.title}</text>'
        parts.append(
            f'<g transform="translate({across} {down})">{title}<g transform="translate(0 {TITLE})">{found[1]}</g></g>'
        )
    width = GAP + COLUMNS * (WIDTH + GAP)
    height = GAP + -(-len(charts) // COLUMNS) * (HEIGHT + TITLE + GAP)
    style = re.sub(r"@media \(prefers-color-scheme: dark\) \{.*?\n\}", "", STYLE, flags=re.DOTALL)
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" height="{height}">'
        f"<style>{style}</style><rect width='100%' height='100%' fill='white'/>{''.join(parts)}</svg>\n"
    )


if __name__ == "__main__":
    main()
