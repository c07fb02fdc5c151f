"""A run as its files record it: lines of metrics, settings, progress, wall time, unusual steps.

A chart draws a few hundred points of a curve: the lowest and the highest of each interval. Lines are therefore kept in
blocks of equal length, and a block of a long run holds only lines in which a charted figure is lowest or highest, the
first and the last line, and those of steps without an update. When there are too many blocks, neighbours are joined.
"""

from __future__ import annotations

import itertools
import re
import statistics
from array import array
from bisect import bisect_left
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime, timezone
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import TypeAdapter, ValidationError

from megadiff.checkpoint.folder import step_folders, step_of, verify_files
from megadiff.data.facts import DataFacts, read_data_facts
from megadiff.errors import CheckpointError, DataError, StorageError
from megadiff.files import UnreadableFileError, lines, open_plain, read_bytes, why
from megadiff.metric_lines import MAX_LINE_BYTES, Line, finite, number, parsed
from megadiff.report.line_chart import duration, percent
from megadiff.report.markup import escaped, paragraph, table
from megadiff.scaling import paired
from megadiff.supervision.status import Status, read_status
from megadiff.train.goodput import PHASES, Attempt

CHARTED = (
    "elbo",
    "loss",
    "grad_norm",
    "lr",
    "tokens_per_s",
    "tflops_per_device",
    "executed_tflops_per_device",
    "mfu",
    "hfu",
    "peak_bytes",
)
"""Figures of training lines that are charted."""
CHARTED_BY_LOG_SNR = "loss_by_log_snr"
"""Figures by noise level that are charted, a curve for each bin."""

_NUMBERS = (float, int)

_MOST_BLOCKS = 320
_JOINED = 4
"""Number of neighbouring blocks that are joined when there are too many."""
_FIRST_LENGTH = 32
_AT_ONCE = 256
"""Number of lines of an unfinished block from which it is thinned."""


class ThinnedLines:
    """Training lines, added in the order of the file: all of the first 10,000, or of more those described above."""

    def __init__(self) -> None:
        self._blocks: list[list[Line]] = []
        self._length = _FIRST_LENGTH
        """Number of lines of the file from which a block is made."""
        self._open: list[Line] = []
        self._missing = _FIRST_LENGTH
        """Number of lines of the file that the open block still takes."""

    def add(self, line: Line) -> None:
        """Add a line."""
        self._open.append(line)
        self._missing -= 1
        if self._missing == 0:
            self._close_block()
        elif len(self._open) >= _AT_ONCE:
            self._open = _thinned(self._open)

    def in_order(self) -> list[Line]:
        """Return the lines that are kept in the order of their steps; of two with one step the one added later."""
        return in_order(line for block in (*self._blocks, self._open) for line in block)

    def _close_block(self) -> None:
        self._blocks.append(self._open if self._length == _FIRST_LENGTH else _thinned(self._open))
        if len(self._blocks) == _MOST_BLOCKS:
            firsts = range(0, _MOST_BLOCKS, _JOINED)
            joined = ([line for block in self._blocks[at : at + _JOINED] for line in block] for at in firsts)
            self._blocks = list(map(_thinned, joined))
            self._length *= _JOINED
        self._open, self._missing = [], self._length


def in_order(lines: Iterable[Line]) -> list[Line]:
    """Return lines in the order of their steps; of two with one step the later one."""
    found = {line["step"]: line for line in lines}
    return [found[step] for step in sorted(found)]


def _thinned(lines: list[Line]) -> list[Line]:
    """Return the lines of a block that are kept, in their order."""
    kept = {0, len(lines) - 1}
    kept.update(place for place, line in enumerate(lines) if line.get("skipped") is not None)
    for key in CHARTED:
        having = [place for place, line in enumerate(lines) if type(line.get(key)) in _NUMBERS]
        _keep_extremes(kept, [lines[place][key] for place in having], having)
        if len(having) < len(lines):  # the first line with null, which breaks the curve
            kept.update([place for place, line in enumerate(lines) if key in line and line[key] is None][:1])
    bins: dict[tuple[float, float], tuple[list[float], list[int]]] = {}
    for place, line in enumerate(lines):
        parts = line.get(CHARTED_BY_LOG_SNR)
        for part in parts if type(parts) is list else ():
            if type(part) is list and len(part) == 3:
                low, high, value = part
                if type(low) is type(high) is type(value) is float:
                    found = bins.get((low, high))
                    if found is None:
                        found = bins[low, high] = ([], [])
                    found[0].append(value)
                    found[1].append(place)
    for values, places in bins.values():
        _keep_extremes(kept, values, places)
    return [lines[place] for place in sorted(kept)]


def _keep_extremes(kept: set[int], values: list[float], places: list[int]) -> None:
    if values:
        kept.update((places[values.index(min(values))], places[values.index(max(values))]))


Axis = Literal["tokens", "steps"]
AXIS_LABELS: dict[Axis, str] = {"tokens": "tokens seen", "steps": "optimizer steps"}

_MAX_SETTINGS_BYTES, _MAX_KEYS, _MAX_DEPTH, _MAX_CHARACTERS = 2**20, 5000, 12, 2000
_MOST_TOKENS = 1e30

_LABELS = ("name", "output_dir")
"""Keys that identify the run and do not describe how it was made."""

_SPIKE = re.compile(r" WARNING step (\d{1,18}): spike: (.{1,400})")
_MAX_LOG_BYTES = 2**27

_USE_NAMES = {  # in the order of drawing
    "step": "steps that counted",
    "setup": "setting up",
    "wait_for_data": "waiting for data",
    "evaluate": "evaluating",
    "save_stall": "saving",
    "lost": "steps taken again",
    "down": "between attempts",
    "other": "elsewhere",
}
_BAR_WIDTH = 1000

_ATTEMPTS = TypeAdapter(list[Attempt])
_MAX_GOODPUT_BYTES = 2**24
_SAMPLE_NAME = re.compile(r"step_(\d{8,18})\.txt")
_SAMPLES_SHOWN, _SAMPLE_BYTES = 12, 6000


@dataclass(frozen=True)
class MetricLines:
    """Training and evaluation lines, and those of the gradient noise, in the order of their steps, at most one of each
    kind per step."""

    training: list[Line]
    """Training lines; of a long run those that its charts need (`ThinnedLines`)."""
    evaluations: list[Line]
    gradient_noise: list[Line]
    unreadable: int
    """Number of lines left out because they are not a JSON object with a step; an incomplete last line is not
    counted."""
    tokens_per_s: float | None = None
    """Median rate of all training lines."""


def read_metric_lines(path: Path) -> MetricLines:
    """Read the lines without side effects; of two lines of the same kind and step the later one counts.

    Raises:
        DataError: there is no such file, or it cannot be read.
    """
    training, evaluations, gradient_noise = ThinnedLines(), list[Line](), list[Line]()
    rates = array("d")
    unreadable = 0
    try:
        for raw in lines(path, max_bytes=MAX_LINE_BYTES):
            line = parsed(raw)
            if line is not None:
                if "eval_elbo" in line:
                    evaluations.append(line)
                elif "loss" in line or "tokens" in line:
                    training.add(line)
                    if (rate := number(line, "tokens_per_s")) is not None:
                        rates.append(rate)
                elif "gradient_noise/scale" in line:  # else: a line of another hook of the list
                    gradient_noise.append(line)
            elif raw is None or (raw.endswith(b"\n") and raw.strip()):  # else: being written, or cut short by a kill
                unreadable += 1
    except (OSError, UnreadableFileError) as error:
        raise DataError(f"{path} {why(error)}; give a run folder") from None
    median = statistics.median(rates) if rates else None
    return MetricLines(training.in_order(), in_order(evaluations), in_order(gradient_noise), unreadable, median)


def levels(line: Line, key: str) -> list[tuple[float, float, float]]:
    """Return (low, high, value) of the log-SNR bins under `key`, without entries that are not three finite numbers."""
    parts = line.get(key)
    found = []
    for part in parts if isinstance(parts, list) else []:
        if isinstance(part, list) and len(part) == 3:
            low, high, value = map(finite, part)
            if low is not None and high is not None and value is not None:
                found.append((low, high, value))
    return found


def read_settings(path: Path) -> dict[str, str] | None:
    """Return the resolved tree of `config.yaml`, flattened; None if it is missing or not such a tree."""
    try:
        tree = yaml.safe_load(read_bytes(path, max_bytes=_MAX_SETTINGS_BYTES).decode("utf-8", "replace"))
        return dict(itertools.islice(_flat(tree, "", 0), _MAX_KEYS)) if isinstance(tree, dict) else None
    except (OSError, ValueError, yaml.YAMLError, RecursionError):
        return None


def differences(runs: Sequence[Mapping[str, str] | None]) -> dict[str, list[str | None]]:
    """Return the settings in which the runs that have any differ: by key, each run's value, None if it has none.

    `name` and `output_dir` are left out. Keys have the order of the first run that has them.
    """
    known = [run for run in runs if run is not None]
    keys = dict.fromkeys(key for run in known for key in run if key not in _LABELS)
    changed = [key for key in keys if len({run.get(key) for run in known}) > 1]
    return {key: [None if run is None else run.get(key) for run in runs] for key in changed}


def _flat(tree: Any, prefix: str, depth: int) -> Iterator[tuple[str, str]]:
    if depth > _MAX_DEPTH:
        yield prefix, "..."
    elif isinstance(tree, dict) and tree:
        for key, value in tree.items():
            yield from _flat(value, f"{prefix}.{key}" if prefix else str(key), depth + 1)
    elif isinstance(tree, list) and tree:
        for place, value in enumerate(tree):
            yield from _flat(value, f"{prefix}[{place}]", depth + 1)
    else:
        yield prefix, _said(tree)


def _said(value: Any) -> str:
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    return str(value)[:_MAX_CHARACTERS]


def position_of(axis: Axis, training: Iterable[Line]) -> Callable[[int], float | None]:
    """Return a function from a step to its position on the axis, or None if the position is not known.

    The tokens of steps between two training lines are interpolated, those of later steps extrapolated at the last rate;
    batches may grow during a run. For a run without training lines only step 0, with no tokens, is known.
    """
    if axis == "steps":
        return float
    known = [(0.0, 0.0)]
    for line in training:
        tokens = number(line, "tokens")
        if tokens is not None and 0 <= tokens < _MOST_TOKENS and line["step"] > known[-1][0]:
            known.append((float(line["step"]), tokens))
    steps = [step for step, _ in known]

    def place(step: int) -> float | None:
        if len(known) == 1:
            return 0.0 if step == 0 else None
        right = min(max(bisect_left(steps, step), 1), len(known) - 1)
        (step0, tokens0), (step1, tokens1) = known[right - 1], known[right]
        return tokens0 + (tokens1 - tokens0) * (step - step0) / (step1 - step0)

    return place


@dataclass(frozen=True)
class UnusualStep:
    """One unusual step of a run."""

    step: int
    is_skipped: bool
    """Whether the step made no update."""
    why: str


def unusual_steps(training: Sequence[Line], log_file: Path) -> list[UnusualStep]:
    """Return the unusual steps in order; a step repeated by a later attempt counts once.

    Args:
        training: training lines; every skipped step has one.
        log_file: `RUN/log.txt`, the only record of spikes whose update was made; it may be missing.
    """
    found = {step: UnusualStep(step, False, why) for step, why in _spikes(log_file).items()}
    for line in training:
        if line.get("skipped") is not None:
            step, reason = line["step"], str(line["skipped"]).replace("_", "-")
            seen = f": {found[step].why}" if step in found else ""
            found[step] = UnusualStep(step, True, f"{reason}{seen}")
    return [found[step] for step in sorted(found)]


def _spikes(log_file: Path) -> dict[int, str]:
    """Return the log's messages about spikes by step; only the end of a huge log is read."""
    try:
        with open_plain(log_file) as file:
            size = file.seek(0, 2)
            file.seek(max(0, size - _MAX_LOG_BYTES))
            return {int(match[1]): match[2] for raw in file if (match := _match(raw))}
    except (OSError, UnreadableFileError):
        return {}


def _match(raw: bytes) -> re.Match[str] | None:
    return _SPIKE.search(raw.decode("utf-8", "replace")) if b": spike: " in raw else None


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
    return WallTime(total, {name: found[name] for name in _USE_NAMES})


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
    summary = ", ".join(f"{_USE_NAMES[name]} {duration(spent)}" for name, spent in time.parts_s.items() if spent)
    drawn, left = "", 0.0
    whole = max(time.total_s, sum(time.parts_s.values()), 1e-9)
    for name, spent in time.parts_s.items():
        width = _BAR_WIDTH * spent / whole
        if width > 0:
            title = f"{_USE_NAMES[name]}: {duration(spent)}"
            drawn += (
                f'<rect class="p-{name}" x="{left:.2f}" width="{width:.2f}" height="18"><title>{title}</title></rect>'
            )
        left += width
    return (
        f'<svg class="bar" viewBox="0 0 {_BAR_WIDTH} 18" preserveAspectRatio="none" role="img" '
        f'aria-label="{escaped(f"{label}: {summary}")}">{drawn}</svg>'
    )


def _legend() -> str:
    items = "".join(
        f'<li><svg class="key" viewBox="0 0 26 10" aria-hidden="true"><rect class="p-{name}" width="26" height="10"/>'
        f"</svg>{title}</li>"
        for name, title in _USE_NAMES.items()
    )
    return f'<ul class="legend">{items}</ul>'


def _seconds(times: Sequence[tuple[RunRecord, WallTime]]) -> str:
    rows = [(escaped(run.label), *(duration(spent) for spent in time.parts_s.values())) for run, time in times]
    return table(("run", *_USE_NAMES.values()), rows, caption="Wall time by use")


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


@dataclass(frozen=True)
class Checkpoint:
    """One folder of `checkpoints/`."""

    name: str
    state: str
    """State in words: `whole`, `not loadable`, `set aside` or `being written`."""
    size_bytes: int
    modified: str
    """Time of its last change, ISO 8601, UTC."""
    why: str = ""
    """Reason why it is not loadable; only sizes were compared, contents were not read."""


@dataclass(frozen=True)
class Sample:
    """Text that the model wrote at a step."""

    step: int
    text: str
    is_cut: bool
    """Whether the file contains more than this."""


@dataclass(frozen=True)
class RunRecord:
    """The record of one run, as found in its folder."""

    label: str
    """Label that distinguishes it from the other runs of the page."""
    metrics: MetricLines
    status: Status | None
    attempts: list[Attempt] | None
    """Attempts of the run; None if there is no readable `goodput.json`."""
    unusual: list[UnusualStep]
    checkpoints: list[Checkpoint]
    latest: str | None
    """Name of the checkpoint in `LATEST`, or None."""
    samples: list[Sample]
    settings: dict[str, str] | None
    """Settings of the run; None if there is no readable `config.yaml`."""
    per_sequence: dict[int, paired.PerSequence] = field(default_factory=dict)
    """Bounds of single validation sequences by step; none if the run did not record them."""
    data: DataFacts | None = None
    """Facts about the run's data; None if there is no readable `data.json`."""


def read_runs(folders: list[Path]) -> list[RunRecord]:
    """Read every run once, in the order given.

    Raises:
        DataError: a path is not a folder, a folder has no metrics, or no run has a line of metrics yet.
    """
    folders = list({folder.resolve(): folder for folder in folders}.values())
    runs = [_read_run(folder, label) for folder, label in zip(folders, _labels(folders), strict=True)]
    if not any(run.metrics.training or run.metrics.evaluations for run in runs):
        raise DataError(
            f"{folders[0] / 'metrics.jsonl'} holds no metrics yet; try again when the run has taken its first step"
        )
    return runs


def _read_run(folder: Path, label: str) -> RunRecord:
    if not folder.is_dir():
        raise DataError(f"{folder} is no folder; give the folder of a run, the one that holds metrics.jsonl")
    if not (folder / "metrics.jsonl").is_file():
        inside = sum((child / "metrics.jsonl").is_file() for child in folder.iterdir())
        hint = f"its {inside} subfolder(s) with one can be given as {folder}/*" if inside else "give a run folder"
        raise DataError(f"{folder} holds no metrics.jsonl; {hint}")
    metrics = read_metric_lines(folder / "metrics.jsonl")
    return RunRecord(
        label=label,
        metrics=metrics,
        status=read_status(folder),
        attempts=_read_attempts(folder / "goodput.json"),
        unusual=unusual_steps(metrics.training, folder / "log.txt"),
        checkpoints=_checkpoints(folder),
        latest=_first_line(folder / "LATEST"),
        samples=_samples(folder / "samples"),
        settings=read_settings(folder / "config.yaml"),
        per_sequence=_per_sequence(folder),
        data=read_data_facts(folder),
    )


def _per_sequence(folder: Path) -> dict[int, paired.PerSequence]:
    try:
        return paired.read(folder)
    except StorageError:
        return {}


def _labels(folders: list[Path]) -> list[str]:
    """Return the shortest ends of the folders' paths that are all different."""
    parts = [folder.resolve().parts for folder in folders]
    count = 1
    while len({end[-count:] for end in parts}) < len(parts):
        count += 1
    return ["/".join(end[-count:]) for end in parts]


def _read_attempts(path: Path) -> list[Attempt] | None:
    """Read the attempts like `megadiff.train.goodput.read_attempts`, but leave a damaged file in place."""
    try:
        return _ATTEMPTS.validate_json(read_bytes(path, max_bytes=_MAX_GOODPUT_BYTES))
    except (OSError, UnreadableFileError, ValidationError):
        return None


def _checkpoints(folder: Path) -> list[Checkpoint]:
    """Return the newest step first, then the folders that are no checkpoints: set aside, or still being written."""
    try:
        steps = step_folders(folder)
    except StorageError:
        return []
    found = [_checkpoint(path, *_examined(path)) for path in sorted(steps, key=step_of, reverse=True)]
    inside = folder / "checkpoints"
    found += [_checkpoint(path, "set aside") for path in sorted(inside.glob("step_*.bad*")) if path.is_dir()]
    found += [_checkpoint(path, "being written") for path in sorted(inside.glob(".step_*.tmp")) if path.is_dir()]
    return [checkpoint for checkpoint in found if checkpoint is not None]


def _examined(path: Path) -> tuple[str, str]:
    """Return the state of a step folder, and the reason for it."""
    try:
        verify_files(path, hashes=False)
    except (CheckpointError, OSError) as error:
        return "not loadable", str(error)
    return "whole", ""


def _checkpoint(path: Path, state: str, why: str = "") -> Checkpoint | None:
    """Return a checkpoint's record; None if it has been deleted by now, since a run keeps only its newest."""
    try:
        size = sum(part.stat().st_size for part in path.iterdir() if part.is_file())
        when = datetime.fromtimestamp(path.stat().st_mtime, timezone.utc)
    except (OSError, ValueError, OverflowError):  # the last two: its time is outside the calendar
        return None
    return Checkpoint(path.name, state, size, when.isoformat(timespec="seconds"), why)


def _samples(folder: Path) -> list[Sample]:
    """Return the first, the last and some samples evenly spaced between them."""
    found = {int(match[1]): path for path in folder.glob("step_*.txt") if (match := _SAMPLE_NAME.fullmatch(path.name))}
    steps = sorted(found)
    if len(steps) > _SAMPLES_SHOWN:
        last = len(steps) - 1
        steps = [steps[round(place * last / (_SAMPLES_SHOWN - 1))] for place in range(_SAMPLES_SHOWN)]
    return [sample for step in steps if (sample := _sample(found[step], step)) is not None]


def _sample(path: Path, step: int) -> Sample | None:
    try:
        with open_plain(path) as file:
            data = file.read(_SAMPLE_BYTES + 1)
    except (OSError, UnreadableFileError):
        return None
    return Sample(step, data[:_SAMPLE_BYTES].decode("utf-8", "replace"), len(data) > _SAMPLE_BYTES)


def _first_line(path: Path) -> str | None:
    try:
        with open_plain(path) as file:
            return file.readline(200).decode("utf-8", "replace").strip() or None
    except (OSError, UnreadableFileError):
        return None
