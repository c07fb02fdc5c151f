"""`metrics.jsonl` and `validation.jsonl`: figures of steps and of validation sequences, a JSON object a line."""

from __future__ import annotations

import contextlib
import errno
import itertools
import json
import logging
import math
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from megadiff.files import AppendedFile, UnreadableFileError, open_plain, sync, write_atomically
from megadiff.metric_lines import parsed
from megadiff.scaling.paired import PerSequence
from megadiff.train.hooks import MetricSink

log = logging.getLogger("megadiff")

_PART_BYTES = 2**20


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
        _drop_later_lines(path, after_step)
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


def _drop_later_lines(path: Path, after_step: int) -> None:
    """Move every line but the whole ones of steps up to `after_step` to the file beside.

    Lines are decoded once, and only those from the first moved one on are held in memory: a long run has millions of
    lines, of which a resumption moves the last few.

    Raises:
        OSError: a disk refuses, or there is no plain file at the path.
    """
    start = 0
    kept: list[bytes] = []
    moved: list[bytes] = []
    try:
        with open_plain(path) as file:
            for line in file:
                if not (after_step > 0 and line.endswith(b"\n") and _is_up_to(after_step, line)):
                    moved.append(line)
                elif moved:
                    kept.append(line)
                else:
                    start += len(line)
    except FileNotFoundError:
        return write_atomically(path, b"")
    except UnreadableFileError as error:
        raise OSError(errno.EINVAL, str(error), str(path)) from None
    _set_aside(superseded_path(path), moved)
    if moved or path.is_symlink() or path.stat().st_nlink > 1:  # a linked file is another's too, such as an archive's
        write_atomically(path, itertools.chain(_beginning(path, start), kept))
    return None


def _is_up_to(after_step: int, line: bytes) -> bool:
    found = parsed(line)
    return found is not None and found["step"] <= after_step


def _beginning(path: Path, size: int) -> Iterator[bytes]:
    """Yield the first `size` bytes of a file in parts."""
    with open_plain(path) as file:
        while size > 0 and (part := file.read(min(size, _PART_BYTES))):
            yield part
            size -= len(part)


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


def _finite(value: Any) -> Any:
    """Return the same tree with None for every float that is not finite."""
    if isinstance(value, dict):
        return {key: _finite(part) for key, part in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(part) for part in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


class PerSequenceFile(MetricsFile):
    """A file beside `metrics.jsonl` that outlives kills and resumes as that one does.

    It is one of the run's sinks, so that checkpoints rely on its lines, but keeps no line of figures: evaluations give
    it theirs.
    """

    def write(self, line: dict[str, Any], step: int) -> None:
        """Leave a line of figures to the other sinks."""

    def add(self, step: int, figures: PerSequence) -> None:
        """Append the line of an evaluation."""
        super().write({"step": step, **figures.as_entries()}, step)
