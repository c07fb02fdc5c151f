"""The page of scaling fits: laws, figures, reservations and everything that was left out, in one file."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megadiff.report.markup import escaped, paragraph, section, table
from megadiff.report.page import STYLE, document

if TYPE_CHECKING:
    from megadiff.scaling.figures import Drawn

Record = Mapping[str, Any]
"""Content of a `fit.json`."""

_STYLE = f"""{STYLE}
svg.drawing {{ width: 100%; height: auto; display: block; color: var(--ink); fill: currentColor;
  stroke-linejoin: round; stroke-linecap: butt; }}
.quiet {{ color: var(--quiet); }}
main figure {{ max-width: 66rem; margin: 0 0 1.6rem; }}
figcaption {{ color: var(--quiet); font-size: .85rem; }}
"""
_TITLES = {
    "bowls": "Loss over size at equal compute",
    "laws": "Optimal size, tokens and loss over compute",
    "surface": "Loss over size and tokens",
    "batch": "Batch and learning rate",
    "residuals": "Residuals",
    "exponents": "Exponents and their errors",
    "noises": "Noises side by side",
    "cooldowns": "Cooldowns",
}
_NONE = "\u2013"
_MOST_ROWS = 400


def fit_page(record: Record, figures: Sequence[Drawn], summary: Sequence[str], *, now: datetime) -> str:
    """Return the whole page.

    Args:
        record: content of `fit.json`.
        figures: drawn figures, each for one of the sections.
        summary: the lines that the command printed.
        now: time of writing, with a time zone.
    """
    tables = {
        "laws": _laws(record),
        "bowls": _budgets(record),
        "batch": _batches(record),
        "noises": _compared(record) + _paired(record),
        "cooldowns": _cooldowns(record),
        "residuals": _held_out(record),
    }
    parts = [section("summary", "Summary", "<pre>" + escaped("\n".join(summary)) + "</pre>"), _reservations(record)]
    for name, title in _TITLES.items():
        drawn = [_figure(each) for each in figures if each.section == name]
        parts.append(section(name, title, *drawn, tables.get(name, "")))
    parts.append(section("left-out", "Runs left out", _excluded(record)))
    remark = f"{record['source']}; {record['runs']} of {record['runs_looked_at']} runs count. Written "
    title = f"{record['name']}: scaling laws"
    body = "\n".join(part for part in parts if part)
    return document(title, title, remark + now.isoformat(timespec="seconds"), body, style=_STYLE)


def _figure(drawn: Drawn) -> str:
    return f'<figure id="figure-{drawn.name}">{drawn.inline}<figcaption>{escaped(drawn.caption)}</figcaption></figure>'


def _reservations(record: Record) -> str:
    reasons = record["provisional_reasons"]
    if not reasons:
        return section("standing", "Standing", paragraph("Every run and every budget counts; no reservation."))
    items = "".join(f"<li>{escaped(reason)}</li>" for reason in reasons)
    return section("standing", "Provisional", f"<ul>{items}</ul>")


def _laws(record: Record) -> str:
    rows = []
    for law in record["laws"]:
        if law["size"] == "all" and law["form"] in ("power", "surface", "constant"):
            values = ", ".join(f"{name} {_estimate(found)}" for name, found in law["parameters"].items())
            words = (law["noise"], law["quantity"], law["form"], law.get("of", _NONE), law["estimator"])
            fitted = law.get("r_squared")
            rows.append((*map(escaped, words), escaped(values), _number(fitted, 5), str(law.get("runs", _NONE))))
    heads = ("noise", "quantity", "form", "of", "estimator", "parameters", "R squared", "runs")
    level = 100 * (record["laws"][0]["confidence"] if record["laws"] else 0.95)
    caption = f"Laws, with {level:g} % intervals that resample whole runs"
    return table(heads, rows, caption=caption) if rows else ""


def _estimate(found: Any) -> str:
    if not isinstance(found, Mapping):
        return _number(found)
    interval = found.get("interval")
    ends = "" if interval is None else f" [{_number(interval[0])}, {_number(interval[1])}]"
    return f"{_number(found['value'])}{ends}"


def _number(value: Any, digits: int = 4) -> str:
    return _NONE if value is None else f"{value:.{digits}g}"


def _budgets(record: Record) -> str:
    rows = [
        (escaped(noise), _number(budget["flops"]), str(budget["sizes"]), _number(budget["size"]),
         " to ".join(_number(end) for end in budget["size_interval"]), _number(budget["tokens"]),
         _number(budget["loss"]), _number(budget["best_loss"]), _number(budget["curvature"], 3),
         escaped(budget["excluded"] or "yes"))
        for noise, found in record["bowls"].items()
        for budget in found["budgets"]
    ]  # fmt: skip
    heads = ("noise", "C", "sizes", "M*", "interval", "D*", "L*", "best run", "curvature", "counts")
    return table(heads, rows, caption="Vertices; the best run is biased low by luck") if rows else ""


def _mean_of(points: int) -> str:
    return "one point" if points == 1 else f"mean of {points} points"


def _held_out(record: Record) -> str:
    rows = [
        (escaped(noise), "vertices", _number(held["flops"]), _number(held["loss"]), _number(held["predicted_loss"]),
         f"{held['loss_error_percent']:+.2f} %", _number(held["size"]), _number(held["predicted_size"]),
         "yes" if held["is_within"] else "no")
        for noise, found in record["bowls"].items()
        if (held := found["held_out"]) is not None and held["loss_error_percent"] is not None
    ]  # fmt: skip
    rows += [
        (escaped(law["noise"]), escaped(f"surface ({law['estimator']}), {_mean_of(law['held_out_points'])}"),
         _number(unseen["at"]), _number(unseen["measured"]), _number(unseen["predicted"]),
         f"{100 * (unseen['predicted'] / unseen['measured'] - 1):+.2f} %", _NONE, _NONE, _NONE)
        for law in record["laws"]
        if law["form"] == "surface"
        for unseen in law.get("held_out", ())
    ]  # fmt: skip
    heads = ("noise", "by", "C", "loss", "predicted", "off", "M*", "predicted", "within the intervals")
    return table(heads, rows, caption="The largest budget, predicted by a fit without it") if rows else ""


def _batches(record: Record) -> str:
    rows = []
    for law in record["laws"]:
        if law["form"] == "hyperbola":
            ends = " to ".join(_number(end) for end in law["critical_batch_interval"])
            g, inside = _number(law["parameters"]["g"]["value"], 3), "yes" if law["is_inside"] else "no"
            rows.append((escaped(law["noise"]), escaped(law["size"]), _number(law["at_loss"]), _number(law["s_opt"]),
                         _number(law["b_opt"]), g, f"{_number(law['critical_batch'])} ({ends})", inside))  # fmt: skip
    heads = ("noise", "size", "loss", "steps", "batch of fewest tokens", "g", "batch of 20 % more tokens", "inside")
    return table(heads, rows, caption="Hyperbolas of batch, in tokens, against steps") if rows else ""


def _compared(record: Record) -> str:
    rows = []
    for found in record["comparisons"]:
        crossing, saved = found["crossing"], found["speed_up"]
        ends = ["0 or infinite" if end is None else _number(end, 3) for end in crossing["interval"]]
        where = _number(crossing["flops"], 3) + (" (extrapolated)" if crossing["is_extrapolated"] else "")
        beyond = " (extrapolated)" if saved["is_extrapolated"] else ""
        words = f"{found['size_exponent_gap']:+.4f} \u00b1 {_number(found['size_exponent_gap_stderr'], 2)}"
        rows.append((escaped(f"{found['first']} and {found['second']}"), where, " to ".join(ends),
                     "yes" if found["crossing_is_resolved"] else "no",
                     f"{_number(saved['ratio'], 3)} at a loss of {_number(saved['loss'])}{beyond}", words))  # fmt: skip
    heads = (
        "pair",
        "crossing, FLOPs",
        "interval",
        "resolved",
        "compute, second over first",
        "M* exponents' difference",
    )
    return table(heads, rows, caption="Comparisons of laws") if rows else ""


def _paired(record: Record) -> str:
    rows = []
    for found in record["paired"][:_MOST_ROWS]:
        d = found["difference"]
        names = [escaped(_setting(found[side])) for side in ("first", "second")]
        ends = f"{d['difference']:+.4f} [{d['low']:+.4f}, {d['high']:+.4f}]"
        rows.append((_number(found["flops"]), escaped(found["what"]), *names, ends, _number(d["unpaired_stderr"], 2),
                     f"{d['sequences']:,}"))  # fmt: skip
    heads = ("C", "pair", "first", "second", "first less second, nats per token", "error if unpaired", "sequences")
    caption = "Runs at equal compute over the same validation sequences: their differences, without the luck of runs"
    return table(heads, rows, caption=caption) if rows else ""


def _setting(side: Record) -> str:
    """Return one side of a pair in words: its noise and its runs' names."""
    return f"{side['noise']} ({', '.join(Path(run).name for run in side['runs'])})"


def _cooldowns(record: Record) -> str:
    rows = [
        (escaped(found["run"]), escaped(found["trunk"]), escaped(found["noise"]), _number(found["tokens"]),
         _number(found["unannealed"]), _number(found["annealed"]), _number(found["unannealed"] / found["annealed"], 5))
        for found in record["cooldowns"][:_MOST_ROWS]
    ]  # fmt: skip
    heads = ("branch", "trunk", "noise", "tokens", "without", "with a cooldown", "ratio")
    return table(heads, rows, caption="Branches and their trunks at equal tokens") if rows else ""


def _excluded(record: Record) -> str:
    rows = [(escaped(e["run"]), escaped(e["reason"]), escaped(e["detail"])) for e in record["excluded"][:_MOST_ROWS]]
    if not rows:
        return paragraph("No run was left out.")
    return table(("run", "reason", "detail"), rows, caption="By name and reason")
