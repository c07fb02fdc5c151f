"""Ending of a rank by its watcher: first save its stack traces, then kill the rank and the processes it started."""

from __future__ import annotations

import contextlib
import os
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path

from megadiff.supervision import process

STACKS_SIGNAL = signal.SIGUSR1
"""Signal that makes a watched rank write its stacks, through a C handler that needs no interpreter lock."""
_STACKS_S, _QUIET_S, _GONE_S = 1.0, 0.2, 5.0


def within(seconds: float, work: Callable[[], object]) -> bool:
    """Run work that may hang (a shared disk, a full pipe) in a thread; return whether it finished in time."""
    thread = threading.Thread(target=_survived, args=(work,), daemon=True)
    thread.start()
    thread.join(seconds)
    return not thread.is_alive()


def take_stacks(pid: int, dump: Path) -> str:
    """Make the process write the stacks of its threads, and return what it wrote within a second.

    A stopped process is continued so that it can write.
    """
    with contextlib.suppress(OSError):
        os.kill(pid, STACKS_SIGNAL)
        os.kill(pid, signal.SIGCONT)
    end, size, changed = time.monotonic() + _STACKS_S, 0, time.monotonic()
    while time.monotonic() < end:
        time.sleep(0.02)
        now = _size(dump)
        if now != size:
            size, changed = now, time.monotonic()
        elif size and time.monotonic() - changed > _QUIET_S:
            break
    return read_stacks(dump)


def read_stacks(dump: Path) -> str:
    """Return the stacks that the process has written to the file so far."""
    try:
        return dump.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""


def kill(pid: int, ticks: int) -> None:
    """Kill the process and its descendants, except watchers, and wait up to five seconds until it is gone."""
    if not process.is_alive(pid, ticks):
        return
    doomed = [pid, *(child for child in process.descendants(pid) if child != os.getpid() and not _is_watcher(child))]
    for each in doomed:
        with contextlib.suppress(OSError):
            os.kill(each, signal.SIGKILL)
    end = time.monotonic() + _GONE_S
    while process.is_alive(pid, ticks) and time.monotonic() < end:
        time.sleep(0.01)


def _is_watcher(pid: int) -> bool:
    """Return whether a process is a watcher of a rank.

    Ranks may fork ranks, in notebooks and tests; another rank's watcher ends by itself and must not be killed.
    """
    try:
        return b"megadiff.supervision.watcher" in Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:
        return False


def _survived(work: Callable[[], object]) -> None:
    """Run the work and ignore its failure: a report that cannot be made must not stop the watcher."""
    with contextlib.suppress(Exception):
        work()


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except OSError:
        return 0
