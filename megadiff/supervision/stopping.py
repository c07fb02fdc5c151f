"""Requests to stop a run: a signal, a stop file, or the end of its SLURM job.

A thread receives TERM, USR2 and INT through the C-level wakeup descriptor, so that they count even while the main
thread waits in a collective, where Python would not run its signal handlers.
"""

from __future__ import annotations

import logging
import os
import signal
import socket
import threading
import time
from collections.abc import Mapping
from pathlib import Path
from types import FrameType, TracebackType
from typing import Any

from megadiff.errors import ConfigError
from megadiff.supervision.config import StopConfig

log = logging.getLogger("megadiff")

STOP_FILE = "stop file"
"""Beginning of the reason given for a stop file."""
SIGNALS = (signal.SIGTERM, signal.SIGUSR2, signal.SIGINT)
SAME_SIGNAL_S = 2.0
"""Seconds after the first TERM or INT in which further ones count as the same request: torchrun and srun both deliver a
TERM, and a terminal's Ctrl-C reaches every process of the group."""
FILE_EVERY_S = 2.0
"""Seconds between looks for the stop file, which is on a shared disk."""
BELIEVABLE_OVERTIME_S = 3600.0
"""Seconds since the supposed end of the job above which the clock is taken to be wrong: a job that ended so long ago
would not be running."""
_CODES = {signal.SIGTERM: 143, signal.SIGINT: 130}


class StopRequest:
    """A listener for stop requests; `reason()` returns why the run should stop, if it should. Main thread only.

    The first TERM, USR2 or INT is a request. A TERM or INT more than two seconds after the first one ends the process
    at
    once with exit code 143 or 130. USR2, which SLURM sends ahead of a time limit, may be repeated. Child processes
    forked
    while the listener is open ignore INT and USR2, and end on TERM.
    """

    def __init__(
        self, config: StopConfig, run_folder: Path, *, is_main: bool, environ: Mapping[str, str] = os.environ
    ) -> None:
        """Check the stop file and read the end of the job; no handler is installed yet.

        Args:
            is_main: whether this rank looks for the stop file; a single rank does, to spare the shared disk.
            environ: read once, for SLURM_JOB_END_TIME.

        Raises:
            ConfigError: the stop file exists already.
        """
        self._file = run_folder / config.file
        self._is_main = is_main
        if os.path.lexists(self._file):
            raise ConfigError(
                f"the stop file {self._file} would stop this run before its first step; remove it and start again"
            )
        self._grace_period_s = config.grace_period_s
        self._end = _job_end(environ.get("SLURM_JOB_END_TIME"))
        self._reason: str | None = None
        self._settling = threading.Lock()
        self._look_again = 0.0
        self._first_end_signal: float | None = None
        self._before: dict[signal.Signals, Any] = {}

    def __enter__(self) -> StopRequest:
        self._ear, self._bell = socket.socketpair()
        self._bell.setblocking(False)
        self._before = {number: signal.signal(number, _heard_by_the_thread) for number in SIGNALS}
        self._wakeup_before = signal.set_wakeup_fd(self._bell.fileno(), warn_on_full_buffer=False)
        os.register_at_fork(after_in_child=self._leave_to_the_parent)
        self._thread = threading.Thread(target=self._listen, name="stop request", daemon=True)
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Restore the previous handlers."""
        before, self._before = self._before, {}
        signal.set_wakeup_fd(self._wakeup_before)
        for number, handler in before.items():
            signal.signal(number, handler)
        self._bell.shutdown(socket.SHUT_RDWR)  # a forked child may hold a copy, so closing alone wakes nobody
        self._thread.join()
        self._ear.close()
        self._bell.close()

    def reason(self) -> str | None:
        """Return why the run should stop, in a few words, or None; a reason once returned never changes.

        The cost is well below a microsecond, except for a look at the stop file every `FILE_EVERY_S` on the main rank.
        Ranks may return different results at the same moment; they have to agree before they act.
        """
        if self._reason is None and (found := self._from_clock() or self._from_file()):
            self._settle(found)
        return self._reason

    def honoured(self) -> None:
        """Remove the stop file, after the run has saved itself, so that it does not stop the next start."""
        if not self._is_main:
            return
        try:
            self._file.unlink(missing_ok=True)
        except OSError as error:
            log.warning(f"the stop file {self._file} cannot be removed ({error.strerror}); do so before the next start")

    def _from_clock(self) -> str | None:
        left = self._end - time.monotonic()
        return f"time limit: {left:.0f} s left of SLURM_JOB_END_TIME" if left <= self._grace_period_s else None

    def _from_file(self) -> str | None:
        now = time.monotonic()
        if not self._is_main or now < self._look_again:
            return None
        self._look_again = now + FILE_EVERY_S
        return f"{STOP_FILE} {self._file}" if os.path.lexists(self._file) else None

    def _listen(self) -> None:
        while numbers := self._ear.recv(64):
            for number in numbers:
                if number in SIGNALS:
                    self._hear(signal.Signals(number))

    def _settle(self, reason: str) -> None:
        """Keep the first reason: a signal may arrive while the stop file is being looked for."""
        with self._settling:
            self._reason = self._reason or reason

    def _hear(self, number: signal.Signals) -> None:
        self._settle(number.name)
        if number not in _CODES:
            return
        now = time.monotonic()
        if self._first_end_signal is None:
            self._first_end_signal = now
        elif now - self._first_end_signal > SAME_SIGNAL_S:
            os.write(2, f"second {number.name}: leaving at once, without a checkpoint\n".encode())
            os._exit(_CODES[number])

    def _leave_to_the_parent(self) -> None:
        """Reset the signal handlers in a forked child.

        Its signals must not wake the parent's thread, and a worker must survive a Ctrl-C or USR2 sent to the whole
        group, so that the rank can still finish its step.
        """
        if not self._before:
            return
        signal.set_wakeup_fd(-1)
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        signal.signal(signal.SIGUSR2, signal.SIG_IGN)


def _heard_by_the_thread(number: int, frame: FrameType | None) -> None:
    """Do nothing: a Python handler has to exist for the wakeup descriptor to be written to, and the thread does the
    rest."""


def _job_end(epoch_s: str | None) -> float:
    """Return the end of the SLURM job on the monotonic clock, infinity if there is none.

    The wall clock is read only here, once, because it may jump later.
    """
    if not epoch_s:
        return float("inf")
    if not epoch_s.strip().isdecimal():
        log.warning(
            f"SLURM_JOB_END_TIME={epoch_s!r} is not a time in seconds; the run will not stop before the job ends"
        )
        return float("inf")
    left = int(epoch_s) - time.time()
    if left < -BELIEVABLE_OVERTIME_S:
        log.warning(f"SLURM_JOB_END_TIME is {-left:.0f} s ago by this machine's clock and is ignored")
        return float("inf")
    return time.monotonic() + left
