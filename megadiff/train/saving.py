"""The hook that saves: begins a checkpoint when one is due, completes it some steps later, and survives a full disk."""

from __future__ import annotations

import logging
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import ClassVar

from megadiff.checkpoint.manifest import Manifest
from megadiff.checkpoint.save import Outcome, Saver
from megadiff.errors import StorageError
from megadiff.train.goodput import Goodput
from megadiff.train.hooks import Part, StepResult
from megadiff.train.metrics import MetricsFile

log = logging.getLogger("megadiff")

MAX_FAILURES = 3
"""Saves that may fail one after the other before the run ends: it must not train for days with nothing to show."""


class Saves:
    """A checkpoint every `every` steps and after the last. Every rank calls it; its methods are collective."""

    section: ClassVar[Part] = "save"

    def __init__(
        self,
        saver: Saver,
        manifest: Callable[[int], Manifest],
        *,
        every: int,
        steps: int,
        in_background: bool,
        gathered: Callable[[], AbstractContextManager[None]],
        metrics: MetricsFile | None,
        goodput: Goodput,
        completed: Callable[[int], None] = lambda step: None,
    ) -> None:
        """Take the manifest of a step, and a context in which all weights are those of the last update.

        Args:
            completed: called with the step of every checkpoint that is complete.
        """
        self._completed = completed
        self.saver, self.manifest = saver, manifest
        self._every, self._steps, self._in_background = every, steps, in_background
        self._gathered, self._metrics, self._goodput = gathered, metrics, goodput
        self._failures, self._error = 0, ""
        self.last_step: int | None = None
        """Step of the newest checkpoint this process completed."""

    def __call__(self, result: StepResult) -> None:
        """Complete the save under way if every rank has written; begin one if due.

        Raises:
            StorageError: the last step's checkpoint cannot be written, or several in a row could not.
        """
        self._take(self.saver.poll())
        if result.step == self._steps:
            self.save_now(result.step)
        elif result.step % self._every == 0:
            self._begin(result.step)

    def save_now(self, step: int) -> None:
        """Save this step and wait until it is complete; does nothing if it already is.

        Raises:
            StorageError: it cannot be written.
        """
        self._take(self.saver.finish())
        if self.last_step == step:
            return
        self._begin(step)
        self._take(self.saver.finish())
        if self.last_step != step:
            raise StorageError(f"{self._error}; step {step} could not be saved; free space, then run this again")

    def _begin(self, step: int) -> None:
        self._take(self.saver.finish())
        with self._gathered():
            outcome = self.saver.start(self.manifest(step), first=self._sync_metrics)
        self._take(outcome if self._in_background or outcome is not None else self.saver.finish())

    def _sync_metrics(self) -> None:
        """A run that resumes from a checkpoint never writes the lines before it again, so they come first."""
        if self._metrics is not None:
            self._metrics.sync()

    def _take(self, outcome: Outcome | None) -> None:
        """Say how a save ended."""
        if outcome is None:
            return
        if outcome.error is None:
            self._failures, self.last_step = 0, outcome.step
            self._goodput.save_completed(outcome.seconds, stall_s=outcome.stall_s)
            self._goodput.write()
            self._completed(outcome.step)
            if self._metrics is not None:
                log.info(
                    f"step {outcome.step:>7}/{self._steps} | saved {outcome.folder} in {outcome.seconds:.1f} s, "
                    f"training stood for {outcome.stall_s:.2f} s"
                )
            return
        self._goodput.spent("save_stall", outcome.stall_s)
        self._failures, self._error = self._failures + 1, outcome.error
        if self._failures >= MAX_FAILURES:
            raise StorageError(f"{outcome.error}; that is {MAX_FAILURES} saves in a row, so the run ends")
        if self._metrics is not None:
            log.warning(
                f"step {outcome.step:>7}/{self._steps} | NOT saved: {outcome.error}; training goes on, the next try is "
                f"{self._every} steps later"
            )
