"""`metrics.jsonl`: a JSON object a line, one training line and at most one evaluation line a step."""

from __future__ import annotations

import contextlib
import errno
import json
import logging
import math
import os
from pathlib import Path
from typing import Any

from megadiff.untrusted_files import UnreadableFileError, parse_json

log = logging.getLogger("megadiff")


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
        # Unbuffered: what a full disk refuses must not lie in a buffer and come out twice.
        self._file = path.open("ab", buffering=0)
        self._size = path.stat().st_size
        self._pending: list[bytes] = []

    def write(self, line: dict[str, Any]) -> None:
        """Append one line and hand it to the operating system, so that a killed process loses nothing.

        A number that is not finite, for which JSON has no token, is written as null. Lines that a full disk refuses are
        kept and written with the next one that it takes.
        """
        self._pending.append(json.dumps(_finite(line), allow_nan=False).encode() + b"\n")
        data, is_first = b"".join(self._pending), len(self._pending) == 1
        try:
            if self._file.write(data) != len(data):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        except OSError as error:
            with contextlib.suppress(OSError):
                self._file.truncate(self._size)  # half a line may be there
            if is_first:
                log.warning(f"{self._path} cannot be written ({error.strerror or error}); lines wait for space")
            return
        self._size += len(data)
        self._pending.clear()

    def sync(self) -> None:
        """Make the lines so far durable; called before a checkpoint relies on them."""
        try:
            os.fsync(self._file.fileno())
        except OSError as error:
            log.warning(f"{self._path} cannot be synced ({error.strerror or error})")

    def close(self) -> None:
        """Close the file."""
        if self._pending:
            log.warning(f"{self._path}: the last {len(self._pending)} line(s) could not be written")
        self._file.close()


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """All whole lines of a `metrics.jsonl`, in order."""
    return [json.loads(line) for line in _whole_lines(path)]


def _finite(value: Any) -> Any:
    """The same tree with None for every float that is not finite."""
    if isinstance(value, dict):
        return {key: _finite(part) for key, part in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(part) for part in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _whole_lines(path: Path) -> list[str]:
    """Lines that end in a newline and parse; a killed machine can leave a torn last one."""
    if not path.exists():
        return []
    lines = path.read_text(encoding="utf-8", errors="replace").splitlines(keepends=True)
    return [line for line in lines if line.endswith("\n") and _step_of(line) >= 0]


def _step_of(line: str) -> int:
    try:
        parsed = parse_json(line)
    except UnreadableFileError:
        return -1
    step = parsed.get("step", -1) if isinstance(parsed, dict) else -1
    return step if isinstance(step, int) else -1
