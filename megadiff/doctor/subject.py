"""The machine to examine, and the run that is to be trained on it."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

from megadiff.run.config import RunConfig

if TYPE_CHECKING:  # a broken torch must hurt only the checks that need it
    from megadiff.data.tokenizers import Tokenizer
    from megadiff.platform.machine import Platform


@dataclass(frozen=True)
class Subject:
    """Inputs of the checks; expensive values are cached."""

    environment: Mapping[str, str]
    """Environment of the process, including the variables of the launcher and the scheduler."""
    config: RunConfig | None = None
    """Configuration of the run; None if none was given or it cannot be read."""
    problem: str | None = None
    """Reason why the run description cannot be read."""
    wanted_ranks: int | None = None
    """Number of ranks of the run on all nodes, if the user gave it; otherwise the launcher's or the scheduler's
    counts."""
    now: Callable[[], float] = time.time
    """Clock of this machine, seconds since 1970."""
    shared_memory: Path = Path("/dev/shm")
    """Folder of the memory that processes of a node share."""

    @property
    def nodes(self) -> int:
        """Number of nodes of the job according to SLURM; 1 without it."""
        return self._number("SLURM_JOB_NUM_NODES") or self._number("SLURM_NNODES") or 1

    @property
    def ranks(self) -> int:
        """Number of ranks of the run."""
        return self.wanted_ranks or self._number("WORLD_SIZE") or self._number("SLURM_NTASKS") or 1

    @property
    def local_ranks(self) -> int:
        """Number of ranks on this node."""
        return -(-self.ranks // self.nodes)

    @cached_property
    def platform(self) -> Platform:
        """The machine; reading it raises `PlatformError` if the run requires another one."""
        from megadiff.platform.machine import detect

        if self.config is None:
            return detect(layers="auto")
        return detect(self.config.platform, layers=self.config.wanted_transformer_impl)

    @cached_property
    def tokenizer(self) -> Tokenizer | None:
        """The run's tokenizer, None without a run; reading it raises `DataError` if it cannot be loaded."""
        from megadiff.data.tokenizer_files import load_tokenizer

        return load_tokenizer(self.config.data.tokenizer) if self.config is not None else None

    @cached_property
    def vocab_size(self) -> int | None:
        """Number of token ids including the mask: the tokenizer's, or the one in the run description; None without
        either."""
        if self.config is None:
            return None
        if self.config.data.vocab_size is not None:
            return self.config.data.vocab_size
        from megadiff.errors import DataError

        try:
            return self.tokenizer.vocab_size if self.tokenizer is not None else None
        except DataError:
            return None  # reported by the check of the tokenizer

    @cached_property
    def existing_folder(self) -> Path:
        """Run folder, or the nearest existing folder above it; the working folder without a run."""
        if self.config is None:
            return Path.cwd()
        wanted = self.config.folder.absolute()
        return next(folder for folder in (wanted, *wanted.parents) if folder.exists())

    def _number(self, variable: str) -> int | None:
        text = self.environment.get(variable, "")
        return int(text) if text.isdecimal() and int(text) > 0 else None
