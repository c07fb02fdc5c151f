"""The files to which a run writes its metrics during training."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from megadiff.errors import StorageError
from megadiff.run_config import RunConfig
from megadiff.train.board import Board
from megadiff.train.metrics import MetricsFile


@dataclass(frozen=True)
class RunFiles:
    """The open metrics files on the main rank; None on the others."""

    metrics: MetricsFile | None
    tensorboard: Any

    @classmethod
    def open(cls, config: RunConfig, first_step: int, *, is_main: bool) -> RunFiles:
        """Open the files of a run that resumes after `first_step`; later lines move to a file beside the metrics.

        Raises:
            StorageError: the run folder cannot be written.
        """
        if not is_main:
            return cls(None, None)
        try:
            board = Board(config.folder / "tensorboard", after_step=first_step) if config.log.tensorboard else None
            return cls(MetricsFile(config.folder / "metrics.jsonl", after_step=first_step), board)
        except OSError as error:
            raise StorageError(
                f"the run folder {config.folder} cannot be written ({error.strerror or error}); free space there, or "
                "set output_dir to another disk"
            ) from None

    def close(self) -> None:
        """Close the open files."""
        for file in (self.metrics, self.tensorboard):
            if file is not None:
                file.close()
