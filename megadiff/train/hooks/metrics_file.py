"""`metrics.jsonl`: a JSON object a line. A step has at most one training line, one evaluation line, and hooks' own."""

from __future__ import annotations

import contextlib
import errno
import json
import logging
import math
import os
from pathlib import Path
from typing import Any

from megadiff.files import AppendedFile, sync, write_atomically
from megadiff.train.hooks import MetricSink
from megadiff.untrusted_files import UnreadableFileError, open_plain, parse_json

log = logging.getLogger("megadiff")


class MetricsFile(MetricSink):
    """A file that lines are appended to; opened for a run that resumes after a step, it holds no later ones.

    The run repeats the steps after its last checkpoint and writes their lines again. The earlier lines of these steps
    are not destroyed: they move to `metrics.superseded.jsonl` beside it, with everything else that is not kept.
    """

    def __init__(self, path: Path, *, after_step: int) -> None:
        """Move the lines that are not kept, and open the file.

        Args:
            path: the file.
            after_step: number of steps taken before this process; 0 keeps no line.

        Raises:
            OSError: the disk refuses; nothing is lost.
        """
        self._path = path
        lines = _content(path).splitlines(keepends=True)
        is_kept = [after_step > 0 and _is_whole(line) and _step_of(line) <= after_step for line in lines]
        _set_aside(superseded_path(path), [line for line, keep in zip(lines, is_kept, strict=True) if not keep])
        write_atomically(path, b"".join(line for line, keep in zip(lines, is_kept, strict=True) if keep))
        self._file = AppendedFile(path)

    def write(self, line: dict[str, Any], step: int) -> None:
        """Append one line and hand it to the operating system, so that a killed process loses nothing.

        A number that is not finite, for which JSON has no token, is written as null. Lines that a full disk refuses are
        kept and written with the next one that it takes.
        """
        was_waiting = self._file.is_waiting
        error = self._file.append(json.dumps(_finite(line), allow_nan=False).encode() + b"\n")
        if error is not None and not was_waiting:
            log.warning(f"{self._path} cannot be written ({error.strerror or error}); lines wait for space")

    def sync(self) -> None:
        """Make the lines so far durable.

        Raises:
            OSError: the disk refuses; the lines wait.
        """
        self._file.sync()

    def close(self) -> None:
        """Close the file."""
        if not self._file.close():
            log.warning(f"{self._path}: the last lines could not be written")


def superseded_path(path: Path) -> Path:
    """Return the file beside a `metrics.jsonl` that keeps the lines which a resumed run has written again."""
    return path.with_name(f"{path.stem}.superseded{path.suffix}")


def _set_aside(path: Path, lines: list[bytes]) -> None:
    """Append lines durably.

    Raises:
        OSError: the disk refuses, or a link lies there.
    """
    if not lines:
        return
    if path.is_symlink():
        raise OSError(errno.ELOOP, os.strerror(errno.ELOOP), str(path))
    if not lines[-1].endswith(b"\n"):
        lines = [*lines, b"\n"]
    size = path.stat().st_size if path.exists() else 0
    file = AppendedFile(path)
    file.append(b"".join(lines))
    try:
        file.sync()
    except OSError:  # a part that was written would run into the lines of the next attempt
        with contextlib.suppress(OSError):
            os.truncate(path, size)
        raise
    finally:
        file.close()
    sync(path.parent)


def _is_whole(line: bytes) -> bool:
    """Return whether a line is complete and has a step; a killed machine can leave a torn last one."""
    return line.endswith(b"\n") and _step_of(line) >= 0


def _content(path: Path) -> bytes:
    """Return the bytes of a file; none if there is no file.

    Raises:
        OSError: it cannot be read, or is no plain file.
    """
    try:
        with open_plain(path) as file:
            return file.read()
    except FileNotFoundError:
        return b""
    except UnreadableFileError as error:
        raise OSError(errno.EINVAL, str(error), str(path)) from None


def _finite(value: Any) -> Any:
    """Return the same tree with None for every float that is not finite."""
    if isinstance(value, dict):
        return {key: _finite(part) for key, part in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(part) for part in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _step_of(line: bytes) -> int:
    try:
        parsed = parse_json(line)
    except UnreadableFileError:
        return -1
    step = parsed.get("step", -1) if isinstance(parsed, dict) else -1
    return step if isinstance(step, int) else -1
