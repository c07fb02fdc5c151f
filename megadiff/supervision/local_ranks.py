"""The ranks of this node as one watcher sees them, and how each of them ended."""

from __future__ import annotations

import contextlib
import os
import re
import select
import time
from dataclasses import dataclass, field
from pathlib import Path

from megadiff.supervision import process
from megadiff.supervision.first_cause import VERDICT
from megadiff.supervision.heartbeat import ENDED, FAILED, RUNNING, Heartbeat

LOOK_EVERY_S, AT_FIRST_S = 1.0, 10.0
"""Seconds between searches for new ranks, and seconds after the start during which every turn searches, because ranks
may still be starting."""
DEATH_FIRST_S = 0.5
"""Seconds by which the recorded time of a death is moved back.

A peer raises within a millisecond of a rank's death, and the two may be noticed in either order. Deaths by TERM or INT
are not moved back, because launchers end the peers of a failed rank with these signals.
"""
_ECHO = re.compile(
    r"connection (was )?(closed|reset|refused|aborted)|broken pipe|remote process exited|closed by peer"
    r"|socket (closed|error)|connectFullMesh|connect(ion)? fail|failed to (recv|send|connect)|(recv|send)Value failed"
    r"|communicator was aborted|\bDist(Network|Store|Backend)Error|ncclRemoteError|Connection(Reset|Aborted)Error"
    r"|BrokenPipeError|\bNCCL\b|\bgloo\b",
    re.IGNORECASE,
)
"""Errors that a rank raises when another one is gone, or when the network fails."""


@dataclass(frozen=True)
class Event:
    """The end of a rank, or its announcement that it is about to end."""

    rank: int
    when: float
    """Monotonic time that orders the events."""
    seen: float
    """Monotonic time at which the event was noticed, from which waiting times are counted."""
    cause: str
    is_told: bool
    """Whether the rank itself has shown the cause to the user."""
    is_effect: bool
    """Whether the rank's watcher ended it because of another event; `cause` is then that event's."""
    is_kill: bool = False
    """Whether the rank was killed, or nothing is known about how it ended."""
    is_echo: bool = False
    """Whether this usually follows from another rank's end: a lost connection, or a signal that requests the end.
    Deaths are ordered before it, whenever they are noticed, because the kernel closes a dying process's connections
    before the death becomes visible."""


@dataclass
class Watched:
    """One rank of this node and what is known about it."""

    beat: Heartbeat
    pidfd: int | None
    event: Event | None = None
    is_gone: bool = False

    @classmethod
    def of(cls, beat: Heartbeat) -> Watched:
        """Return a record for the rank of this heartbeat."""
        found = cls(beat, process.open_pidfd(beat.pid))
        if not process.is_alive(beat.pid, beat.ticks):  # the descriptor may belong to a later process of the same pid
            found.close()
        return found

    @property
    def is_running(self) -> bool:
        """Whether the process exists; its descriptor answers more cheaply than /proc."""
        if self.pidfd is None:
            return process.is_alive(self.beat.pid, self.beat.ticks)
        poll = select.poll()
        poll.register(self.pidfd, select.POLLIN)
        return not poll.poll(0)

    def look(self, host: str) -> None:
        """Check whether the process has ended, or has announced that it is about to."""
        life, reason, is_told, since = self.beat.life()
        now = time.monotonic()
        name = f"rank {self.beat.rank} ({host}, pid {self.beat.pid})"
        place = self.beat.place().describe()
        if not self.is_gone and not self.is_running:
            self.is_gone = True
            if life not in (ENDED, FAILED):
                self.event = self._death(f"{name} died in {place}", now)
        if self.event is None and life == FAILED:
            is_echo = _ECHO.search(reason) is not None
            self.event = Event(
                self.beat.rank, since, now, f"{name} raised in {place}: {reason}", is_told, False, is_echo=is_echo
            )

    def _death(self, sentence: str, now: float) -> Event:
        if verdict := self.beat.verdict():
            return Event(self.beat.rank, now, now, verdict, False, True)
        how = process.how_it_ended(self.beat.pid, self.beat.ticks)
        hint = " (possibly by the kernel's out-of-memory killer)" if how.endswith("SIGKILL") else ""
        is_asked = how.endswith(("SIGTERM", "SIGINT"))
        when = now if is_asked else now - DEATH_FIRST_S
        cause = f"{sentence}: {how}{hint}" if how else sentence
        is_kill = how.endswith("SIGKILL") or not how
        return Event(self.beat.rank, when, now, cause, False, False, is_kill=is_kill, is_echo=is_asked)

    def close(self) -> None:
        """Close the descriptor."""
        if self.pidfd is not None:
            os.close(self.pidfd)
            self.pidfd = None


@dataclass
class LocalRanks:
    """All ranks of the node that have a heartbeat, this watcher's own rank included."""

    folder: Path
    own: Watched
    host: str
    since: float
    """Monotonic time at which the watcher's rank began; an older heartbeat may belong to an earlier launch."""
    others: dict[str, Watched] = field(default_factory=dict)
    _looked: float = -LOOK_EVERY_S
    _is_doorbell_there: bool = True

    def wait(self, seconds: float, wakeup_fd: int) -> None:
        """Wait until a process ends, the wakeup_fd can be read, or the time is up."""
        poll = select.poll()
        if self._is_doorbell_there:
            poll.register(wakeup_fd, select.POLLIN)
        for watched in (self.own, *self.others.values()):
            if watched.pidfd is not None and not watched.is_gone:
                poll.register(watched.pidfd, select.POLLIN)
        if any(ready == wakeup_fd for ready, _ in poll.poll(seconds * 1000)):
            self._is_doorbell_there = bool(os.read(wakeup_fd, 64))

    def look(self) -> None:
        """Search for new ranks and update what is known about all of them."""
        now = time.monotonic()
        if now - self._looked > LOOK_EVERY_S or now - self.own.beat.registered < AT_FIRST_S:
            self._looked = now
            self._find()
        for watched in (self.own, *self.others.values()):
            watched.look(self.host)
            if watched.is_gone:
                watched.close()
        for name in [name for name, watched in self.others.items() if watched.is_gone and watched.event is None]:
            del self.others[name]  # it ended normally; another one may come under its name

    def beats(self) -> list[Heartbeat]:
        """Return the heartbeats of the ranks that are at work."""
        here = [watched.beat for watched in (self.own, *self.others.values()) if not watched.is_gone]
        return [beat for beat in here if beat.life()[0] == RUNNING]

    def first_event(self) -> Event | None:
        """Return the earliest event; causes come before their echoes and before effects."""
        events = [watched.event for watched in (self.own, *self.others.values()) if watched.event]
        return min(events, key=lambda event: (event.is_effect, event.is_echo, event.when), default=None)

    def are_all_accounted_for(self, ranks: int) -> bool:
        """Return whether all ranks of this node are known, and nothing more can be learnt about them."""
        known = (self.own, *self.others.values())
        return len(known) == ranks and all(watched.is_gone or watched.event is not None for watched in known)

    @property
    def is_somebody_leaving(self) -> bool:
        """Whether the kernel is tearing down a rank whose end is not visible yet."""
        return any(
            not watched.is_gone and watched.event is None and process.is_leaving(watched.beat.pid)
            for watched in (self.own, *self.others.values())
        )

    def _find(self) -> None:
        try:
            names = {path.name for path in self.folder.glob("rank-?????.beat")}
        except OSError:
            return
        for name in names - self.others.keys() - {f"rank-{self.own.beat.rank:05d}.beat"}:
            try:
                found = Watched.of(Heartbeat.open(self.folder / name))
            except (OSError, ValueError):
                continue
            if process.is_alive(found.beat.pid, found.beat.ticks) or found.beat.registered >= self.since:
                self.others[name] = found
            else:
                found.close()


def leave_node(folder: Path, rank: int, *, is_well: bool) -> None:
    """Remove the files of a rank from the node's folder, and with those of the last rank the folder itself.

    Args:
        is_well: whether the rank ended normally; the heartbeat of one that did not is kept until the last rank of the
            node is gone, for watchers that have not seen it yet.
    """
    paths: dict[str, Path] = {}
    with contextlib.suppress(OSError):  # the other ranks may have been the last just now
        paths = {path.stem: path for path in folder.glob("rank-?????.beat")}
    mine = f"rank-{rank:05d}"
    if any(_is_somebody(path) for name, path in paths.items() if name != mine):
        doomed = [f"{mine}.*" if is_well else f"{mine}.stacks"]
    else:
        doomed = ["rank-*", VERDICT]
    for pattern in doomed:
        with contextlib.suppress(OSError):
            for path in list(folder.glob(pattern)):
                path.unlink(missing_ok=True)
    with contextlib.suppress(OSError):
        folder.rmdir()


def _is_somebody(path: Path) -> bool:
    """Return whether the rank of a heartbeat file is running."""
    try:
        beat = Heartbeat.open(path)
    except (OSError, ValueError):
        return False
    return process.is_alive(beat.pid, beat.ticks)
