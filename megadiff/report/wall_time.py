"""Breakdown of a run's wall time, from the records of its attempts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from megadiff.report.figures import duration, percent
from megadiff.report.markup import escaped, paragraph, table
from megadiff.report.run_record import RunRecord
from megadiff.train.goodput import PHASES, Attempt

# The order is that of drawing.
_NAMES = {
    "step": "steps that counted",
    "setup": "setting up",
    "wait_for_data": "waiting for data",
    "evaluate": "evaluating",
    "save_stall": "saving",
    "lost": "steps taken again",
    "down": "between attempts",
    "other": "elsewhere",
}
_WIDTH = 1000


@dataclass(frozen=True)
class WallTime:
    """Seconds of wall time since the first start, by use."""

    total_s: float
    parts_s: dict[str, float]
    """Seconds of every phase and of `down` and `other`; their sum is `total_s` unless records overlap."""

    @property
    def goodput(self) -> float:
        """Fraction of time spent in steps that counted, 0 to 1."""
        return self.parts_s["step"] / self.total_s if self.total_s > 0 else 0.0


def wall_time(attempts: Sequence[Attempt]) -> WallTime:
    """Add up the attempts of a run."""
    found = {phase: sum(attempt.in_phase(phase) for attempt in attempts) for phase in PHASES}
    found["down"] = sum(attempt.down_s for attempt in attempts)
    total = sum(attempt.elapsed_s + attempt.down_s for attempt in attempts)
    found["other"] = max(0.0, total - sum(found.values()))
    return WallTime(total, {name: found[name] for name in _NAMES})


def goodput_part(runs: Sequence[RunRecord]) -> str:
    """Return a bar for each run that has a record, its seconds, and its attempts."""
    known = [(run, run.attempts) for run in runs if run.attempts]
    missing = [run.label for run in runs if not run.attempts]
    parts = []
    if known:
        times = [(run, wall_time(attempts)) for run, attempts in known]
        parts = [_bars(times), _legend(), _seconds(times), _attempts(known)]
    if missing:
        parts.append(paragraph(f"Without a readable goodput.json: {', '.join(missing)}."))
    return "".join(parts)


def _bars(times: Sequence[tuple[RunRecord, WallTime]]) -> str:
    rows = [
        (escaped(run.label), percent(time.goodput), duration(time.total_s), _bar(run.label, time))
        for run, time in times
    ]
    heads = ("run", "goodput", "wall time", "share of wall time, 0 to 100 %")
    return table(heads, rows, caption="Goodput: the share of wall time since the first start in steps that counted")


def _bar(label: str, time: WallTime) -> str:
    summary = ", ".join(f"{_NAMES[name]} {duration(spent)}" for name, spent in time.parts_s.items() if spent)
    drawn, left = "", 0.0
    whole = max(time.total_s, sum(time.parts_s.values()), 1e-9)
    for name, spent in time.parts_s.items():
        width = _WIDTH * spent / whole
        if width > 0:
            title = f"{_NAMES[name]}: {duration(spent)}"
            drawn += (
                f'<rect class="p-{name}" x="{left:.2f}" width="{width:.2f}" height="18"><title>{title}</title></rect>'
            )
        left += width
    return (
        f'<svg class="bar" viewBox="0 0 {_WIDTH} 18" preserveAspectRatio="none" role="img" '
        f'aria-label="{escaped(f"{label}: {summary}")}">{drawn}</svg>'
    )


def _legend() -> str:
    items = "".join(
        f'<li><svg class="key" viewBox="0 0 26 10" aria-hidden="true"><rect class="p-{name}" width="26" height="10"/>'
        f"</svg>{title}</li>"
        for name, title in _NAMES.items()
    )
    return f'<ul class="legend">{items}</ul>'


def _seconds(times: Sequence[tuple[RunRecord, WallTime]]) -> str:
    rows = [(escaped(run.label), *(duration(spent) for spent in time.parts_s.values())) for run, time in times]
    return table(("run", *_NAMES.values()), rows, caption="Wall time by use")


def _attempts(known: Sequence[tuple[RunRecord, Sequence[Attempt]]]) -> str:
    rows = [
        (
            escaped(run.label),
            str(number),
            escaped(attempt.ended or "running, or killed"),
            str(attempt.last_step),
            str(attempt.steps),
            duration(attempt.elapsed_s),
            duration(attempt.down_s),
            str(attempt.saves),
            duration(attempt.save_s / attempt.saves) if attempt.saves else "\u2013",
        )
        for run, attempts in known
        for number, attempt in enumerate(attempts, start=1)
    ]
    heads = ("run", "attempt", "ended", "last step", "steps taken", "lasted", "down before", "saves", "time a save")
    return table(heads, rows[-200:], caption="Attempts: process lives of the runs (the last 200)")
