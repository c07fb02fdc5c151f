"""The report's style: light and dark, wide and narrow, in colours that colour-blind readers can distinguish."""

from __future__ import annotations

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
