"""Steps without an update, and steps with unusual figures, found in the metrics and the log."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from megadiff.train.metrics import Line
from megadiff.untrusted_files import UnreadableFileError, open_plain

_SPIKE = re.compile(r" WARNING step (\d{1,18}): spike: (.{1,400})")
_MAX_LOG_BYTES = 2**27


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
