"""A run's folder, log and status: made, locked against a second process, written to by the main rank."""

from __future__ import annotations

import logging
import sys
from collections.abc import Iterator
from contextlib import contextmanager

from filelock import FileLock, Timeout

from megadiff.config.load import dump_config
from megadiff.data.facts import NAME as DATA_FACTS
from megadiff.data.facts import DataFacts, write_data_facts
from megadiff.errors import ConfigError, MegadiffError, ShortageError, StorageError
from megadiff.parallel.topology import is_main_process
from megadiff.run_config import RunConfig
from megadiff.supervision.launch import Launch
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
from megadiff.train.loop import Ending

log = logging.getLogger("megadiff")


def log_to_console() -> None:
    """The main rank speaks; the others only warn."""
    handler = logging.StreamHandler(sys.stdout)
    handler.setFormatter(logging.Formatter("%(message)s"))
    log.handlers[:] = [handler]
    log.propagate = False
    log.setLevel(logging.INFO if is_main_process() else logging.WARNING)


@contextmanager
def run_folder(config: RunConfig) -> Iterator[None]:
    """On the main rank: make and lock the run folder, copy the log to `log.txt`.

    Raises:
        ConfigError: the folder cannot be written, or another process trains in it.
    """
    if not is_main_process():
        yield
        return
    folder = config.folder
    lock = FileLock(folder / ".lock", timeout=0)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock.acquire()
        handler = logging.FileHandler(folder / "log.txt", encoding="utf-8")
    except Timeout:
        raise ConfigError(
            f"another process trains in {folder} (it holds {folder / '.lock'}); give this run another `name`"
        ) from None
    except OSError as error:
        raise ConfigError(
            f"the run folder {folder} cannot be written ({error.strerror or error}); set output_dir to a folder you "
            "can write to"
        ) from None
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
    log.addHandler(handler)
    try:
        yield
    finally:
        log.removeHandler(handler)
        handler.close()
        lock.release()


def write_config(config: RunConfig) -> None:
    """Write the resolved tree as `config.yaml`; once the run is known to go on, so a refused start changes nothing."""
    temporary = config.folder / ".config.yaml.tmp"
    try:
        temporary.write_text(dump_config(config), encoding="utf-8")
        temporary.replace(config.folder / "config.yaml")
    except OSError as error:
        raise ConfigError(
            f"{config.folder / 'config.yaml'} cannot be written ({error.strerror or error}); free space there, or set "
            "output_dir to another disk"
        ) from None


def write_facts(config: RunConfig, facts: DataFacts) -> None:
    """Write what is known of the run's data as `data.json`; a disk that refuses costs the file and not the run."""
    try:
        write_data_facts(config.folder, facts)
    except OSError as error:
        log.warning(f"{config.folder / DATA_FACTS} was not written: {error.strerror or error}")


class Standing:
    """Keeps `status.json` on the main rank: running, then how it ended, whatever ends it but SIGKILL."""

    def __init__(self, config: RunConfig, launch: Launch) -> None:
        """Nothing is written before the run is known to go on, or refused."""
        self._folder, self._steps, self._launch = config.folder, config.steps, launch.key
        self._are_others_watched = launch.world_size > 1 and config.watchdog.enabled
        before = read_status(self._folder)
        self._step = before.step if before is not None else 0
        self._has_ended = False

    def running(self, step: int) -> None:
        """The run goes on after `step` steps."""
        self._step = step
        self._write(RUNNING)

    def ended(self, ending: Ending) -> None:
        """The run came to an end of its own."""
        self._step, self._has_ended = ending.step, True
        self._write(FINISHED if ending.stopped is None else STOPPED, reason=ending.stopped or "", exit_code=0)

    def failing(self, error: BaseException, step: int | None = None) -> None:
        """The run ends for this error, after `step` steps. The first one told counts.

        A user's mistake, and a run that is no longer finite, must not be tried again; the rest may. What is raised here
        may be the effect of another rank's end: where there are others, the watchers find the cause and write it.
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
            state, step=self._step, steps=self._steps, reason=reason, exit_code=exit_code, launch=self._launch
        )
        try:
            write_status(self._folder, status)
        except OSError as error:
            log.warning(f"{self._folder / 'status.json'} cannot be written ({error.strerror or error})")
