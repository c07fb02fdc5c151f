"""The contents of a report about one run, read from its folder without changing it."""

from __future__ import annotations

import re
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path

from pydantic import TypeAdapter, ValidationError

from megadiff.checkpoint.folder import step_folders, step_of, verify_files
from megadiff.data.facts import DataFacts, read_data_facts
from megadiff.errors import CheckpointError, DataError, StorageError
from megadiff.report.metric_lines import MetricLines, read_metric_lines
from megadiff.report.settings import read_settings
from megadiff.report.unusual_steps import UnusualStep, unusual_steps
from megadiff.supervision.status import Status, read_status
from megadiff.train.goodput import Attempt
from megadiff.untrusted_files import UnreadableFileError, open_plain, read_bytes

_ATTEMPTS = TypeAdapter(list[Attempt])
_MAX_BYTES = 2**24
_SAMPLE = re.compile(r"step_(\d{8,18})\.txt")
_SAMPLES_SHOWN, _SAMPLE_BYTES = 12, 6000


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
        data=read_data_facts(folder),
    )


def _labels(folders: list[Path]) -> list[str]:
    """Return the shortest ends of the folders' paths that are all different."""
    parts = [folder.resolve().parts for folder in folders]
    count = 1
    while len({end[-count:] for end in parts}) < len(parts):
        count += 1
    return ["/".join(end[-count:]) for end in parts]


def _read_attempts(path: Path) -> list[Attempt] | None:
    """Read the attempts like `megadiff.train.attempts.read_attempts`, but leave a damaged file in place."""
    try:
        return _ATTEMPTS.validate_json(read_bytes(path, max_bytes=_MAX_BYTES))
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
    found = {int(match[1]): path for path in folder.glob("step_*.txt") if (match := _SAMPLE.fullmatch(path.name))}
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
