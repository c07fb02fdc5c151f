"""A run's folder and its log: made, locked against a second process, written to by the main rank."""

from __future__ import annotations

import logging
import sys
from collections.abc import Iterator
from contextlib import contextmanager

from filelock import FileLock, Timeout

from megadiff.config.load import dump_config
from megadiff.errors import ConfigError
from megadiff.parallel.topology import is_main_process
from megadiff.run_config import RunConfig

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
    temporary.write_text(dump_config(config), encoding="utf-8")
    temporary.replace(config.folder / "config.yaml")
