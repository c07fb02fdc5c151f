"""Heartbeat of one rank: a small memory-mapped file that the rank writes and the watchers of its node read.

The rank's side costs a few `struct.pack_into` per step; it never waits, locks or makes a system call.
"""

from __future__ import annotations

import mmap
import os
import struct
import time
from dataclasses import dataclass
from pathlib import Path

from megadiff.supervision import process

RUNNING, ENDED, FAILED = 0, 1, 2
"""States of a rank: still at work; ended normally; raised an exception and about to exit."""

_MAGIC = b"MDBEAT01"
_BYTES = 4096
# Native sizes: pack_into then stores a number with one memcpy, so that a reader never sees half of one.
_IDENTITY = struct.Struct("@8sqQqd")  # magic, pid, its start in ticks, rank, registered at
_VERSION = struct.Struct("@Q")  # odd while the place below is being written
_PLACE = struct.Struct("@ddqq32s48s")  # started, limit, step, marks of this step, section, mark
_LIFE = struct.Struct("@qqd")  # RUNNING..., whether the rank's own message was printed, when
_TEXT = struct.Struct("@1000s")
_AT_VERSION, _AT_PLACE, _AT_LIFE, _AT_REASON, _AT_VERDICT = 64, 72, 256, 288, 1296
NO_STEP = -1


@dataclass(frozen=True)
class Place:
    """The position of a rank in its program."""

    section: str
    """Name of the section; "" outside every section, where nothing is timed."""
    mark: str
    """Last mark set by `at()` in this section, or ""."""
    step: int
    """Step of the section; NO_STEP if it belongs to none."""
    index: int
    """Number of sections and marks since this step began: the same on every rank at the same point of the program."""
    started: float
    """Monotonic time at which the section began or last reported progress."""
    limit_s: float

    @property
    def order(self) -> tuple[int, int]:
        """Key for comparing positions; a smaller one is less advanced."""
        return self.step, self.index

    def describe(self) -> str:
        """Return for example `section step 17 at reduce`."""
        if not self.section:
            return "no section"
        step = f" {self.step}" if self.step != NO_STEP else ""
        return f"section {self.section}{step}" + (f" at {self.mark}" if self.mark else "")


NOWHERE = Place("", "", NO_STEP, 0, 0.0, 0.0)


class Heartbeat:
    """The mapped file of one rank. Times are of the monotonic clock, which all processes of a machine share."""

    def __init__(self, memory: mmap.mmap) -> None:
        magic, self.pid, self.ticks, self.rank, self.registered = _IDENTITY.unpack_from(memory, 0)
        if magic != _MAGIC:
            raise ValueError("not a heartbeat file")
        self._memory = memory
        self._version = 0

    @classmethod
    def create(cls, path: Path, rank: int) -> Heartbeat:
        """Create this process's heartbeat; it appears under `path` complete and replaces an older file of that name."""
        temporary = path.with_suffix(f".{os.getpid()}")
        handle = os.open(temporary, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o600)
        try:
            os.truncate(handle, _BYTES)
            memory = mmap.mmap(handle, _BYTES)
            pid = os.getpid()
            _IDENTITY.pack_into(memory, 0, _MAGIC, pid, process.start_ticks(pid), rank, time.monotonic())
            os.replace(temporary, path)
        finally:
            os.close(handle)
        return cls(memory)

    @classmethod
    def unwatched(cls, rank: int) -> Heartbeat:
        """Return a heartbeat in plain memory that nobody reads."""
        memory = mmap.mmap(-1, _BYTES)
        _IDENTITY.pack_into(memory, 0, _MAGIC, os.getpid(), 0, rank, time.monotonic())
        return cls(memory)

    @classmethod
    def open(cls, path: Path) -> Heartbeat:
        """Map another process's heartbeat.

        Raises:
            OSError: the file does not exist.
            ValueError: the file is not a heartbeat.
        """
        handle = os.open(path, os.O_RDWR | os.O_NOFOLLOW)
        try:
            if os.fstat(handle).st_size != _BYTES:
                raise ValueError("not a heartbeat file")
            return cls(mmap.mmap(handle, _BYTES))
        finally:
            os.close(handle)

    def write(self, started: float, limit_s: float, step: int, index: int, section: bytes, mark: bytes) -> None:
        """Write the position of this rank."""
        self._version += 2
        _VERSION.pack_into(self._memory, _AT_VERSION, self._version - 1)
        _PLACE.pack_into(self._memory, _AT_PLACE, started, limit_s, step, index, section, mark)
        _VERSION.pack_into(self._memory, _AT_VERSION, self._version)

    def place(self) -> Place:
        """Return the position of the rank; if it was stopped in the middle of a write, possibly a mixed one."""
        for _ in range(5):
            before = _VERSION.unpack_from(self._memory, _AT_VERSION)[0]
            started, limit_s, step, index, section, mark = _PLACE.unpack_from(self._memory, _AT_PLACE)
            if before % 2 == 0 and before == _VERSION.unpack_from(self._memory, _AT_VERSION)[0]:
                break
        return Place(_text(section), _text(mark), step, index, started, limit_s)

    def leave(self, life: int, reason: str = "", *, is_told: bool = False) -> None:
        """Record that this rank is about to end, and why."""
        _TEXT.pack_into(self._memory, _AT_REASON, _bytes(reason))
        _LIFE.pack_into(self._memory, _AT_LIFE, life, is_told, time.monotonic())

    def life(self) -> tuple[int, str, bool, float]:
        """Return the state (RUNNING, ENDED or FAILED), its reason, whether the user has seen the reason, and since
        when."""
        life, is_told, since = _LIFE.unpack_from(self._memory, _AT_LIFE)
        return life, _text(_TEXT.unpack_from(self._memory, _AT_REASON)[0]), bool(is_told), since

    def set_cause(self, cause: str) -> None:
        """Record the root cause before the watcher kills this rank, so that the kill is not reported as the failure."""
        _TEXT.pack_into(self._memory, _AT_VERDICT, _bytes(cause))

    def verdict(self) -> str:
        """Return the cause for which the watcher ended the rank, or ""."""
        return _text(_TEXT.unpack_from(self._memory, _AT_VERDICT)[0])


def _text(padded: bytes) -> str:
    return padded.split(b"\0", 1)[0].decode(errors="replace")


def _bytes(text: str) -> bytes:
    return text.replace("\0", " ").encode(errors="replace")[:999]
