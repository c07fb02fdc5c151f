"""The launch of a run: its launcher's death, the run folder's holder, the ranks on this machine.

A rank whose launcher is gone would train on unnoticed and lock the run folder against the next start. Three mechanisms
end it, and each covers cases that the others miss: the kernel's parent-death signal, which acts at once whatever the
rank is doing; a thread of the rank, for launchers that are not its parent or that start processes from threads; and
the rank's watcher (`watcher.py`), which also records why.
"""

from __future__ import annotations

import contextlib
import ctypes
import hashlib
import json
import os
import select
import signal
import socket
import stat
import tempfile
import threading
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

from megadiff.errors import PlatformError
from megadiff.files import UnreadableFileError, read_json_object, write_atomically
from megadiff.supervision import process

_NAME = ".lock.holder"
_MAX_BYTES, _MAX_NUMBER = 4096, 2**62

_MOST_ANCESTORS = 64
_PR_SET_PDEATHSIG = 1
_LOOK_EVERY_S = 0.5
_SPEAKING_S = 1.0
"""Time a watcher has to record why its rank ends, before the rank ends itself."""

_OF_THE_LAUNCH = (
    "MASTER_ADDR",
    "MASTER_PORT",
    "TORCHELASTIC_RUN_ID",
    "TORCHELASTIC_RESTART_COUNT",
    "SLURM_JOB_ID",
    "SLURM_STEP_ID",
    "SLURM_RESTART_COUNT",
)
_LOOPBACK = ("", "localhost", "::1")


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


@dataclass(frozen=True)
class Launch:
    """One launch of a run. Every rank computes the same value without communication."""

    run_folder: Path
    rank: int
    world_size: int
    local_world_size: int
    """Number of ranks on this node."""
    attempt: str
    """Readable name of the attempt, `JOB-RESTARTS`."""
    key: str
    """Identity of the launch, sixteen hexadecimal digits."""

    @classmethod
    def from_env(
        cls,
        run_folder: Path,
        *,
        rank: int,
        world_size: int,
        local_world_size: int | None = None,
        environ: Mapping[str, str] = os.environ,
    ) -> Launch:
        """Read the launch from the environment that torchrun or SLURM has set.

        Args:
            local_world_size: ranks on this node; None takes LOCAL_WORLD_SIZE, or all ranks if that is not set.
        """
        facts = [str(run_folder.resolve()), str(world_size), *(environ.get(name, "") for name in _OF_THE_LAUNCH)]
        address = environ.get("MASTER_ADDR", "")
        if address in _LOOPBACK or address.startswith("127."):
            facts.append(socket.gethostname())
        if world_size == 1:
            facts.append(str(os.getpid()))
        return cls(
            run_folder=run_folder,
            rank=rank,
            world_size=world_size,
            local_world_size=local_world_size or _number(environ.get("LOCAL_WORLD_SIZE")) or world_size,
            attempt=f"{_plain(environ.get('SLURM_JOB_ID'), 'local')}-{_number(environ.get('SLURM_RESTART_COUNT'))}",
            key=_digest(facts),
        )

    @property
    def records(self) -> Path:
        """Folder for the ranks' accounts of a failure; created only when there is one."""
        return self.run_folder / "first_cause" / f"{self.attempt}-{self.key[:8]}"

    def node_folder(self) -> Path:
        """Create and return this node's folder of heartbeats, in `/dev/shm` if there is one, accessible to this user
        alone.

        Raises:
            PlatformError: the folder cannot be created, or something else or somebody else's folder is in its place.
        """
        memory = Path("/dev/shm")
        root = memory if os.access(memory, os.W_OK | os.X_OK) else Path(tempfile.gettempdir())
        folder = root / f"megadiff-{os.getuid()}-{_digest([self.key, process.machine()])}"
        try:
            folder.mkdir(mode=0o700, exist_ok=True)
            found = os.lstat(folder)
        except OSError as error:
            raise PlatformError(
                f"the watchdog's folder {folder} cannot be created ({error.strerror}); fix that, or set "
                "watchdog.enabled=false"
            ) from None
        if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.getuid() or found.st_mode & 0o077:
            raise PlatformError(
                f"the watchdog's folder {folder} should be a folder of this user that others cannot enter, and is not; "
                "remove it, or set watchdog.enabled=false"
            )
        return folder


def heartbeat_path(node_folder: Path, rank: int) -> Path:
    """Return the path of a rank's heartbeat file."""
    return node_folder / f"rank-{rank:05d}.beat"


def _digest(facts: list[str]) -> str:
    return hashlib.sha256("\0".join(facts).encode()).hexdigest()[:16]


def _number(text: str | None) -> int:
    return int(text) if text and text.isdecimal() else 0


def _plain(text: str | None, otherwise: str) -> str:
    """Return the text if it can be part of a path, otherwise the alternative.

    A job's id consists of digits and, in an array, an underscore; anything else is refused.
    """
    return text if text and text.replace("_", "").isalnum() else otherwise
