"""Reading of a `metrics.jsonl`, even while it is being written or if it was damaged."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from megadiff.errors import DataError
from megadiff.train.metrics import MAX_LINE_BYTES, Line, finite, parsed
from megadiff.untrusted_files import UnreadableFileError, lines, why


@dataclass(frozen=True)
class MetricLines:
    """Training and evaluation lines in the order of their steps, at most one of each kind per step."""

    training: list[Line]
    evaluations: list[Line]
    unreadable: int
    """Number of lines left out because they are not a JSON object with a step; an incomplete last line is not
    counted."""


def read_metric_lines(path: Path) -> MetricLines:
    """Read the lines without side effects; of two lines of the same kind and step the later one counts.

    Raises:
        DataError: there is no such file, or it cannot be read.
    """
    training: dict[int, Line] = {}
    evaluations: dict[int, Line] = {}
    unreadable = 0
    try:
        for raw in lines(path, max_bytes=MAX_LINE_BYTES):
            line = parsed(raw)
            if line is not None:
                if "eval_elbo" in line:
                    evaluations[line["step"]] = line
                elif "loss" in line or "tokens" in line:  # else: a line of a hook of the list
                    training[line["step"]] = line
            elif raw is None or (raw.endswith(b"\n") and raw.strip()):  # else: being written, or cut short by a kill
                unreadable += 1
    except (OSError, UnreadableFileError) as error:
        raise DataError(f"{path} {why(error)}; give a run folder") from None
    return MetricLines(_in_order(training), _in_order(evaluations), unreadable)


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


def _in_order(lines: dict[int, Line]) -> list[Line]:
    return [lines[step] for step in sorted(lines)]
