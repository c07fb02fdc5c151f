"""The launcher of a rank, such as torchrun's agent or the daemon of a SLURM step: no rank outlives it.

A rank without its launcher trains on unseen, holds the run folder against the next start, and is missed by whoever
counts processes. Three things end it, and each covers what the others cannot: the kernel's parent-death signal, at
once and whatever the rank is doing; a thread of the rank, where the launcher is not its parent or starts processes
from threads; and the rank's watcher (`watcher.py`), which also writes down why.
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
"""The time a watcher has to record why its rank ends, before the rank ends itself."""


@dataclass(frozen=True)
class Launcher:
    """The process that started this rank and its peers, told from a later one of the same number by its start."""

    pid: int
    ticks: int

    @property
    def is_alive(self) -> bool:
        """Whether it still runs."""
        return process.is_alive(self.pid, self.ticks)

    @classmethod
    def find(cls, environ: Mapping[str, str] = os.environ) -> Launcher | None:
        """Return the nearest ancestor that has not the environment of a rank; None for a process without a launcher.

        A launcher is there where torchrun's variables are, where several ranks share a node, and inside a SLURM step.
        A single process started from a shell has none: it may outlive the shell, as `nohup`, `setsid` and `tmux` mean
        it to. Wrapper scripts between launcher and rank have the rank's environment and are passed over.
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
        """Return a descriptor that becomes readable when it ends; None where the kernel has none, or it has ended."""
        descriptor = process.open_pidfd(self.pid)
        if descriptor is not None and not self.is_alive:
            os.close(descriptor)
            return None
        return descriptor


_found: tuple[int, Launcher | None] = (0, None)
"""The process that looked for its launcher, and what it found."""


def launcher_of_this_process() -> Launcher | None:
    """Return what `end_with_launcher` has found in this process; None before it was called."""
    pid, launcher = _found
    return launcher if pid == os.getpid() else None


def end_with_launcher(environ: Mapping[str, str] = os.environ) -> None:
    """Let this rank end when its launcher does; to be called first of all, before anything slow is imported.

    Does nothing in a process without a launcher, and nothing the second time. A launcher that died while this process
    was being started ends it here.
    """
    global _found
    if _found[0] == os.getpid():
        return
    launcher = Launcher.find(environ)
    _found = os.getpid(), launcher
    if launcher is None:
        return
    if launcher.pid == os.getppid() and (_is_elastic(environ) or process.threads(launcher.pid) == 1):
        # The signal comes when the *thread* that started this process ends, so only where that is the main one.
        _ask_for_parent_death_signal()
    if not launcher.is_alive or (_is_elastic(environ) and not _may_be_an_agent(launcher.pid)):
        _end_for_want_of(launcher)
    threading.Thread(target=_watch, args=(launcher,), name="launcher watch", daemon=True).start()


def describe_loss(launcher: Launcher) -> str:
    """Return why ranks without their launcher were ended, as a first cause."""
    return f"the launcher of these ranks (pid {launcher.pid}) is gone, so they were ended; the same command resumes"


def _mark_of_a_rank(environ: Mapping[str, str]) -> str | None:
    """Return a variable that ranks have and their launcher has not; None without a launcher."""
    if _is_elastic(environ):
        return "TORCHELASTIC_RUN_ID"
    if "LOCAL_WORLD_SIZE" in environ and environ.get("WORLD_SIZE", "1") != "1":
        return "LOCAL_RANK"
    return "SLURM_PROCID" if environ.get("SLURM_STEP_ID", "").isdecimal() else None


def _is_elastic(environ: Mapping[str, str]) -> bool:
    return "TORCHELASTIC_RUN_ID" in environ


def _has_variable(pid: int, name: str) -> bool:
    """Whether a process was started with this variable; another user's process, which hides it, was not."""
    try:
        found = Path(f"/proc/{pid}/environ").read_bytes()
    except OSError:
        return False
    return any(part.startswith(f"{name}=".encode()) for part in found.split(b"\0"))


def _may_be_an_agent(pid: int) -> bool:
    """Whether a process may be torchrun's agent, which is a Python program.

    An orphan's parent is the process that adopts orphans, which is not; in a container torchrun may itself be the
    first process and adopt its own.
    """
    names: list[str] = []
    with contextlib.suppress(OSError):
        names.append(os.readlink(f"/proc/{pid}/exe"))
    with contextlib.suppress(OSError):
        names.append(Path(f"/proc/{pid}/cmdline").read_text(errors="replace"))
    return not names or any("python" in name or "torchrun" in name for name in names)


def _ask_for_parent_death_signal() -> None:
    """KILL for this process at its parent's end; where the system has no such thing the thread is enough."""
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
