"""What taking a step of a run again shows: its rows, the loss of each, and the whole beside what was logged."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from megadiff.data.rows import Origin
from megadiff.diffusion.noising import NoisedRows

_COMPARED = ("loss", "elbo", "grad_norm")


@dataclass(frozen=True)
class ReplayedRow:
    """One row of the step's batch."""

    sample: int
    """Global sample index."""
    origin: Origin
    log_snr: tuple[float, float]
    """Lowest and highest over the noisy tokens; NaN where there are none."""
    noisy_tokens: int
    loss: float
    """Mean per noisy token, nats; 0 where there are none."""
    elbo: float

    @property
    def is_finite(self) -> bool:
        """Whether both figures are."""
        return math.isfinite(self.loss) and math.isfinite(self.elbo)


@dataclass(frozen=True)
class Replayed:
    """A step taken again."""

    step: int
    start: str
    """Where the weights came from."""
    steps_between: int
    """Steps taken in memory before it."""
    rows: list[ReplayedRow]
    batch: NoisedRows
    """All rows of the step in the order of their samples, on the CPU."""
    loss_of_tokens: Tensor
    """[B, L] float32, nats; 0 at noise-free positions."""
    elbo_of_tokens: Tensor
    figures: dict[str, float]
    """`loss`, `elbo` and `grad_norm` of the whole batch."""
    logged: dict[str, Any] | None
    """The run's own line of this step in `metrics.jsonl`, if it has one."""
    skip: str | None
    """Why the run makes no update in this step; None where it does."""
    broken_row: int | None
    """Sample of the first row whose loss, or else whose gradient, is not finite."""

    def differences(self) -> dict[str, float | None]:
        """Relative difference from the logged figures; None where either is missing or not finite."""
        found: dict[str, float | None] = {}
        for key in _COMPARED:
            here, there = self.figures[key], (self.logged or {}).get(key)
            if there is None or not math.isfinite(here):
                found[key] = None
            else:
                found[key] = abs(here - there) / max(abs(there), 1e-30)
        return found

    def save(self, path: Path) -> None:
        """Write the batch and its per-token figures as a compressed `.npz`."""
        arrays: dict[str, Any] = {name: value.numpy() for name, value in self.batch._asdict().items()}
        arrays |= {"loss": self.loss_of_tokens.numpy(), "elbo": self.elbo_of_tokens.numpy()}
        with path.open("wb") as file:
            np.savez_compressed(file, samples=np.array([row.sample for row in self.rows]), **arrays)
