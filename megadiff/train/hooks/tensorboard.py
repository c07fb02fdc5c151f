"""TensorBoard's event file, as long as the disk takes it."""

from __future__ import annotations

import io
import logging
import os
import socket
import time
from itertools import count
from pathlib import Path
from typing import Any

from megadiff.files import AppendedFile
from megadiff.train.hooks import MetricSink, curves

log = logging.getLogger("megadiff")

_numbers = count()
"""Numbers that distinguish the files of one process."""


class TensorBoard(MetricSink):
    """An event file with a curve for every number of a line, written record by record.

    Records that a full disk refuses wait until there is room. torch's `SummaryWriter` writes in a thread that ends with
    a stack trace at the first refusal.
    """

    def __init__(self, folder: Path, *, after_step: int) -> None:
        """Begin a new file in `folder`; the files of earlier attempts stay, their later steps hidden.

        Args:
            after_step: the step the run resumes after; TensorBoard does not show earlier points beyond it.
        """
        from tensorboard.compat.proto import event_pb2

        self._proto: Any = event_pb2
        name = f"events.out.tfevents.{int(time.time()):010d}.{socket.gethostname()}.{os.getpid()}.{next(_numbers)}"
        self._folder = folder
        self._file = AppendedFile(folder / name, most_waiting=2**24)
        self._has_complained = False
        self._write(file_version="brain.Event:2")
        start = self._proto.SessionLog(status=self._proto.SessionLog.START)
        self._write(step=after_step + 1, session_log=start)

    def write(self, line: dict[str, Any], step: int) -> None:
        """Add a point to the curve of every finite number of the line."""
        from torch.utils.tensorboard.summary import scalar

        for tag, value in curves(line).items():
            self._write(step=step, summary=scalar(tag, value))

    def close(self) -> None:
        """Write what is left."""
        self._file.close()

    def _write(self, **parts: Any) -> None:
        from tensorboard.summary.writer.record_writer import RecordWriter

        record = io.BytesIO()
        RecordWriter(record).write(self._proto.Event(wall_time=time.time(), **parts).SerializeToString())
        error = self._make_folder() or self._file.append(record.getvalue())
        if error is not None and not self._has_complained:
            self._has_complained = True
            log.warning(f"{self._folder} cannot be written ({error.strerror or error}); training goes on without it")

    def _make_folder(self) -> OSError | None:
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            return error
        return None
