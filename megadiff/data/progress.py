"""Progress of a long job on stderr: a bar on a terminal, an occasional plain line elsewhere."""

from __future__ import annotations

import sys
import time
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn

_LINE_EVERY_S = 10.0


class ProgressReport:
    """A progress report as a context manager; `update` may be called at any rate."""

    def __init__(self, what: str, total: int) -> None:
        self._what = what
        self._total = max(1, total)
        self._next_line_s = time.monotonic() + _LINE_EVERY_S
        columns = (TextColumn("{task.description}"), BarColumn(), TaskProgressColumn(), TimeRemainingColumn())
        self._bar = Progress(*columns, TextColumn("{task.fields[note]}"), console=Console(stderr=True))
        self._task = self._bar.add_task(what, total=self._total, note="")
        self._is_terminal = sys.stderr.isatty()

    def update(self, done: int, note: str) -> None:
        """Report the completed part of the total, and a note such as a speed."""
        if self._is_terminal:
            self._bar.update(self._task, completed=done, note=note)
        elif time.monotonic() >= self._next_line_s:
            self._next_line_s = time.monotonic() + _LINE_EVERY_S
            sys.stderr.write(f"{self._what}: {100 * min(1, done / self._total):.0f}% {note}\n")
            sys.stderr.flush()

    def __enter__(self) -> ProgressReport:
        if self._is_terminal:
            self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._is_terminal:
            self._bar.stop()
