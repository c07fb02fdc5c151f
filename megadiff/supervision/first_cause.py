"""Accounts of a failure by the watchers of all ranks, and the decision about its first cause.

The accounts are files in `RUN/first_cause/LAUNCH/`, one per rank. The watcher that manages to create
`first_cause.txt` there reports the failure.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import threading
import time
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from pathlib import Path

from megadiff.files import write_atomically
from megadiff.supervision import process
from megadiff.supervision.heartbeat import Heartbeat

STACKS_SIGNAL = signal.SIGUSR1
"""Signal that makes a watched rank write its stacks, through a C handler that needs no interpreter lock."""
_STACKS_S, _QUIET_S, _GONE_S = 1.0, 0.2, 5.0

VERDICT = "first_cause.txt"


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


@dataclass(frozen=True)
class RankReport:
    """Position of one rank when its watcher looked at it."""

    rank: int
    host: str
    pid: int
    place: str
    step: int
    index: int
    age_s: float
    """Seconds the rank has spent in this section."""
    limit_s: float
    state: str
    """The kernel's letter for the state of the process; T means stopped."""

    @classmethod
    def of(cls, beat: Heartbeat, host: str, now: float) -> RankReport:
        """Return the account of a rank of this node at the time `now`."""
        place = beat.place()
        return cls(
            rank=beat.rank,
            host=host,
            pid=beat.pid,
            place=place.describe(),
            step=place.step,
            index=place.index,
            age_s=round(now - place.started, 1) if place.section else 0.0,
            limit_s=place.limit_s,
            state=process.state(beat.pid),
        )

    @property
    def name(self) -> str:
        """Name for messages, such as `rank 3 (node7, pid 4711)`."""
        return f"rank {self.rank} ({self.host}, pid {self.pid})"

    @property
    def stalled(self) -> str:
        """Sentence about this rank alone."""
        return (
            f"{self.name} stalled: in {self.place} for {self.age_s:.1f} s (limit {self.limit_s:g} s); "
            f"state {process.describe_state(self.state)}"
        )


def find_root_cause(accounts: Iterable[RankReport], world_size: int) -> str:
    """Describe which rank keeps the others waiting.

    A stopped rank is named first, otherwise the least advanced one, since all ranks pass the same places in the same
    order. If all ranks are equally advanced nobody can be named, and the states of the processes are listed.
    """
    known = sorted(accounts, key=lambda account: account.rank)
    if stopped := [account for account in known if account.state in ("T", "t")]:
        return "; ".join(account.stalled for account in stopped)
    least = min((account.step, account.index) for account in known)
    behind = [account for account in known if (account.step, account.index) == least]
    if world_size == 1:
        return known[0].stalled
    if len(behind) < len(known):
        others = sorted({account.place for account in known if account not in behind})
        return "; ".join(account.stalled for account in behind) + f"; the others wait in {', '.join(others)}"
    heard = f"all {world_size}" if len(known) == world_size else f"{len(known)} of {world_size}"
    first = known[0]
    return (
        f"{heard} ranks stalled in the same place, a collective or the network: in {first.place} "
        f"for {first.age_s:.1f} s (limit {first.limit_s:g} s); {_states(known)}"
    )


def _states(known: list[RankReport]) -> str:
    """Return for example `state R (running) of rank 3, S (sleeping) of ranks 0, 1, 2`, the rarest state first."""
    ranks: dict[str, list[int]] = {}
    for account in known:
        ranks.setdefault(account.state, []).append(account.rank)
    parts = [
        f"{process.describe_state(letter)} of rank{'s' if len(of) > 1 else ''} {', '.join(map(str, of[:8]))}"
        + (f" and {len(of) - 8} more" if len(of) > 8 else "")
        for letter, of in sorted(ranks.items(), key=lambda item: len(item[1]))
    ]
    return "state " + ", ".join(parts)


def _create(path: Path, text: str) -> bool:
    """Write a new file; return False, and write nothing, if it exists already."""
    try:
        with open(path, "x", encoding="utf-8") as file:
            file.write(text + "\n")
    except FileExistsError:
        return False
    return True


class Records:
    """The folder of one launch's accounts.

    It is created at the first failure only, and never if the run folder is gone.
    """

    def __init__(self, folder: Path, node_folder: Path) -> None:
        """Set the paths without creating anything.

        Args:
            node_folder: folder in this node's memory; its ranks use it to agree on a single reporter if the run folder
                cannot be written.
        """
        self._folder = folder
        self._node_folder = node_folder

    def clear(self) -> None:
        """Remove the files of an earlier launch that had the same key (same port, same job).

        Only files with names that this class writes are removed.
        """
        if self._folder.is_symlink() or not self._folder.is_dir():
            return
        for path in self._folder.glob("rank-?????.*"):
            if path.suffix in (".json", ".stacks"):
                path.unlink(missing_ok=True)
        (self._folder / VERDICT).unlink(missing_ok=True)

    def write_account(self, account: RankReport) -> None:
        """Write this rank's account.

        Raises:
            OSError: the disk cannot be written.
        """
        self._make()
        path = self._folder / f"rank-{account.rank:05d}.json"
        write_atomically(path, json.dumps(asdict(account)), is_durable=False)

    def accounts(self) -> list[RankReport]:
        """Return all complete accounts in the folder."""
        found = []
        for path in self._folder.glob("rank-?????.json"):
            try:
                found.append(RankReport(**json.loads(path.read_text(encoding="utf-8"))))
            except (OSError, ValueError, TypeError):
                continue
        return found

    def write_stacks(self, rank: int, stacks: str) -> None:
        """Write a rank's stacks.

        Raises:
            OSError: the disk cannot be written.
        """
        self._make()
        (self._folder / f"rank-{rank:05d}.stacks").write_text(stacks, encoding="utf-8")

    def claim(self, cause: str) -> bool:
        """Try to become the one that reports the failure; return whether this caller did.

        The first caller of the launch succeeds, or the first of its node if the disk cannot be written.
        """
        try:
            self._make()
            return _create(self._folder / VERDICT, cause)
        except OSError:
            return _create(self._node_folder / VERDICT, cause)

    def verdict(self) -> tuple[str, tuple[int, int]]:
        """Return the claimed cause ("" before any claim) and the identity (inode, time of change) of its file."""
        path = self._folder / VERDICT
        try:
            found = path.stat()
            return path.read_text(encoding="utf-8").strip(), (found.st_ino, found.st_mtime_ns)
        except OSError:
            return "", (0, 0)

    def _make(self) -> None:
        """Create the folder, but never the run folder: if that is gone, nothing of the run may be written."""
        self._folder.parent.mkdir(exist_ok=True)
        self._folder.mkdir(exist_ok=True)
