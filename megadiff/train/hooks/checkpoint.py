"""Checkpoints: begun when due, completed some steps later, and not the end of a run if the disk is full."""

from __future__ import annotations

import logging
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import ClassVar

from megadiff.checkpoint.manifest import Manifest
from megadiff.checkpoint.save import AsyncCheckpointer, SaveResult
from megadiff.errors import StorageError
from megadiff.train.goodput import Goodput
from megadiff.train.hooks import Hook, MetricSinks, Part, StepInfo

log = logging.getLogger("megadiff")

MAX_FAILURES = 3
"""Number of failed consecutive saves that ends the run: it must not train for days without a checkpoint."""


class CheckpointHook(Hook):
    """A checkpoint every `every` steps and after the last. Its methods are collective over the run."""

    section: ClassVar[Part] = "save"
    collectives: ClassVar[bool] = True

    def __init__(
        self,
        checkpointer: AsyncCheckpointer,
        manifest: Callable[[int], Manifest],
        *,
        every: int,
        steps: int,
        in_background: bool,
        gathered: Callable[[], AbstractContextManager[None]],
        sinks: MetricSinks,
        goodput: Goodput,
        completed: Callable[[int], None] = lambda step: None,
    ) -> None:
        """Keep the parts; nothing is written yet.

        Args:
            checkpointer: writer of the files.
            manifest: function from a number of steps to the manifest of their checkpoint.
            every: number of steps between checkpoints.
            steps: number of steps of the whole run.
            in_background: whether training goes on while files are written.
            gathered: returns a context in which all weights are those of the last update.
            sinks: metric sinks, made durable before a checkpoint relies on them; empty on ranks other than the main.
            goodput: account of where the run's time goes.
            completed: called with the step of every checkpoint that is complete.
        """
        self.checkpointer, self.manifest = checkpointer, manifest
        self._every, self._steps, self._in_background = every, steps, in_background
        self._gathered, self._sinks, self._goodput = gathered, sinks, goodput
        self._completed = completed
        self._failures, self._error = 0, ""
        self.last_step: int | None = None
        """Step of the newest checkpoint that this process completed."""

    def __call__(self, info: StepInfo) -> None:
        """Complete the save under way if every rank has written its part; begin one if due.

        Raises:
            StorageError: the last step's checkpoint cannot be written, or several consecutive ones could not.
        """
        self._report(self.checkpointer.poll())
        if info.step == self._steps:
            self.save_now(info.step)
        elif info.step % self._every == 0:
            self._begin(info.step)

    def save_now(self, step: int) -> None:
        """Save this step and wait until it is complete; does nothing if it already is.

        Raises:
            StorageError: it cannot be written.
        """
        self._report(self.checkpointer.finish())
        if self.last_step == step:
            return
        self._begin(step)
        self._report(self.checkpointer.finish())
        if self.last_step != step:
            raise StorageError(
                f"{self._error}; step {step} could not be saved; free space, then run the same command again"
            )

    def _begin(self, step: int) -> None:
        self._report(self.checkpointer.finish())
        with self._gathered():
            # A resumed run never writes the lines before its checkpoint again, so they are made durable first.
            result = self.checkpointer.start(self.manifest(step), first=self._sinks.sync)
        self._report(result if self._in_background or result is not None else self.checkpointer.finish())

    def _report(self, result: SaveResult | None) -> None:
        """Count a save that has ended, and log it on the main rank.

        Raises:
            StorageError: too many consecutive saves have failed.
        """
        if result is None:
            return
        if result.error is None:
            self._failures, self.last_step = 0, result.step
            self._goodput.save_completed(result.seconds, stall_s=result.stall_s)
            self._goodput.write()
            self._completed(result.step)
            if self._sinks:
                log.info(
                    f"step {result.step:>7}/{self._steps} | saved {result.folder} in {result.seconds:.1f} s, "
                    f"training paused for {result.stall_s:.2f} s"
                )
            return
        self._goodput.spent("save_stall", result.stall_s)
        self._failures, self._error = self._failures + 1, result.error
        if self._failures >= MAX_FAILURES:
            raise StorageError(f"{result.error}; that is {MAX_FAILURES} consecutive saves, so the run ends")
        if self._sinks:
            log.warning(
                f"step {result.step:>7}/{self._steps} | NOT saved: {result.error}; training goes on, the next try is "
                f"{self._every} steps later"
            )
