"""Text that the model generates while it trains: `samples/step_XXXXXXXX.txt` in the run folder."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from megadiff.files import write_atomically
from megadiff.train.goodput import Goodput
from megadiff.train.hooks import Hook, Part, StepInfo

log = logging.getLogger("megadiff")


@dataclass
class SampleHook(Hook):
    """A file of sampled text before the first step, every `every` steps (0: never between), and after the last."""

    section: ClassVar[Part] = "eval"
    collectives: ClassVar[bool] = True
    every: int
    """Number of steps between samples; 0 for the first and the last alone."""
    steps: int
    """Number of steps of the whole run."""
    first_step: int
    """Number of steps taken before this process began."""
    sample: Callable[[], str]
    """Function that samples text; collective over the run."""
    folder: Path | None
    """The run folder; None on ranks other than the main one."""
    goodput: Goodput
    """Account of where the run's time goes."""

    def open(self) -> None:
        """Sample from the first weights, unless the run resumes."""
        if self.first_step == 0:
            self._run(0)

    def __call__(self, info: StepInfo) -> None:
        """Sample if due."""
        if (self.every and info.step % self.every == 0) or info.step == self.steps:
            self._run(info.step)

    def _run(self, step: int) -> None:
        """Write the file of this step; a disk that refuses costs the file and not the run."""
        with self.goodput.during("evaluate"):
            text = self.sample()
        if self.folder is None:
            return
        path = self.folder / "samples" / f"step_{step:08d}.txt"
        try:
            path.parent.mkdir(exist_ok=True)
            write_atomically(path, text.encode(errors="replace"), is_durable=False)
        except OSError as error:
            log.warning(f"step {step:>7}/{self.steps} | {path} was not written: {error.strerror or error}")
