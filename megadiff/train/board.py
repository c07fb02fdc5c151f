"""TensorBoard's curves, as long as the disk takes them."""

from __future__ import annotations

import logging
from pathlib import Path

log = logging.getLogger("megadiff")


class Board:
    """A `SummaryWriter` that a full disk silences instead of ending the run: the figures are in `metrics.jsonl` too."""

    def __init__(self, folder: Path, *, after_step: int) -> None:
        """Opens `folder`; what an earlier attempt wrote there of later steps is hidden."""
        from torch.utils.tensorboard import SummaryWriter

        self._folder = folder
        self._writer: SummaryWriter | None = SummaryWriter(str(folder), purge_step=after_step + 1)

    def add_scalar(self, tag: str, value: float, step: int) -> None:
        """One point of a curve."""
        if self._writer is None:
            return
        try:
            self._writer.add_scalar(tag, value, step)
        except OSError as error:
            self._give_up(error)

    def close(self) -> None:
        """Write what is left."""
        if self._writer is None:
            return
        try:
            self._writer.close()
        except OSError as error:
            self._give_up(error)

    def _give_up(self, error: OSError) -> None:
        self._writer = None
        log.warning(f"{self._folder} cannot be written ({error.strerror or error}); training goes on without it")
