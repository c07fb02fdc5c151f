"""The launcher of a rank, such as torchrun's agent or the daemon of a SLURM step; no rank outlives it.

A rank whose launcher is gone would train on unnoticed and lock the run folder against the next start. Three mechanisms
end it, and each covers cases that the others miss: the kernel's parent-death signal, which acts at once whatever the
rank is doing; a thread of the rank, for launchers that are not its parent or that start processes from threads; and
the rank's watcher (`watcher.py`), which also records why.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import select
import signal
import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from megadiff.supervision import process

_MOST_ANCESTORS = 64
_PR_SET_PDEATHSIG = 1
_LOOK_EVERY_S = 0.5
_SPEAKING_S = 1.0
"""Time a watcher has to record why its rank ends, before the rank ends itself."""


@dataclass(frozen=True)
class Launcher:
    """The process that started this rank and its peers; its start time distinguishes it from a later one of the same
    pid."""

    pid: int
    ticks: int

    @property
    def is_alive(self) -> bool:
        """Whether the process still runs."""
        return process.is_alive(self.pid, self.ticks)

    @classmethod
    def find(cls, environ: Mapping[str, str] = os.environ) -> Launcher | None:
        """Return the nearest ancestor that does not have the environment of a rank; None for a process without a
        launcher.

        There is a launcher if torchrun's variables are set, if several ranks share a node, and inside a SLURM step. A
        single process started from a shell has none: it may outlive the shell, as `nohup`, `setsid` and `tmux` intend.
        Wrapper scripts between the launcher and the rank have the rank's environment and are skipped.
        """
        mark = _mark_of_a_rank(environ)
        if mark is None:
            return None
        pid = os.getppid()
        for _ in range(_MOST_ANCESTORS):
            if pid <= 0:
                return None
            if not _has_variable(pid, mark):
                return cls(pid, process.start_ticks(pid))
            pid = process.parent(pid)
        return None

    def open_pidfd(self) -> int | None:
        """Return a descriptor that becomes readable when the launcher ends.

        None if the kernel does not offer one, or if the launcher has ended already.
        """
        descriptor = process.open_pidfd(self.pid)
        if descriptor is not None and not self.is_alive:
            os.close(descriptor)
            return None
        return descriptor


_found: tuple[int, Launcher | None] = (0, None)
"""Pid of the process that looked for its launcher, and the launcher it found."""


def launcher_of_this_process() -> Launcher | None:
    """Return what `end_with_launcher` found in this process; None before it was called."""
    pid, launcher = _found
    return launcher if pid == os.getpid() else None


def end_with_launcher(environ: Mapping[str, str] = os.environ) -> None:
    """Make this rank end when its launcher does; call this first of all, before anything slow is imported.

    Does nothing in a process without a launcher, or when called again. If the launcher died while this process was
    being started, the process ends here.
    """
    global _found
    if _found[0] == os.getpid():
        return
    launcher = Launcher.find(environ)
    _found = os.getpid(), launcher
    if launcher is None:
        return
    if launcher.pid == os.getppid() and (_is_elastic(environ) or process.threads(launcher.pid) == 1):
        # The signal comes when the *thread* that started this process ends, so it is used only if that is the main one.
        _ask_for_parent_death_signal()
    if not launcher.is_alive or (_is_elastic(environ) and not _may_be_an_agent(launcher.pid)):
        _end_for_want_of(launcher)
    threading.Thread(target=_watch, args=(launcher,), name="launcher watch", daemon=True).start()


def describe_loss(launcher: Launcher) -> str:
    """Return the first cause for ranks that were ended because their launcher is gone."""
    return f"the launcher of these ranks (pid {launcher.pid}) is gone, so they were ended; the same command resumes"


def _mark_of_a_rank(environ: Mapping[str, str]) -> str | None:
    """Return a variable that ranks have and their launcher does not; None without a launcher."""
    if _is_elastic(environ):
        return "TORCHELASTIC_RUN_ID"
    if "LOCAL_WORLD_SIZE" in environ and environ.get("WORLD_SIZE", "1") != "1":
        return "LOCAL_RANK"
    return "SLURM_PROCID" if environ.get("SLURM_STEP_ID", "").isdecimal() else None


def _is_elastic(environ: Mapping[str, str]) -> bool:
    return "TORCHELASTIC_RUN_ID" in environ


def _has_variable(pid: int, name: str) -> bool:
    """Return whether a process was started with this variable; False if its environment cannot be read."""
    try:
        found = Path(f"/proc/{pid}/environ").read_bytes()
    except OSError:
        return False
    return any(part.startswith(f"{name}=".encode()) for part in found.split(b"\0"))


def _may_be_an_agent(pid: int) -> bool:
    """Return whether a process may be torchrun's agent, which is a Python program.

    The parent of an orphan is the process that adopts orphans, which is no Python program; in a container torchrun may
    itself be the first process and adopt orphans.
    """
    names: list[str] = []
    with contextlib.suppress(OSError):
        names.append(os.readlink(f"/proc/{pid}/exe"))
    with contextlib.suppress(OSError):
        names.append(Path(f"/proc/{pid}/cmdline").read_text(errors="replace"))
    return not names or any("python" in name or "torchrun" in name for name in names)


def _ask_for_parent_death_signal() -> None:
    """Request a KILL signal for this process when its parent ends; on systems without one the thread is enough."""
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, int(signal.SIGKILL), 0, 0, 0)


def _watch(launcher: Launcher) -> None:
    descriptor = launcher.open_pidfd()
    if descriptor is None:
        while launcher.is_alive:
            time.sleep(_LOOK_EVERY_S)
    else:
        poll = select.poll()
        poll.register(descriptor, select.POLLIN)
        while not poll.poll():
            pass
    time.sleep(_SPEAKING_S)
    _end_for_want_of(launcher)


def _end_for_want_of(launcher: Launcher) -> None:
    with contextlib.suppress(OSError):
        os.write(2, f"error: {describe_loss(launcher)}\n".encode())
    os.kill(os.getpid(), signal.SIGKILL)
