"""State and relatives of a process as the kernel reports them; without /proc only its existence is known."""

from __future__ import annotations

import contextlib
import os
import signal
from collections.abc import Iterator
from functools import cache
from pathlib import Path

_STATES = {"R": "running", "S": "sleeping", "D": "waiting for a disk", "T": "stopped", "t": "traced", "Z": "zombie"}
_PF_EXITING = 0x4
GONE = ("", "Z", "X", "x")


def _fields(pid: int) -> list[str]:
    """Return the fields of `/proc/PID/stat` from the third on; the second, a name in brackets, may contain anything."""
    try:
        return Path(f"/proc/{pid}/stat").read_text(errors="replace").rpartition(")")[2].split()
    except OSError:
        return []


def start_ticks(pid: int) -> int:
    """Return when the process started, in clock ticks since boot; 0 if unknown.

    Together with the pid this identifies the process.
    """
    fields = _fields(pid)
    return int(fields[19]) if len(fields) > 19 else 0


def age_s(pid: int) -> float:
    """Return the seconds since the process started, or 0 if that is not known."""
    ticks = start_ticks(pid)
    try:
        uptime_s = float(Path("/proc/uptime").read_text().split()[0])
    except (OSError, ValueError, IndexError):
        return 0.0
    return max(0.0, uptime_s - ticks / os.sysconf("SC_CLK_TCK")) if ticks else 0.0


def state(pid: int) -> str:
    """Return the kernel's letter for the state of a process, such as R, S, D, T (stopped) or Z.

    "" if there is no such process, "?" if it exists but there is no /proc.
    """
    if fields := _fields(pid):
        return fields[0]
    if Path("/proc/self/stat").exists():
        return ""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return ""
    except PermissionError:
        pass
    return "?"


def describe_state(letter: str) -> str:
    """Return a state with its meaning, such as `T (stopped)`."""
    return f"{letter} ({_STATES[letter]})" if letter in _STATES else letter or "gone"


def is_alive(pid: int, ticks: int) -> bool:
    """Return whether the process with this pid and start time still runs; a zombie does not."""
    return state(pid) not in GONE and start_ticks(pid) == ticks


def how_it_ended(pid: int, ticks: int) -> str:
    """Return how a process ended that nobody has waited for yet: `killed by SIGKILL`, `exit code 1` or the like.

    "" if that cannot be seen.
    """
    fields = _fields(pid)
    if len(fields) < 50 or fields[0] not in GONE or int(fields[19]) != ticks:
        return ""
    status = int(fields[49])
    number = status & 0x7F
    if not number:
        return f"exit code {status >> 8}"
    try:
        return f"killed by {signal.Signals(number).name}"
    except ValueError:
        return f"killed by signal {number}"


def parent(pid: int) -> int:
    """Return the process that started this one, or that has adopted it; 0 if unknown."""
    fields = _fields(pid)
    return int(fields[1]) if len(fields) > 1 else 0


def threads(pid: int) -> int:
    """Return the number of threads of a process; 0 if unknown."""
    fields = _fields(pid)
    return int(fields[17]) if len(fields) > 17 else 0


def is_leaving(pid: int) -> bool:
    """Return whether the kernel is tearing the process down; its connections may be closed while it seems to run."""
    fields = _fields(pid)
    return len(fields) > 6 and bool(int(fields[6]) & _PF_EXITING)


@cache
def machine() -> str:
    """Return the identity of the space of process numbers: this boot of this machine, and the process namespace.

    Ranks in separate containers cannot see each other's processes.
    """
    found: list[str] = []
    with contextlib.suppress(OSError):
        found.append(Path("/proc/sys/kernel/random/boot_id").read_text().strip())
    with contextlib.suppress(OSError):
        found.append(os.readlink("/proc/self/ns/pid"))
    return " ".join(found)


def descendants(pid: int) -> list[int]:
    """Return the current children, grandchildren and so on of a process."""
    children: dict[int, list[int]] = {}
    for child in _pids():
        if fields := _fields(child):
            children.setdefault(int(fields[1]), []).append(child)
    found, waiting = [], [pid]
    while waiting:
        more = children.get(waiting.pop(), [])
        found += more
        waiting += more
    return found


def _pids() -> Iterator[int]:
    try:
        names = os.listdir("/proc")
    except OSError:
        return
    yield from (int(name) for name in names if name.isdecimal())


def open_pidfd(pid: int) -> int | None:
    """Return a descriptor that becomes readable when the process ends; None if the kernel does not offer one."""
    if not hasattr(os, "pidfd_open"):
        return None
    try:
        return os.pidfd_open(pid)
    except OSError:
        return None
