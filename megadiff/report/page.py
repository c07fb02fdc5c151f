"""The HTML page of a report: its parts, style and script in one file that loads nothing, as every page of megadiff.

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
from megadiff.report.run_charts import RunCharts
from megadiff.report.run_record import Axis, RunRecord, goodput_part

# Okabe and Ito's colours, darkened on white and lightened on black until each has a contrast of 3 to 1 or more.
_LIGHT = ("#0072b2", "#d55e00", "#007a5a", "#b2589a", "#9a6a00", "#444444")
_DARK = ("#56b4e9", "#ff8c42", "#2fbf94", "#e39ac8", "#e6b400", "#e0e0e0")
_DASHES = ("none", "7 3", "2 3", "9 3 2 3")
_REFERENCE_DASHES = ("6 4", "2 4", "12 4", "6 4 2 4")
_PHASES = {
    "step": "#007a5a",
    "setup": "#56b4e9",
    "wait_for_data": "#e6b400",
    "evaluate": "#cc79a7",
    "save_stall": "#0072b2",
    "lost": "#d55e00",
    "down": "#777777",
    "other": "#bbbbbb",
}

_NAMED = 4


def _palette(colours: tuple[str, ...]) -> str:
    return "".join(f"--c{place}: {colour}; " for place, colour in enumerate(colours))


STYLE = f"""
:root {{ color-scheme: light dark; --grid: #8884; --quiet: #5c6370; --paper: #fff; --ink: #1c1f24;
  {_palette(_LIGHT)} }}
@media (prefers-color-scheme: dark) {{
  :root {{ --quiet: #a0a8b4; --paper: #14161a; --ink: #e8eaed; {_palette(_DARK)} }}
}}
* {{ box-sizing: border-box; }}
body {{ font: 15px/1.5 system-ui, sans-serif; margin: 0 auto; padding: 1rem; max-width: 84rem;
  background: var(--paper); color: var(--ink); }}
h1 {{ font-size: 1.35rem; margin: 0; overflow-wrap: anywhere; }}
h2 {{ font-size: 1.1rem; margin: 2rem 0 .6rem; border-bottom: 1px solid var(--grid); }}
h3 {{ font-size: .95rem; margin: 0 0 .2rem; }}
.remark {{ color: var(--quiet); font-size: .85rem; margin: .2rem 0; overflow-wrap: anywhere; }}
body > input {{ position: absolute; opacity: 0; }}
nav label {{ display: inline-block; padding: .2rem .7rem; border: 1px solid var(--quiet); cursor: pointer;
  font-size: .85rem; }}
#linear:checked ~ header [for=linear], #log:checked ~ header [for=log] {{
  background: var(--ink); color: var(--paper); }}
#linear:focus-visible ~ header [for=linear], #log:focus-visible ~ header [for=log] {{ outline: 3px solid var(--c0); }}
#linear:checked ~ main .only-log, #log:checked ~ main .only-linear {{ display: none; }}
.grid {{ display: grid; gap: 1.4rem; grid-template-columns: repeat(auto-fill, minmax(min(100%, 22rem), 1fr)); }}
figure {{ margin: 0; min-width: 0; }}
svg.plot {{ width: 100%; height: auto; display: block; touch-action: pan-y; }}
svg text {{ font: 13px system-ui, sans-serif; fill: var(--ink); }}
line.grid {{ stroke: var(--grid); stroke-width: 1; }}
.axis {{ stroke: var(--quiet); fill: none; stroke-width: 1; }}
.cursor {{ stroke: var(--quiet); stroke-dasharray: 3 3; }}
.curve {{ fill: none; stroke: currentColor; stroke-width: 1.8; stroke-linejoin: round; stroke-linecap: round; }}
.thin {{ stroke-width: 1; opacity: .55; }}
.foot {{ fill: none; stroke: currentColor; stroke-width: 2; }}
.dot circle {{ fill: currentColor; }}
.dot path {{ fill: none; stroke: currentColor; stroke-width: 1.2; }}
{" ".join(f".c{place} {{ color: var(--c{place}); }}" for place in range(len(_LIGHT)))}
{" ".join(f".d{place} {{ stroke-dasharray: {dash}; }}" for place, dash in enumerate(_DASHES))}
.reference {{ color: var(--quiet); stroke-width: 1.2; }}
{" ".join(f".r{place} {{ stroke-dasharray: {dash}; }}" for place, dash in enumerate(_REFERENCE_DASHES))}
{" ".join(f".p-{name} {{ fill: {colour}; }}" for name, colour in _PHASES.items())}
.legend {{ list-style: none; margin: .2rem 0; padding: 0; font-size: .82rem; max-height: 7.5rem; overflow: auto; }}
.legend li {{ display: inline-block; margin-right: .9rem; overflow-wrap: anywhere; }}
.key {{ width: 26px; height: 10px; margin-right: .35rem; }}
.wide {{ overflow-x: auto; margin: .5rem 0 1rem; }}
table {{ border-collapse: collapse; font-size: .85rem; font-variant-numeric: tabular-nums; }}
caption {{ text-align: left; color: var(--quiet); padding: .2rem 0; }}
th, td {{ text-align: left; padding: .25rem .8rem .25rem 0; border-bottom: 1px solid var(--grid); vertical-align: top;
  max-width: 26rem; overflow-wrap: break-word; }}
thead th {{ white-space: nowrap; }}
#standing td {{ white-space: nowrap; }}
svg.bar {{ width: 22rem; height: 1.1rem; display: block; }}
pre {{ white-space: pre-wrap; overflow-wrap: anywhere; background: #8881; padding: .6rem; font-size: .82rem; }}
#tip {{ position: fixed; pointer-events: none; background: var(--ink); color: var(--paper); padding: .3rem .5rem;
  font-size: .8rem; white-space: pre; border-radius: .3rem; z-index: 1; max-width: 90vw; overflow: hidden; }}
@media print {{ nav {{ display: none; }} figure {{ break-inside: avoid; }} }}
"""
"""Text of the style element."""


SCRIPT = r"""
"use strict";
const tip = document.getElementById("tip");
function axis(text) {
  const [from, to, low, high, log] = text.split(",").map(Number);
  const bend = v => log ? Math.log10(v) : v, a = bend(low), b = bend(high);
  return at => { const v = a + (b - a) * (at - from) / (to - from); return log ? 10 ** v : v; };
}
function said(v) {
  for (const [size, letter] of [[1e12, "T"], [1e9, "B"], [1e6, "M"], [1e3, "k"]])
    if (Math.abs(v) >= size) return Number((v / size).toPrecision(4)) + letter;
  return String(Number(v.toPrecision(4)));
}
for (const plot of document.querySelectorAll("svg.plot")) {
  const x = axis(plot.dataset.x), y = axis(plot.dataset.y), cursor = plot.querySelector(".cursor");
  const [left, right] = plot.dataset.x.split(",").map(Number);
  const curves = [...plot.querySelectorAll("path.curve")].map(path => ({
    label: path.dataset.label,
    points: [...path.getAttribute("d").matchAll(/[ML]([\d.]+) ([\d.]+)/g)].map(m => [Number(m[1]), Number(m[2])]),
  }));
  const hide = () => { tip.hidden = true; cursor.setAttribute("visibility", "hidden"); };
  plot.addEventListener("pointerleave", hide);
  plot.addEventListener("pointermove", event => {
    const box = plot.getBoundingClientRect(), at = (event.clientX - box.left) * plot.viewBox.baseVal.width / box.width;
    if (at < left - 4 || at > right + 4) { hide(); return; }
    let best = null;
    const lines = curves.map(curve => {
      let near = null;
      for (const p of curve.points) if (near === null || Math.abs(p[0] - at) < Math.abs(near[0] - at)) near = p;
      if (near === null) return "";
      if (best === null || Math.abs(near[0] - at) < Math.abs(best - at)) best = near[0];
      return "\n" + curve.label + ": " + said(y(near[1]));
    });
    if (best === null) return;
    tip.textContent = said(x(best)) + " " + plot.dataset.xLabel + lines.join("");
    tip.hidden = false;
    cursor.setAttribute("x1", best);
    cursor.setAttribute("x2", best);
    cursor.setAttribute("visibility", "visible");
    const width = tip.offsetWidth, height = tip.offsetHeight;
    tip.style.left = Math.max(4, Math.min(event.clientX + 14, innerWidth - width - 4)) + "px";
    tip.style.top = Math.max(4, Math.min(event.clientY + 14, innerHeight - height - 4)) + "px";
  });
}
"""
"""Text of the script element."""


def report_page(runs: Sequence[RunRecord], *, axis: Axis = "tokens", now: datetime) -> str:
    """Return the whole page.

    Args:
        runs: at least one.
        axis: quantity on the x axis of the curves.
        now: time of writing, with a time zone.
    """
    names = ", ".join(run.label for run in runs[:_NAMED])
    title = names + (f" and {len(runs) - _NAMED} more" if len(runs) > _NAMED else "")
    return document(
        title,
        f"{title}: training report",
        f"Training report, written {now.isoformat(timespec='seconds')}",
        _sections(runs, axis),
        controls=_AXES,
        navigation=_AXIS_LABELS,
        script=SCRIPT,
    )


_AXES = """<input type="radio" name="axes" id="linear" checked>
<input type="radio" name="axes" id="log">
"""
_AXIS_LABELS = """<nav aria-label="Axes of the charts"><label for="linear">linear axes</label>\
<label for="log">logarithmic axes</label>
</nav>
"""


def document(
    heading: str,
    title: str,
    remark: str,
    main: str,
    *,
    controls: str = "",
    navigation: str = "",
    script: str = "",
    style: str = STYLE,
) -> str:
    """Return a whole page that loads nothing, under a policy that allows its own style and script alone.

    Args:
        heading: plain text of the first heading.
        title: plain text of the window's title.
        remark: plain text below the heading.
        main: markup of the sections.
        controls: markup before the header.
        navigation: markup at the end of the header.
        script: text of the script; empty for none.
        style: text of the style element.
    """
    scripts = f"script-src 'sha256-{_hash(script)}'; " if script else ""
    policy = f"default-src 'none'; style-src 'sha256-{_hash(style)}'; {scripts}base-uri 'none'; form-action 'none'"
    ending = (
        f"""<div id="tip" aria-hidden="true" hidden></div>
<script>{script}</script>
"""
        if script
        else ""
    )
    return f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="{policy}">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{escaped(title)}</title>
<style>{style}</style>
</head>
<body>
{controls}<header>
<h1>{escaped(heading)}</h1>
<p class="remark">{escaped(remark)}</p>
{navigation}</header>
<main>
{main}
</main>
{ending}</body>
</html>
"""


def _sections(runs: Sequence[RunRecord], axis: Axis) -> str:
    charts = RunCharts(runs, axis)
    over_training = charts.levels_over_training()
    missing = "" if over_training else paragraph("No run recorded figures by noise level.")
    parts = (
        section("standing", "Runs", run_tables.standing(runs)),
        section("learning", "Learning", _grid(charts.learning()), run_tables.by_source(runs), run_tables.paired(runs)),
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
