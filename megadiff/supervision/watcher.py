"""The process that watches one rank: `python -I -S -c BOOTSTRAP ROOT SETTINGS`, 20 MB, the standard library alone.

It ends when its rank does. It reads heartbeats and takes no lock of the rank, so it works even while the rank is
stopped or holds the interpreter lock. Operations that may hang (disk, terminal) run in threads that are not joined.

`LocalRanks` is the ranks of this node as the watcher sees them, and how each of them ended; `Watcher` decides what
follows from that.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import select
import signal
import socket
import sys
import time
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path

from megadiff.supervision import process
from megadiff.supervision.first_cause import (
    VERDICT,
    RankReport,
    Records,
    find_root_cause,
    kill,
    read_stacks,
    take_stacks,
    within,
)
from megadiff.supervision.heartbeat import ENDED, FAILED, RUNNING, Heartbeat
from megadiff.supervision.launch import Launch, Launcher, describe_loss, heartbeat_path
from megadiff.supervision.status import record_failure

BOOTSTRAP = "import sys; sys.path.append(sys.argv[1]); from megadiff.supervision.watcher import main; main()"
EXIT_STALLED, EXIT_DIED = 6, 1

TICK_S = 0.1
PAUSED_S = 5.0
"""Seconds without running after which a watcher assumes that the whole job was paused, and restarts the ranks' clocks.
"""
SETTLE_S = 0.6
"""Seconds to wait for the other watchers' accounts of a stall."""
OWN_DEATH_S, OTHER_DEATH_S = 0.1, 0.6
"""Seconds before a death is reported: by its own watcher, which knows most, and by the others, which only step in."""
ECHO_S, MOST_ECHO_S = 5.0, 30.0
"""Seconds for which an exception that usually follows from a death is held back until that death is noticed; the longer
time applies while the kernel is seen to tear down a rank."""
GRACE_S, GRACE_AFTER_ECHO_S, GRACE_AFTER_EFFECT_S = 2.0, 4.0, 0.5
"""Seconds a rank has to notice by itself that another one is gone, has lost a connection (the dying rank may be this
one), or was ended by its watcher."""
LEAVING_S = 20.0
"""Seconds a rank that raised an exception has to exit."""
ELSEWHERE_EVERY_S, GRACE_ELSEWHERE_S = 1.0, 1.0
"""Seconds between looks for a first cause reported by another node, and seconds given to this node's ranks to end by
themselves once there is one."""
STACKS_IN_LOG = 16
"""Largest number of ranks of a run whose stacks all go into its log; those of larger runs stay in the records."""
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


class Watcher:
    """The watcher of one rank, from its start to its end."""

    def __init__(self, launch: Launch, folder: Path, launcher: Launcher | None = None) -> None:
        self._launch = launch
        self._launcher = launcher
        self._folder = folder
        self._dump = folder / f"rank-{launch.rank:05d}.stacks"
        self._host = socket.gethostname()
        self._records = Records(launch.records, folder)
        self._beat = Heartbeat.open(heartbeat_path(folder, launch.rank))
        self._nodes = LocalRanks(folder, Watched.of(self._beat), self._host, _began(self._beat))
        self._ticked = self._fresh_from = time.monotonic()
        self._has_spoken = False
        self._looked_elsewhere = time.monotonic()
        self._elsewhere_before = self._records.verdict() if self._spans_nodes else None

    def run(self) -> None:
        """Watch until the rank is gone or has ended normally."""
        while True:
            self._nodes.wait(TICK_S, sys.stdin.fileno())
            self._notice_pause()
            self._nodes.look()
            life, _, _, since = self._beat.life()
            if life == ENDED:
                return
            if self._nodes.own.is_gone:
                return self._after_death()
            event = self._nodes.first_event()
            if event is not None:
                if self._follow(event, life, since):
                    return
            elif self._launcher is not None and not self._launcher.is_alive:
                return self._end_without_launcher(self._launcher)
            elif self._is_stalled():
                return self._end_stalled()
            elif cause := self._cause_elsewhere():
                return self._end(cause)

    def clean(self) -> None:
        """Remove all files of the rank on this node that are no longer needed."""
        leave_node(self._folder, self._launch.rank, is_well=self._beat.life()[0] == ENDED)

    @property
    def _spans_nodes(self) -> bool:
        return self._launch.local_world_size < self._launch.world_size

    def _notice_pause(self) -> None:
        now = time.monotonic()
        if now - self._ticked > PAUSED_S:
            self._fresh_from = now
        self._ticked = now

    def _is_stalled(self) -> bool:
        """Check twice, because a position read while it was being written must not end a run."""
        return all(self._is_overdue() for _ in range(2))

    def _is_overdue(self) -> bool:
        place = self._beat.place()
        return bool(place.section) and time.monotonic() - max(place.started, self._fresh_from) > place.limit_s

    def _end_without_launcher(self, launcher: Launcher) -> None:
        """End a rank whose launcher is gone: it would run on unnoticed if the kernel's signal did not reach it or does
        not exist."""
        cause = describe_loss(launcher)
        self._speak(cause, EXIT_DIED)
        self._end(cause)

    def _end_stalled(self) -> None:
        """End a stalled rank.

        Write its account, compare it with those of the other ranks, report the cause if nobody has, write the stacks,
        and kill the rank.
        """
        now = time.monotonic()
        here = {beat.rank: RankReport.of(beat, self._host, now) for beat in self._nodes.beats()}
        within(0.5, lambda: self._records.write_account(here[self._launch.rank]))
        time.sleep(SETTLE_S)
        reported: list[RankReport] = []
        within(0.5, lambda: reported.extend(self._records.accounts()))
        known = {**here, **{account.rank: account for account in reported}}
        cause = find_root_cause(known.values(), self._launch.world_size)
        self._speak(cause, EXIT_STALLED)
        stacks = take_stacks(self._beat.pid, self._dump)
        within(1.0, lambda: self._keep_stacks(stacks))
        self._end(cause)

    def _follow(self, event: Event, life: int, since: float) -> bool:
        """Handle another rank's end, or to this rank's announcement of its own; return whether this rank's end is
        settled."""
        now = time.monotonic()
        is_own = event.rank == self._launch.rank
        if now - event.seen > (OWN_DEATH_S if is_own else OTHER_DEATH_S) and not event.is_told:
            self._speak_of(event)  # unless it is an echo that is still held back
        if life == FAILED and now - since > LEAVING_S:
            self._end(f"rank {self._launch.rank} raised and did not leave within {LEAVING_S:g} s")
            return True
        grace = GRACE_AFTER_EFFECT_S if event.is_effect else GRACE_AFTER_ECHO_S if event.is_echo else GRACE_S
        if life == RUNNING and now - event.seen > grace and not process.is_leaving(self._beat.pid):
            self._speak_of(event)
            self._end(event.cause)
            return True
        return False

    def _after_death(self) -> None:
        """Report the death of a rank that exited without announcement or after an exception."""
        own = self._nodes.own.event
        stacks = read_stacks(self._dump)
        if stacks and not (own and own.is_effect):
            within(1.0, lambda: self._keep_stacks(stacks))
        until = time.monotonic() + OWN_DEATH_S
        while time.monotonic() < until or self._is_kept_back(self._nodes.first_event()):
            time.sleep(TICK_S / 2)
            self._nodes.look()
        event = self._nodes.first_event()
        if event is not None and not event.is_told:
            self._speak_of(event)

    def _is_kept_back(self, event: Event | None) -> bool:
        """Return whether it is too early to report this event as the first cause, because the death it follows from may
        still be noticed."""
        if event is None or not event.is_echo or self._has_spoken or self._launch.world_size == 1:
            return False
        if not self._spans_nodes and self._nodes.are_all_accounted_for(self._launch.local_world_size):
            return False
        waited = time.monotonic() - event.seen
        return waited < ECHO_S or (waited < MOST_ECHO_S and self._nodes.is_somebody_leaving)

    def _cause_elsewhere(self) -> str:
        """Return a first cause that another node has reported, or "".

        To spare the disk only the lowest rank of a node looks; the other ranks of the node follow it.
        """
        now = time.monotonic()
        if self._elsewhere_before is None or now - self._looked_elsewhere < ELSEWHERE_EVERY_S:
            return ""
        self._looked_elsewhere = now
        if any(beat.rank < self._launch.rank for beat in self._nodes.beats()):
            return ""
        found: list[tuple[str, tuple[int, int]]] = []
        within(1.0, lambda: found.append(self._records.verdict()))
        if not found or not found[0][0] or found[0][1] == self._elsewhere_before[1]:
            return ""
        time.sleep(GRACE_ELSEWHERE_S)
        return found[0][0]

    def _speak_of(self, event: Event) -> None:
        """Report a death, or an exception that leaves other ranks hanging."""
        is_alone = self._launch.world_size == 1 and self._beat.life()[0] == FAILED
        if event.is_effect or is_alone or self._is_kept_back(event):
            return
        lost = event.is_kill and self._launcher is not None and not self._launcher.is_alive
        self._speak(describe_loss(self._launcher) if lost and self._launcher else event.cause, EXIT_DIED)

    def _speak(self, cause: str, exit_code: int) -> None:
        """Report the cause on stderr, in the run's log and in `status.json`: once, and only by the first watcher of the
        launch."""
        if self._has_spoken:
            return
        self._has_spoken = True
        claimed: list[bool] = []
        if within(0.5, lambda: claimed.append(self._records.claim(cause))) and claimed == [False]:
            return
        line = f"first cause: {cause}"
        within(0.5, lambda: os.write(2, f"{line}\n".encode()))
        within(0.5, lambda: self._log(line))
        within(
            0.5,
            lambda: record_failure(
                self._launch.run_folder,
                line,
                exit_code=exit_code,
                launch=self._launch.key,
                step=self._beat.place().step - 1,  # the place belongs to the step being taken
            ),
        )

    def _log(self, text: str) -> None:
        """Append to the run's log in one write, so that lines of several processes stay whole."""
        stamp = datetime.now().strftime("%Y-%m-%d %H:%M:%S,000")
        handle = os.open(self._launch.run_folder / "log.txt", os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
        try:
            os.write(handle, f"{stamp} ERROR {text}\n".encode())
        finally:
            os.close(handle)

    def _keep_stacks(self, stacks: str) -> None:
        """Write the stacks to the records and, for small runs, also to the log and stderr."""
        rank = self._launch.rank
        text = f"stacks of rank {rank} ({self._host}, pid {self._beat.pid}):\n{stacks.rstrip() or '(none came)'}"
        if self._launch.world_size <= STACKS_IN_LOG:
            os.write(2, f"{text}\n".encode())
            self._log(text)
        self._records.write_stacks(rank, f"{text}\n")

    def _end(self, cause: str) -> None:
        self._beat.set_cause(cause)
        kill(self._beat.pid, self._beat.ticks)


def _began(beat: Heartbeat) -> float:
    """Return when the rank's process started, on the monotonic clock, less a second in which its peers may have
    started."""
    if not beat.ticks or not hasattr(time, "CLOCK_BOOTTIME"):
        return beat.registered - 60.0
    age = time.clock_gettime(time.CLOCK_BOOTTIME) - beat.ticks / os.sysconf("SC_CLK_TCK")
    return time.monotonic() - age - 1.0


def main() -> None:
    """Watch the rank described by `sys.argv[2]`."""
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2):
        signal.signal(number, signal.SIG_IGN)  # these signals are for the job; this process ends with its rank
    settings = json.loads(sys.argv[2])
    launch = Launch(**{**settings["launch"], "run_folder": Path(settings["launch"]["run_folder"])})
    launcher = Launcher(*settings["launcher"]) if settings["launcher"] else None
    watcher = Watcher(launch, Path(settings["folder"]), launcher)
    try:
        watcher.run()
    finally:
        watcher.clean()
    os._exit(0)  # without waiting for reports that hang
