"""Identity of one launch of a run, and the private folder that its ranks share on a node."""

from __future__ import annotations

import hashlib
import os
import socket
import stat
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from megadiff.errors import PlatformError
from megadiff.supervision import process

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
