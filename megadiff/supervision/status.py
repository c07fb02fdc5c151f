"""State of a run in `RUN/status.json`, for scripts that decide whether to start it again."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import socket
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields, replace
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from megadiff.files import is_storage_failure, read_json_object, write_atomically

RUNNING, STOPPED, FINISHED, FAILED, NO_RESTART = "running", "stopped", "finished", "failed", "no_restart"
STATES = (RUNNING, STOPPED, FINISHED, FAILED, NO_RESTART)
_NAME = "status.json"
_RESERVE, _RESERVE_BYTES = ".status.reserve", 16384
_MAX_BYTES, _MAX_NUMBER = 2**20, 10**15


@dataclass(frozen=True)
class Status:
    """The state of a run. `running` after its processes are gone means that they were killed without warning."""

    state: str
    """State of the run: running, stopped (on request; can be resumed), finished, failed (may be restarted) or
    no_restart (must not be)."""
    step: int
    """Number of steps taken."""
    steps: int
    """Number of steps of the whole schedule."""
    reason: str
    exit_code: int | None
    """Exit code of the main rank; None while it runs."""
    job: str | None
    """SLURM_JOB_ID, or None outside SLURM."""
    attempt: int
    """SLURM_RESTART_COUNT, or 0."""
    host: str
    time: str
    """Time at which this was written, ISO 8601, UTC."""
    launch: str = ""
    """Key of the launch that wrote this (`megadiff.supervision.launch`)."""
    saved_step: int = 0
    """Step of the newest checkpoint known to be complete; 0 for none."""

    def __post_init__(self) -> None:
        assert self.state in STATES, self.state

    @property
    def step_of_checkpoint(self) -> int:
        """Newest step that must have a checkpoint; 0 for none. A run that ended normally has one of its last step."""
        return max(self.saved_step, self.step if self.state in (STOPPED, FINISHED) else 0)

    @classmethod
    def now(
        cls,
        state: str,
        *,
        step: int,
        steps: int,
        reason: str = "",
        exit_code: int | None = None,
        launch: str = "",
        saved_step: int = 0,
        environ: Mapping[str, str] = os.environ,
    ) -> Status:
        """Return a status with this moment's time, this host and this SLURM job."""
        attempt = environ.get("SLURM_RESTART_COUNT", "")
        return cls(
            state=state,
            step=step,
            steps=steps,
            reason=reason,
            exit_code=exit_code,
            job=environ.get("SLURM_JOB_ID"),
            attempt=int(attempt) if attempt.isdecimal() else 0,
            host=socket.gethostname(),
            time=_utc_now(),
            launch=launch,
            saved_step=saved_step,
        )

    def changed(self, state: str, *, reason: str, exit_code: int | None) -> Status:
        """Return the same run, step, job and host in another state, as of now."""
        return replace(self, state=state, reason=reason, exit_code=exit_code, time=_utc_now())


def write_status(run_folder: Path, status: Status) -> None:
    """Replace the run's status; readers see either the old or the new one, also after a crash of the machine.

    On a full disk it is written into space that an earlier call has reserved.

    Raises:
        OSError: the disk cannot be written, and there is no reserve.
    """
    text = (json.dumps(asdict(status), indent=1) + "\n").encode()
    try:
        write_atomically(run_folder / _NAME, text)
    except OSError as error:
        if not is_storage_failure(error):
            raise
        try:
            _write_into_reserve(run_folder, text)
        except OSError:
            raise error from None
    _keep_reserve(run_folder)


def read_status(run_folder: Path) -> Status | None:
    """Return the run's status; None if there is none or the file is not a valid one."""
    try:
        found = _known(read_json_object(run_folder / _NAME, max_bytes=_MAX_BYTES))
        return Status(**found) if found.get("state") in STATES else None
    except (OSError, ValueError, TypeError):
        return None


def record_failure(run_folder: Path, reason: str, *, exit_code: int, launch: str, step: int = 0) -> bool:
    """Change the `running` status of this launch to `failed`; return whether that was done.

    The status of another launch and an end that is already recorded are left alone: the first cause counts.

    Args:
        step: steps taken by then, if that is known.
    """
    found = read_status(run_folder)
    if found is None or found.state != RUNNING or found.launch != launch:
        return False
    further = replace(found, step=max(found.step, step))
    write_status(run_folder, further.changed(FAILED, reason=reason, exit_code=exit_code))
    return True


def _keep_reserve(run_folder: Path) -> None:
    """Reserve disk space for the next status, because the most important one is written when the disk is full."""
    path = run_folder / _RESERVE
    with contextlib.suppress(OSError):
        if not path.is_symlink() and path.is_file() and path.stat().st_size == _RESERVE_BYTES:
            return
        write_atomically(path, b" " * _RESERVE_BYTES)


def _write_into_reserve(run_folder: Path, text: bytes) -> None:
    """Write the status into the reserve file, whose space is already allocated, and rename that.

    Raises:
        OSError: there is no reserve, or it cannot be written either.
    """
    path = run_folder / _RESERVE
    handle = os.open(path, os.O_WRONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
    try:
        if os.write(handle, text) != len(text):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        os.ftruncate(handle, len(text))
        os.fsync(handle)
    finally:
        os.close(handle)
    os.replace(path, run_folder / _NAME)


def _known(found: dict[str, Any]) -> dict[str, Any]:
    """Return those entries of a JSON object that are fields of a status.

    Raises:
        ValueError: an entry has the wrong type, or is a number that no run can have.
    """
    known = {}
    for field in fields(Status):
        if field.name not in found:
            continue
        value = found[field.name]
        is_number = type(value) is int and abs(value) < _MAX_NUMBER
        is_text = isinstance(value, str) and "int" not in str(field.type)
        is_absent = value is None and "None" in str(field.type)
        if not (is_text or is_absent or (is_number and "int" in str(field.type))):
            raise ValueError(f"{field.name} cannot be {type(value).__name__}")
        known[field.name] = value
    return known


def _utc_now() -> str:
    return datetime.now(timezone.utc).isoformat(timespec="seconds")
