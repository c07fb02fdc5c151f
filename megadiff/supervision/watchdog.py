"""The rank's side of its watcher: sections with time limits, marks, and the report of its end."""

from __future__ import annotations

import contextlib
import faulthandler
import json
import logging
import os
import subprocess
import sys
import time
from dataclasses import asdict, astuple
from pathlib import Path
from types import TracebackType
from typing import Any

from megadiff.errors import HookError, MegadiffError
from megadiff.supervision.config import WatchdogConfig
from megadiff.supervision.first_cause import STACKS_SIGNAL, Records
from megadiff.supervision.heartbeat import ENDED, FAILED, NO_STEP, Heartbeat
from megadiff.supervision.launch import Launch, heartbeat_path, launcher_of_this_process
from megadiff.supervision.watcher import BOOTSTRAP, leave_node

log = logging.getLogger("megadiff")

_ROOT = Path(__file__).resolve().parents[2]
_MAX_SPAWNS = 4
_FAREWELL_S = 2.0


class Watchdog:
    """A monitor of this rank while the context is open.

    A rank that exceeds the limit of a section is reported with that section, its stacks are written, and it is killed,
    even when it is stopped or holds the interpreter lock. When another rank of the node dies, this one is ended two
    seconds later unless it notices by itself. Every rank of a launch opens a watchdog before its process group.
    """

    def __init__(self, config: WatchdogConfig, launch: Launch) -> None:
        """Store the settings; nothing is started yet."""
        self._config = config
        self._launch = launch
        self._limits = {kind: getattr(config, f"{kind}_s") for kind in ("setup", "step", "eval", "save")}
        self._beat = Heartbeat.unwatched(launch.rank)
        self._watcher: subprocess.Popen[bytes] | None = None
        self._spawns = 0
        self._step, self._index = NO_STEP, 0
        self._open: list[Section] = []
        self._raised: tuple[int, tuple[Any, ...]] = (0, ())
        self._is_failing = False
        self._pid = os.getpid()

    def start(self) -> None:
        """Start the watcher; do nothing if `watchdog.enabled` is false.

        Raises:
            PlatformError: the folder that the watcher shares with the rank cannot be created.
        """
        if not self._config.enabled:
            return
        self._pid = os.getpid()
        self._make_files()
        if self._launch.rank == 0:
            with contextlib.suppress(OSError):
                Records(self._launch.records, self._folder).clear()
        self._had_faulthandler = faulthandler.is_enabled()
        faulthandler.enable(self._dump, all_threads=True)
        faulthandler.register(STACKS_SIGNAL, self._dump, all_threads=True, chain=False)
        self._spawn()

    def stop(self) -> None:
        """Stop the watcher after a normal end and remove its files."""
        self._end(ENDED)

    def fail(self, reason: str, *, is_told: bool = False) -> None:
        """Report that this rank is about to exit because of `reason`.

        The other ranks' watchers report it and end ranks that hang because of it. The watcher of this rank stays until
        the process is gone.

        Args:
            is_told: whether the user sees the reason anyway; the watchers then repeat it only if other ranks hang
                because of it.
        """
        self._end(FAILED, reason, is_told=is_told)

    def failing(self, error: BaseException) -> None:
        """Report early that this rank ends because of `error`, since exiting may take long. Later calls do nothing."""
        if self._is_failing:
            return
        self._is_failing = True
        if self._raised[0] == id(error):
            self._beat.write(*self._raised[1])
        # A hook may fail on one rank alone, whose sentence nobody reads among many: it is reported as first cause too.
        is_told = isinstance(error, MegadiffError | SystemExit | KeyboardInterrupt) and not isinstance(error, HookError)
        self.fail(f"{type(error).__name__}: {error}", is_told=is_told)

    def section(self, kind: str, *, step: int = NO_STEP, limit_s: float | None = None) -> Section:
        """Return a timed part of the run: `with watchdog.section("step", step=17):`.

        The limit of the innermost section counts; on leaving it, the time of the outer one starts again.

        Args:
            kind: setup, step, eval or save, with the limit from the configuration; any short word if a limit is given.
            step: number of steps taken once this one is done.
            limit_s: limit in seconds that replaces the one from the configuration.
        """
        return Section(self, kind.encode(), step, self._limits[kind] if limit_s is None else limit_s)

    def mark(self, name: str) -> None:
        """Mark a position within the section, without restarting its limit. Costs a microsecond.

        Ranks that pass the same marks in the same order can be compared.
        """
        if self._open:
            self._index += 1
            self._open[-1].mark = name.encode()
            self._open[-1].write(self._beat, self._index)

    def beat(self) -> None:
        """Report progress inside a long section, which restarts its limit."""
        if self._open:
            self._open[-1].started = time.monotonic()
            self._open[-1].write(self._beat, self._index)

    def __enter__(self) -> Watchdog:
        self.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is None or (isinstance(error, SystemExit) and error.code in (None, 0)):
            self.stop()
        else:
            self.failing(error)

    def enter(self, section: Section) -> None:
        """Open a section; called by the section itself."""
        if self._watcher is not None and self._watcher.poll() is not None:
            self._replace_watcher()
        if section.step != self._step:
            self._step, self._index = section.step, -1
        self._index += 1
        self._open.append(section)
        section.write(self._beat, self._index)

    def leave(self, error: BaseException | None) -> None:
        """Close a section; called by the section itself.

        The innermost section that an exception came from is kept for the final report.
        """
        section = self._open.pop()
        if error is not None and self._raised[0] != id(error):  # only the id: a reference would keep tensors
            self._raised = id(error), (*section.place[:3], self._index, *section.place[3:])
        self._index += 1
        if self._open:
            self.beat()
        else:
            self._beat.write(0.0, 0.0, self._step, self._index, b"", b"")

    def _make_files(self) -> None:
        name = f"rank-{self._launch.rank:05d}.stacks"
        for is_last in (False, False, False, True):
            self._folder = self._launch.node_folder()
            try:
                self._beat = Heartbeat.create(heartbeat_path(self._folder, self._launch.rank), self._launch.rank)
                self._dump = open(self._folder / name, "wb", buffering=0)  # noqa: SIM115  closed at the end
                return
            except FileNotFoundError:  # the last rank of an earlier launch has just removed the folder
                if is_last:
                    raise

    def _spawn(self) -> None:
        self._spawns += 1
        launch = {**asdict(self._launch), "run_folder": str(self._launch.run_folder.absolute())}
        launcher = launcher_of_this_process()
        settings = json.dumps(
            {"launch": launch, "folder": str(self._folder), "launcher": astuple(launcher) if launcher else None}
        )
        self._watcher = subprocess.Popen(
            [sys.executable, "-I", "-S", "-c", BOOTSTRAP, str(_ROOT), settings],
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            start_new_session=True,  # signals to the rank's group must not reach its watcher
            cwd="/",
        )

    def _replace_watcher(self) -> None:
        """Start a new watcher after this one was killed, for example by the out-of-memory killer."""
        assert self._watcher is not None
        more = "another is started" if self._spawns < _MAX_SPAWNS else "the rank is no longer watched"
        log.warning(f"the watcher of rank {self._launch.rank} ended with {self._watcher.returncode}; {more}")
        self._watcher = None
        if self._spawns < _MAX_SPAWNS:
            self._spawn()

    def _end(self, life: int, reason: str = "", **facts: Any) -> None:
        """Write the final state and wake the watcher, so that it looks at once. A process forked by the rank does
        nothing."""
        if os.getpid() != self._pid:
            return
        self._beat.leave(life, reason, **facts)
        watcher, self._watcher = self._watcher, None
        if watcher is None:
            return
        assert watcher.stdin is not None
        with contextlib.suppress(OSError):
            watcher.stdin.write(b".")
            watcher.stdin.flush()
        if life != ENDED:
            return
        with contextlib.suppress(subprocess.TimeoutExpired):
            watcher.wait(_FAREWELL_S)
        watcher.stdin.close()
        faulthandler.unregister(STACKS_SIGNAL)
        faulthandler.disable()
        if self._had_faulthandler:
            faulthandler.enable()
        self._dump.close()
        leave_node(self._folder, self._launch.rank, is_well=True)  # in case the watcher was killed


class Section:
    """A timed part of the run; created by `Watchdog.section`."""

    __slots__ = ("_watchdog", "kind", "limit_s", "mark", "started", "step")

    def __init__(self, watchdog: Watchdog, kind: bytes, step: int, limit_s: float) -> None:
        self._watchdog = watchdog
        self.kind, self.step, self.limit_s = kind, step, limit_s
        self.mark, self.started = b"", 0.0

    @property
    def place(self) -> tuple[float, float, int, bytes, bytes]:
        """Start, limit, step, name and mark."""
        return self.started, self.limit_s, self.step, self.kind, self.mark

    def write(self, beat: Heartbeat, index: int) -> None:
        """Write this section to the heartbeat."""
        beat.write(self.started, self.limit_s, self.step, index, self.kind, self.mark)

    def __enter__(self) -> Section:
        self.started = time.monotonic()
        self._watchdog.enter(self)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._watchdog.leave(error)
