"""The tables of a report: state of the runs, unusual steps, samples, and configuration."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from megadiff.errors import DataError
from megadiff.metric_lines import finite, number
from megadiff.report.line_chart import exact, of_bytes, percent, short
from megadiff.report.markup import escaped, paragraph, table
from megadiff.report.run_record import RunRecord, differences, wall_time
from megadiff.scaling.flops import FLOP_COUNTS
from megadiff.scaling.paired import compare

_NONE = "\u2013"
_UNUSUAL_SHOWN = 100


def standing(runs: Sequence[RunRecord]) -> str:
    """Return a table with one row per run: state, progress, last and best figures."""
    heads = ("run", "state", "step", "tokens", "loss", "ELBO", "held-out ELBO", "best held-out", "bits per byte")
    heads += ("unigram", "bigram")
    heads += ("tokens/s", f"FLOPs ({' / '.join(FLOP_COUNTS)})", "goodput", "skipped", "spikes")
    overview = table(heads, [_standing_row(run) for run in runs], caption="State of the runs; nats per token")
    remarks = [
        f"{run.label}: {run.metrics.unreadable} line(s) of metrics.jsonl are damaged and left out."
        for run in runs
        if run.metrics.unreadable
    ]
    remarks += [
        f"{run.label}: no line of metrics yet."
        for run in runs
        if not run.metrics.training and not run.metrics.evaluations
    ]
    reasons = [
        f"{run.label}: {run.status.state.replace('_', ' ')}: {run.status.reason}"
        for run in runs
        if run.status is not None and run.status.reason
    ]
    return overview + "".join(paragraph(remark) for remark in (*remarks, *reasons))


def _standing_row(run: RunRecord) -> list[str]:
    training, evaluations = run.metrics.training, run.metrics.evaluations
    last = next((line for line in reversed(training) if number(line, "loss") is not None), {})
    measured = [line for line in evaluations if number(line, "eval_elbo") is not None]
    best = min(measured, key=lambda line: line["eval_elbo"], default={})
    newest = measured[-1] if measured else {}
    tokens = number(training[-1], "tokens") if training else None
    spikes = sum(not unusual.is_skipped for unusual in run.unusual)
    return [
        escaped(run.label),
        _state(run),
        _steps(run),
        _figure(tokens),
        _figure(last.get("loss"), 4),
        _figure(last.get("elbo"), 4),
        _with_error(newest),
        _with_error(best) + (f" at step {best['step']}" if best else ""),
        _figure(newest.get("eval_bits_per_byte"), 4),
        _figure(newest.get("eval_unigram"), 4),
        _figure(newest.get("eval_bigram"), 4),
        _figure(run.metrics.tokens_per_s),
        _flops(training[-1].get("flops") if training else None),
        percent(wall_time(run.attempts).goodput) if run.attempts else _NONE,
        str(len(run.unusual) - spikes),
        str(spikes),
    ]


def _flops(found: Any) -> str:
    """Return the FLOPs of a run by three counts; none of runs that did not record them."""
    counted = found if isinstance(found, dict) else {}
    figures = [_figure(counted.get(count)) for count in FLOP_COUNTS]
    return " / ".join(figures) if counted else _NONE


def _state(run: RunRecord) -> str:
    if run.status is None:
        return "not recorded"
    state = f"{run.status.state.replace('_', ' ')} since {run.status.time}"
    where = f" on {run.status.host}" + (f", job {run.status.job}" if run.status.job else "")
    return f'<span title="{escaped(state + where)}">{escaped(run.status.state.replace("_", " "))}</span>'


def _steps(run: RunRecord) -> str:
    lines = [*run.metrics.training[-1:], *run.metrics.evaluations[-1:]]
    step = max((line["step"] for line in lines), default=0)
    return f"{step:,}" + (escaped(f" of {run.status.steps}") if run.status is not None else "")


def by_source(runs: Sequence[RunRecord]) -> str:
    """Return a table of the last evaluation by source of the validation data, for runs with several sources."""
    rows = []
    for run in runs:
        found = run.metrics.evaluations[-1].get("eval_elbo_by_source") if run.metrics.evaluations else None
        if isinstance(found, dict) and len(found) > 1:
            for source, pair in found.items():
                value, error = [*pair, None, None][:2] if isinstance(pair, list) else (None, None)
                line = {"eval_elbo": value, "eval_elbo_stderr": error}
                rows.append((escaped(run.label), escaped(source), _with_error(line)))
    heads = ("run", "source", "held-out ELBO")
    return table(heads, rows, caption="Last evaluation by source; nats per token") if rows else ""


def paired(runs: Sequence[RunRecord]) -> str:
    """Return a table that compares the last evaluation of each run with the first run's, sequence by sequence."""
    first, *others = runs
    if not others or not any(run.per_sequence for run in runs):
        return ""
    heads = ("run", "against", "at steps", "difference", "95 % interval", "error without pairs")
    rows = [_paired_row(run, first) for run in others]
    caption = "Last evaluations, differences over the same validation sequences; nats per token, below 0 is better"
    return table(heads, rows, caption=caption)


def _paired_row(run: RunRecord, first: RunRecord) -> tuple[str, ...]:
    names = (escaped(run.label), escaped(first.label))
    if not (run.per_sequence and first.per_sequence):
        missing = first.label if run.per_sequence else run.label
        return (*names, _NONE, escaped(f"{missing} has no record of single sequences"), _NONE, _NONE)
    steps = [max(each.per_sequence) for each in (run, first)]
    shown = " and ".join(f"{step:,}" for step in steps)
    try:
        found = compare(run.per_sequence[steps[0]], first.per_sequence[steps[1]])
    except DataError as error:
        return (*names, shown, escaped(str(error)), _NONE, _NONE)
    return (
        *names,
        shown,
        f"{found.difference:+.4f} \u00b1 {found.stderr:.4f}",
        f"{found.low:+.4f} to {found.high:+.4f}",
        f"{found.unpaired_stderr:.4f}",
    )


def data(runs: Sequence[RunRecord]) -> str:
    """Return tables of the training and validation data of each run: sizes, shares, epochs so far and at the end,
    doubts."""
    trained, measured, doubts = [], [], []
    for run in runs:
        if run.data is None:
            continue
        epochs = run.metrics.training[-1].get("epochs") if run.metrics.training else None
        now = epochs if isinstance(epochs, dict) else {}
        trained += [
            (
                escaped(run.label),
                escaped(found.source),
                f"{found.tokens:,}",
                f"{found.sequences:,}",
                percent(found.share),
                _figure(now.get(found.source), 4),
                _figure(found.epochs_at_end, 4),
            )
            for found in run.data.train
        ]
        measured += [
            (
                escaped(run.label),
                escaped(found.source),
                f"{found.tokens:,}",
                f"{found.sequences:,}",
                f"{found.measured:,}",
                f"{found.measured_tokens:,}",
            )
            for found in run.data.valid
        ]
        doubts += [paragraph(f"{run.label}: {doubt}.") for doubt in run.data.advice]
    if not trained:
        return ""
    heads = ("run", "source", "tokens", "sequences", "share", "epochs so far", "epochs at the end")
    parts = [table(heads, trained, caption="Training data by source")]
    if measured:
        heads = ("run", "source", "tokens", "sequences", "measured sequences", "measured tokens")
        parts.append(table(heads, measured, caption="Validation data by source"))
    return "".join((*parts, *doubts))


def unusual(runs: Sequence[RunRecord]) -> str:
    """Return a table of skipped steps and spikes, the newest of each run."""
    rows = [
        (escaped(run.label), str(found.step), "no" if found.is_skipped else "yes", escaped(found.why))
        for run in runs
        for found in run.unusual[-_UNUSUAL_SHOWN:]
    ]
    if not rows:
        return paragraph("No step was skipped and no spike was noted.")
    caption = f"The last {_UNUSUAL_SHOWN} of each run"
    return table(("run", "step", "update made", "what stood out"), rows, caption=caption)


def checkpoints(runs: Sequence[RunRecord]) -> str:
    """Return a table of the contents of `checkpoints/`; only names and sizes were compared, not contents."""
    rows = [
        (
            escaped(run.label),
            escaped(found.name) + (" (LATEST)" if found.name == run.latest else ""),
            f'<span title="{escaped(found.why)}">{found.state}</span>' if found.why else found.state,
            of_bytes(found.size_bytes),
            found.modified,
        )
        for run in runs
        for found in run.checkpoints
    ]
    missing = [run.label for run in runs if not run.checkpoints]
    shown = table(("run", "checkpoint", "state", "size", "written"), rows, caption="Checkpoints") if rows else ""
    return shown + (paragraph(f"No checkpoint in: {', '.join(missing)}.") if missing else "")


def samples(runs: Sequence[RunRecord]) -> str:
    """Return the texts that the model wrote during training; the newest one is unfolded."""
    parts = []
    for run in runs:
        for place, sample in enumerate(reversed(run.samples)):
            cut = paragraph("The file contains more.") if sample.is_cut else ""
            parts.append(
                f"<details{' open' if place == 0 else ''}><summary>{escaped(run.label)}, step {sample.step}</summary>"
                f'<pre dir="auto">{escaped(sample.text)}</pre>{cut}</details>'
            )
    return "".join(parts) or paragraph("No run has a samples folder.")


def configuration(runs: Sequence[RunRecord]) -> str:
    """Return a table of the settings in which the runs differ, then each run's settings, folded."""
    parts = []
    if len(runs) > 1:
        rows = [
            (f"<code>{escaped(key)}</code>", *(_setting(value) for value in values))
            for key, values in differences([run.settings for run in runs]).items()
        ]
        heads = ("setting", *(run.label for run in runs))
        caption = "Settings in which the runs differ, besides name and output_dir"
        parts.append(table(heads, rows, caption=caption) if rows else paragraph("The runs have the same settings."))
    missing = [run.label for run in runs if run.settings is None]
    if missing:
        parts.append(paragraph(f"Without a readable config.yaml: {', '.join(missing)}."))
    for run in runs:
        if run.settings is not None:
            lines = "\n".join(f"{key}: {value}" for key, value in run.settings.items())
            summary = f"All settings of {run.label}"
            parts.append(f"<details><summary>{escaped(summary)}</summary><pre>{escaped(lines)}</pre></details>")
    return "".join(parts)


def _setting(value: str | None) -> str:
    return '<span class="remark">not set</span>' if value is None else escaped(value)


def _figure(value: Any, digits: int = 3) -> str:
    found = finite(value)
    return _NONE if found is None else short(found, digits)


def _with_error(line: dict[str, Any]) -> str:
    value, error = number(line, "eval_elbo"), number(line, "eval_elbo_stderr")
    if value is None:
        return _NONE
    return exact(value) + (f" \u00b1 {exact(error)}" if error is not None else "")
