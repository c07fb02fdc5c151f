"""Record of the process that trains in a run folder, kept beside the lock, which does not name its owner."""

from __future__ import annotations

import contextlib
import json
import os
import socket
from dataclasses import asdict, dataclass
from pathlib import Path

from megadiff.files import write_atomically
from megadiff.supervision import process
from megadiff.supervision.launcher import Launcher, launcher_of_this_process
from megadiff.untrusted_files import UnreadableFileError, read_json_object

_NAME = ".lock.holder"
_MAX_BYTES, _MAX_NUMBER = 4096, 2**62


@dataclass(frozen=True)
class Holder:
    """The process that holds a run folder, or held it last."""

    host: str
    machine: str
    """Identity of the boot and process namespace in which the process numbers below are valid."""
    pid: int
    ticks: int
    """Start time of the process, in clock ticks since boot."""
    launcher_pid: int = 0
    """Process number of the launcher; 0 if there is none."""
    launcher_ticks: int = 0

    @classmethod
    def this_process(cls) -> Holder:
        """Return this process and its launcher."""
        pid, launcher = os.getpid(), launcher_of_this_process() or Launcher(0, 0)
        return cls(socket.gethostname(), process.machine(), pid, process.start_ticks(pid), launcher.pid, launcher.ticks)

    @classmethod
    def read(cls, run_folder: Path) -> Holder | None:
        """Return what the last holder wrote, or None if there is nothing readable."""
        try:
            found = cls(**read_json_object(run_folder / _NAME, max_bytes=_MAX_BYTES))
        except (OSError, UnreadableFileError, TypeError):
            return None
        numbers = (found.pid, found.ticks, found.launcher_pid, found.launcher_ticks)
        is_ours = all(type(number) is int and 0 <= number < _MAX_NUMBER for number in numbers)
        return found if is_ours and isinstance(found.host, str) and isinstance(found.machine, str) else None

    def write(self, run_folder: Path) -> None:
        """Write this record beside the lock; if the disk cannot be written, only a better message is lost."""
        with contextlib.suppress(OSError):
            write_atomically(run_folder / _NAME, json.dumps(asdict(self)), is_durable=False)

    @staticmethod
    def remove(run_folder: Path) -> None:
        """Remove the record; to be called before the lock is released."""
        with contextlib.suppress(OSError):
            (run_folder / _NAME).unlink(missing_ok=True)

    @property
    def is_here(self) -> bool:
        """Whether its process numbers are valid for this process."""
        return self.machine == process.machine()

    @property
    def is_leaving(self) -> bool:
        """Whether the holder is known to be gone, or about to end because its launcher is gone."""
        if not self.is_here:
            return False
        has_lost_launcher = self.launcher_pid != 0 and not process.is_alive(self.launcher_pid, self.launcher_ticks)
        return has_lost_launcher or not process.is_alive(self.pid, self.ticks)

    def describe(self) -> str:
        """Return for example `pid 4711 on node7`, with a remark if that process is gone."""
        if self.is_here and not process.is_alive(self.pid, self.ticks):
            return f"pid {self.pid} on {self.host}, which is gone, left it to a process that it had started"
        return f"pid {self.pid} on {self.host}"
