"""A run's folder, log and status: created and locked against a second process, and written by the main rank.

`Supervision` groups the parts that supervise the run during training.
"""

from __future__ import annotations

import contextlib
import logging
import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TextIO

from filelock import FileLock, Timeout

from megadiff.config.load import dump_config
from megadiff.data.facts import NAME as DATA_FACTS
from megadiff.data.facts import DataFacts, write_data_facts
from megadiff.errors import ConfigError, MegadiffError, ShortageError, StorageError
from megadiff.files import AppendedFile, clear_temporaries, is_storage_failure, write_atomically
from megadiff.parallel.topology import is_main_process, rank_from_environment, world_size_from_environment
from megadiff.run.config import RunConfig
from megadiff.supervision.config import WatchdogConfig
from megadiff.supervision.launch import Holder, Launch
from megadiff.supervision.status import (
    FAILED,
    FINISHED,
    NO_RESTART,
    RUNNING,
    STOPPED,
    Status,
    read_status,
    write_status,
)
from megadiff.supervision.stopping import StopRequest
from megadiff.supervision.watchdog import Watchdog
from megadiff.train.goodput import Goodput
from megadiff.train.loop import TrainResult

log = logging.getLogger("megadiff")

_LEAVING_S, _LOOK_EVERY_S = 10.0, 0.1
"""Seconds to wait for the processes of a launch whose launcher is gone, and seconds between attempts."""


def log_to_console() -> None:
    """Log to stdout: everything on the main rank, only warnings on the others."""
    handler = _ConsoleHandler(sys.stdout)
    handler.setFormatter(logging.Formatter("%(message)s"))
    log.handlers[:] = [handler]
    log.propagate = False
    log.setLevel(logging.INFO if is_main_process() else logging.WARNING)


class _ConsoleHandler(logging.StreamHandler[TextIO]):
    """Stdout, which may itself be a file on a full disk: only the lines that it refuses are lost."""

    def emit(self, record: logging.LogRecord) -> None:
        """Write a line bypassing the stream's buffer, in which a refused line would stay and fail again at exit."""
        text = self.format(record) + self.terminator
        with contextlib.suppress(OSError):
            self.stream.flush()
            try:
                handle = self.stream.fileno()
            except (OSError, AttributeError):  # a stream that is not a file
                self.stream.write(text)
            else:
                os.write(handle, text.encode(self.stream.encoding or "utf-8", "replace"))


class _RunLog(logging.Handler):
    """Handler of `log.txt`: up to a megabyte of lines that a full disk refuses is kept and written later."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self._file = AppendedFile(path, most_waiting=2**20)

    def emit(self, record: logging.LogRecord) -> None:
        """Append a line."""
        self._file.append(f"{self.format(record)}\n".encode(errors="replace"))

    def close(self) -> None:
        """Write the waiting lines, if there is space now, and close the file."""
        self._file.close()
        super().close()


@contextmanager
def run_folder(config: RunConfig) -> Iterator[None]:
    """Create and lock the run folder on the main rank, and copy the log to `log.txt`.

    Raises:
        ConfigError: the folder cannot be written, or another process trains in it.
        StorageError: its disk is full or failing.
    """
    if not is_main_process():
        yield
        return
    folder = config.folder
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = _locked(folder)
    except OSError as error:
        raise _unwritable(f"the run folder {folder}", error) from None
    handler = _RunLog(folder / "log.txt")
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
    log.addHandler(handler)
    try:
        clear_temporaries(folder)
        yield
    finally:
        log.removeHandler(handler)
        handler.close()
        Holder.remove(folder)
        lock.release()


def _locked(folder: Path) -> FileLock:
    """Lock the folder; wait for a holder that is about to exit because its launcher is gone.

    Raises:
        ConfigError: another process trains there.
        OSError: the disk refuses.
    """
    lock = FileLock(folder / ".lock", timeout=0)
    until, has_said = time.monotonic() + _LEAVING_S, False
    while True:
        try:
            lock.acquire()
            break
        except Timeout:
            holder = Holder.read(folder)
            if holder is not None and holder.is_leaving and time.monotonic() < until:
                if not has_said:
                    log.info(f"waiting for an earlier launch to leave {folder}: {holder.describe()}")
                has_said = True
                time.sleep(_LOOK_EVERY_S)
                continue
        who = holder.describe() if holder is not None else f"`fuser {folder / '.lock'}` on its machine names it"
        raise ConfigError(
            f"another process trains in {folder} (it holds {folder / '.lock'}): {who}; stop it or wait for its end, "
            "or give this run another `name`"
        )
    Holder.this_process().write(folder)
    return lock


def _unwritable(what: str, error: OSError) -> MegadiffError:
    """Return the error for a run folder, or a file in it, that cannot be written; a full disk is worth a retry."""
    reason = error.strerror or error
    if is_storage_failure(error):
        return StorageError(f"{what} cannot be written ({reason}); free space there, then run the same command again")
    return ConfigError(f"{what} cannot be written ({reason}); set output_dir to a folder you can write to")


def write_config(config: RunConfig) -> None:
    """Write the resolved configuration as `config.yaml`; called once the run may proceed, so a refusal changes nothing.

    Raises:
        ConfigError, StorageError: it cannot be written.
    """
    path = config.folder / "config.yaml"
    try:
        write_atomically(path, dump_config(config))
    except OSError as error:
        raise _unwritable(str(path), error) from None


def write_facts(config: RunConfig, facts: DataFacts) -> None:
    """Write the facts about the run's data as `data.json`; a write error loses the file but does not end the run."""
    try:
        write_data_facts(config.folder, facts)
    except OSError as error:
        log.warning(f"{config.folder / DATA_FACTS} was not written: {error.strerror or error}")


class StatusWriter:
    """Writer of `status.json` on the main rank: running, then how the run ended, unless SIGKILL ended it."""

    def __init__(self, config: RunConfig, launch: Launch) -> None:
        """Read the earlier status; nothing is written before the run is known to proceed or to be refused."""
        self._folder, self._steps, self._launch = config.folder, config.steps, launch.key
        self._are_others_watched = launch.world_size > 1 and config.watchdog.enabled
        before = read_status(self._folder)
        self._step = before.step if before is not None else 0
        self._saved_step = before.step_of_checkpoint if before is not None else 0
        self._has_ended = False

    def running(self, step: int) -> None:
        """Record that the run continues after `step` steps."""
        self._step = step
        self._write(RUNNING)

    def saved(self, step: int) -> None:
        """Record a checkpoint of this step, and everything else that has not been written to the status yet."""
        if self._has_ended:
            return
        self._step = self._saved_step = step
        self._write(RUNNING)

    def ended(self, result: TrainResult) -> None:
        """Write that the run finished, or stopped on request."""
        self._step, self._has_ended = result.step, True
        self._write(FINISHED if result.stopped is None else STOPPED, reason=result.stopped or "", exit_code=0)

    def failing(self, error: BaseException, step: int | None = None) -> None:
        """Record that the run ends with this error, after `step` steps. Only the first error counts.

        A user's mistake, and a loss that is no longer finite, must not be retried; other errors may. An error raised
        here may be a consequence of another rank's exit: with several ranks, the watchers find the cause and write it.
        """
        if self._has_ended:
            return
        self._step = self._step if step is None else step
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        if isinstance(error, MegadiffError):
            state = FAILED if isinstance(error, (StorageError, ShortageError)) else NO_RESTART
            self._write(state, reason=reason, exit_code=error.exit_code)
        elif self._are_others_watched:
            return
        else:
            self._write(FAILED, reason=f"{type(error).__name__}: {reason}", exit_code=1)
        self._has_ended = True

    def _write(self, state: str, *, reason: str = "", exit_code: int | None = None) -> None:
        if not is_main_process():
            return
        status = Status.now(
            state,
            step=self._step,
            steps=self._steps,
            reason=reason,
            exit_code=exit_code,
            launch=self._launch,
            saved_step=self._saved_step,
        )
        try:
            write_status(self._folder, status)
        except OSError as error:
            log.warning(f"{self._folder / 'status.json'} cannot be written ({error.strerror or error})")


def goodput_of(config: RunConfig, *, is_kept: bool = True, before_s: float = 0.0) -> Goodput:
    """Return the account of how the run spends its time; the main rank writes it to `goodput.json` if `is_kept`."""
    path = config.folder / "goodput.json" if is_kept and is_main_process() else None
    return Goodput(path, config.goodput, save_every=config.checkpoint.every, before_s=before_s)


@dataclass(frozen=True)
class Supervision:
    """The parts that supervise a run during training."""

    watchdog: Watchdog
    stop: StopRequest | None
    """Source of stop requests; None if nobody may stop this run."""
    goodput: Goodput
    failing: Callable[[BaseException, int], None] = lambda error, step: None
    """Called with the error that ends the run, and the number of steps taken by then."""
    saved: Callable[[int], None] = lambda step: None
    """Called with the step of every complete checkpoint."""

    @classmethod
    def none(cls, config: RunConfig) -> Supervision:
        """Return the supervision of a run that another program supervises: none of its own."""
        launch = Launch.from_env(config.folder, rank=rank_from_environment(), world_size=world_size_from_environment())
        return cls(Watchdog(WatchdogConfig(enabled=False), launch), None, goodput_of(config, is_kept=False))
