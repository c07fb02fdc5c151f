"""What each rank's watcher knows of a failure, which of it is the cause, and who says so.

The accounts lie in `RUN/first_cause/LAUNCH/`, one file a rank; the watcher that creates `first_cause.txt` there speaks.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path

from megadiff.files import write_atomically
from megadiff.supervision import process
from megadiff.supervision.heartbeat import Heartbeat

VERDICT = "first_cause.txt"


@dataclass(frozen=True)
class Account:
    """Where one rank was when its watcher looked."""

    rank: int
    host: str
    pid: int
    place: str
    step: int
    index: int
    age_s: float
    """Seconds in this section."""
    limit_s: float
    state: str
    """The kernel's letter: T is stopped."""

    @classmethod
    def of(cls, beat: Heartbeat, host: str, now: float) -> Account:
        """Of a rank of this node, as of now."""
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
        """`rank 3 (node7, pid 4711)`."""
        return f"rank {self.rank} ({self.host}, pid {self.pid})"

    @property
    def stalled(self) -> str:
        """The sentence about this rank alone."""
        return (
            f"{self.name} stalled: in {self.place} for {self.age_s:.1f} s (limit {self.limit_s:g} s); "
            f"state {process.describe_state(self.state)}"
        )


def name_culprit(accounts: Iterable[Account], world_size: int) -> str:
    """Say which rank keeps the others waiting.

    A stopped rank; else the one least advanced, since all pass the same places in the same order; else nobody can tell,
    and the states of the processes are given.
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


def _states(known: list[Account]) -> str:
    """`state R (running) of rank 3, S (sleeping) of ranks 0, 1, 2`; the rarest first."""
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
    """Write a file that was not there; whether that was so."""
    try:
        with open(path, "x", encoding="utf-8") as file:
            file.write(text + "\n")
    except FileExistsError:
        return False
    return True


class Records:
    """The folder of accounts of one launch; nothing is made before there is a failure, or if the run folder is gone."""

    def __init__(self, folder: Path, node_folder: Path) -> None:
        """Not made yet.

        Args:
            node_folder: in whose memory the ranks of one node settle who speaks if the run folder cannot be written.
        """
        self._folder = folder
        self._node_folder = node_folder

    def clear(self) -> None:
        """Remove what an earlier launch that looked the same (same port, same job) left; only names written here."""
        if self._folder.is_symlink() or not self._folder.is_dir():
            return
        for path in self._folder.glob("rank-?????.*"):
            if path.suffix in (".json", ".stacks"):
                path.unlink(missing_ok=True)
        (self._folder / VERDICT).unlink(missing_ok=True)

    def write_account(self, account: Account) -> None:
        """Leave this rank's account; OSError if the disk refuses."""
        self._make()
        path = self._folder / f"rank-{account.rank:05d}.json"
        write_atomically(path, json.dumps(asdict(account)), is_durable=False)

    def accounts(self) -> list[Account]:
        """Those that are there and whole."""
        found = []
        for path in self._folder.glob("rank-?????.json"):
            try:
                found.append(Account(**json.loads(path.read_text(encoding="utf-8"))))
            except (OSError, ValueError, TypeError):
                continue
        return found

    def write_stacks(self, rank: int, stacks: str) -> None:
        """Keep a rank's stacks; OSError if the disk refuses."""
        self._make()
        (self._folder / f"rank-{rank:05d}.stacks").write_text(stacks, encoding="utf-8")

    def claim(self, cause: str) -> bool:
        """Whether this caller is the one who speaks: the first of the launch, or of its node if the disk refuses."""
        try:
            self._make()
            return _create(self._folder / VERDICT, cause)
        except OSError:
            return _create(self._node_folder / VERDICT, cause)

    def verdict(self) -> tuple[str, tuple[int, int]]:
        """The cause that somebody claimed, "" before that, and which file says so."""
        path = self._folder / VERDICT
        try:
            found = path.stat()
            return path.read_text(encoding="utf-8").strip(), (found.st_ino, found.st_mtime_ns)
        except OSError:
            return "", (0, 0)

    def _make(self) -> None:
        """Never the run folder itself: where there is none, nothing of the run may be written."""
        self._folder.parent.mkdir(exist_ok=True)
        self._folder.mkdir(exist_ok=True)
