"""TensorBoard's curves, as long as the disk takes them."""

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

log = logging.getLogger("megadiff")

_numbers = count()
"""Tells the files of one process from one another."""


class Board:
    """TensorBoard's event file, written record by record, so that what a full disk refuses comes when there is room.

    torch's `SummaryWriter` writes in a thread that dies of the first refusal with a stack trace.
    """

    def __init__(self, folder: Path, *, after_step: int) -> None:
        """Begin a file of its own in `folder`; earlier attempts' files stay, their later steps hidden.

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

    def add_scalar(self, tag: str, value: float, step: int) -> None:
        """Add one point of a curve."""
        from torch.utils.tensorboard.summary import scalar

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
