"""Text that the model generates while it trains: `samples/step_XXXXXXXX.txt` in the run folder."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from megadiff.files import write_atomically
from megadiff.train.hooks._periodic import PeriodicHook

log = logging.getLogger("megadiff")


@dataclass(kw_only=True)
class SampleHook(PeriodicHook):
    """A file of sampled text before the first step, every `every` steps (0: never between), and after the last."""

    sample: Callable[[], str]
    """Function that samples text; collective over the run."""
    folder: Path | None
    """The run folder; None on ranks other than the main one."""

    def run(self, step: int) -> None:
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
