"""Claims on units: each is made by one process at a time, and one whose process was killed can be taken again.

A claim is a file that its process locks and rewrites every few seconds with a new number. The kernel drops the lock of
a killed process, so on one machine its unit is free at once. The file of a process on another machine, or on a file
system without locks, must stay the same for a while, as seen by the clock of the machine that looks at it.

Claims only save work. Two processes that make the same unit write the same bytes, and one rename decides.
"""

from __future__ import annotations

import fcntl
import os
import platform
import secrets
import threading
import time
from contextlib import suppress
from pathlib import Path
from types import TracebackType

import orjson

from megadiff.errors import DataError

BEAT_S = 5.0
"""Time between two signs of life, in seconds."""

PATIENCE_S = 60.0
"""Time without a sign of life after which a process on another machine counts as dead, in seconds."""

_SETTLING_S = 0.2
_MOST_BYTES = 2**12
_BOOT_ID = Path("/proc/sys/kernel/random/boot_id")


def this_machine() -> str:
    """Return an identifier of this machine since it was started; its name where the system offers none."""
    try:
        return _BOOT_ID.read_text(encoding="ascii").strip()
    except OSError:
        return platform.node()


class Claim:
    """A unit that this process has taken; a context manager that gives it back.

    Args:
        path: the claim's file.
        descriptor: the open file, locked where the file system has locks.
        maker: unique word for this claim, for the names of temporary files.
        dead_maker: that of an earlier claim whose process is gone.
    """

    def __init__(self, path: Path, descriptor: int, maker: str, dead_maker: str | None) -> None:
        self.maker, self.dead_maker = maker, dead_maker
        self._path, self._descriptor = path, descriptor
        self._beats = 0
        self._ended = threading.Event()
        self.beat()
        self._thread = threading.Thread(target=self._beat_on, name="claim", daemon=True)
        self._thread.start()

    def beat(self) -> None:
        """Show that this process lives; a full disk delays the sign."""
        self._beats += 1
        sign = {
            "maker": self.maker,
            "machine": this_machine(),
            "host": platform.node(),
            "process": os.getpid(),
            "beats": self._beats,
        }
        with suppress(OSError):
            os.pwrite(self._descriptor, orjson.dumps(sign).ljust(_MOST_BYTES // 8), 0)
            os.fsync(self._descriptor)  # or a network disk would keep it from other machines for half a minute

    def is_kept(self) -> bool:
        """Return whether the file still holds this claim, which matters where there are no locks."""
        holder = _holder(os.pread(self._descriptor, _MOST_BYTES, 0))
        return holder is not None and holder["maker"] == self.maker

    def _beat_on(self) -> None:
        while not self._ended.wait(BEAT_S):
            self.beat()

    def __enter__(self) -> Claim:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.leave()
        with suppress(OSError):
            self._path.unlink()
        os.close(self._descriptor)

    def leave(self) -> None:
        """Give no more signs of life, and leave the file to another process."""
        self._ended.set()
        self._thread.join()


class Claims:
    """The claims in a folder, as one process sees them.

    Args:
        folder: the folder of claims.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._seen: dict[str, tuple[bytes, float]] = {}
        self._machine = this_machine()

    def take(self, name: str) -> Claim | None:
        """Return the claim on a unit; None if another process has it, or may have it.

        Raises:
            DataError: the folder cannot be written.
        """
        path = self._folder / name
        try:
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o666)
        except FileNotFoundError:  # the folder of a finished corpus is removed
            return None
        except OSError as error:
            raise DataError(
                f"{path}: cannot be written ({error.strerror}); check the permissions of the --shards folder"
            ) from error
        claim = self._taken(path, descriptor)
        if claim is None:
            os.close(descriptor)
        return claim

    def _taken(self, path: Path, descriptor: int) -> Claim | None:
        has_lock = True
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return None
        except OSError:
            has_lock = False
        if not _is_at(path, descriptor):
            return None  # given back while it was opened
        content = os.pread(descriptor, _MOST_BYTES, 0)
        holder = _holder(content)
        is_known_dead = has_lock and holder is not None and holder["machine"] == self._machine
        if holder is not None and not is_known_dead and not self._is_silent(path.name, content):
            return None
        claim = Claim(path, descriptor, secrets.token_hex(8), None if holder is None else holder["maker"])
        if not has_lock:
            time.sleep(_SETTLING_S)
            if not claim.is_kept():
                claim.leave()
                return None
        return claim

    def _is_silent(self, name: str, content: bytes) -> bool:
        now = time.monotonic()
        then = self._seen.get(name)
        if then is None or then[0] != content:
            self._seen[name] = content, now
            return False
        return now - then[1] >= PATIENCE_S


def _is_at(path: Path, descriptor: int) -> bool:
    """Return whether an open file is the one at a path."""
    try:
        return os.fstat(descriptor).st_ino == os.stat(path).st_ino
    except OSError:
        return False


def _holder(content: bytes) -> dict[str, str] | None:
    """Return the maker and the machine that a claim names; None if it names none."""
    try:
        found = orjson.loads(content)
        maker, machine = found["maker"], found["machine"]
    except (orjson.JSONDecodeError, KeyError, TypeError):
        return None
    is_word = isinstance(maker, str) and maker.isalnum() and isinstance(machine, str)
    return {"maker": maker, "machine": machine} if is_word else None
