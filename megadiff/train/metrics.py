"""`metrics.jsonl`: a JSON object a line, one training line and at most one evaluation line a step."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any


class MetricsFile:
    """Appends lines; opened for a run that goes on after `step`, it first forgets what came later.

    Lines written after the last checkpoint are written again, with the same values, as the run repeats those steps.
    """

    def __init__(self, path: Path, *, after_step: int) -> None:
        self._path = path
        kept = [line for line in _whole_lines(path) if _step_of(line) <= after_step and after_step > 0]
        temporary = path.with_name(f".{path.name}.tmp")
        temporary.write_text("".join(kept), encoding="utf-8")
        temporary.replace(path)
        self._file = path.open("a", encoding="utf-8")

    def write(self, line: dict[str, Any]) -> None:
        """Append one line and hand it to the operating system, so that a killed process loses nothing."""
        self._file.write(json.dumps(line) + "\n")
        self._file.flush()

    def sync(self) -> None:
        """Make the lines so far durable; called before a checkpoint relies on them."""
        os.fsync(self._file.fileno())

    def close(self) -> None:
        """Close the file."""
        self._file.close()


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """All whole lines of a `metrics.jsonl`, in order."""
    return [json.loads(line) for line in _whole_lines(path)]


def _whole_lines(path: Path) -> list[str]:
    """Lines that end in a newline and parse; a killed machine can leave a torn last one."""
    if not path.exists():
        return []
    lines = path.read_text(encoding="utf-8", errors="replace").splitlines(keepends=True)
    return [line for line in lines if line.endswith("\n") and _step_of(line) >= 0]


def _step_of(line: str) -> int:
    try:
        parsed = json.loads(line)
    except json.JSONDecodeError:
        return -1
    return parsed.get("step", -1) if isinstance(parsed, dict) else -1
