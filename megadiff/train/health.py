"""Whether a step's update is made, and when a run must end: decided from globally reduced numbers alone.

Every rank judges the same two numbers with the same state, so all decide alike without asking each other. The state is
a function of the run's steps and is saved with it: a resumed run judges as the uninterrupted one would.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from megadiff.data.batch_sizes import BatchSizes
from megadiff.errors import TrainingError
from megadiff.train.config import HealthConfig
from megadiff.train.culprits import Culprit
from megadiff.train.spikes import RollingFigure

log = logging.getLogger("megadiff")


@dataclass(frozen=True)
class Verdict:
    """What was made of a step."""

    skip: Literal["non_finite", "spike"] | None = None
    """Why no update is made; None where it is."""
    spikes: tuple[str, ...] = ()
    """Figures that stand out, in words."""


class Health:
    """Judges every step of a run and remembers what it must.

    Args:
        config: the run's.
        sizes: which samples a step took, for messages.
    """

    def __init__(self, config: HealthConfig, *, sizes: BatchSizes) -> None:
        self._config, self._sizes = config, sizes
        self._in_a_row = 0
        self._skipped = 0
        window = {"window": config.spike_window, "sigma": config.spike_sigma}
        self._figures = {name: RollingFigure(**window) for name in ("loss", "grad_norm")}

    @property
    def skipped(self) -> int:
        """Steps of the whole run that made no update."""
        return self._skipped

    def judge(self, loss: float, grad_norm: float) -> Verdict:
        """Whether the step with these figures may update the weights; remembers them. Once a step.

        Args:
            loss: mean over the step's whole batch.
            grad_norm: of the whole model, before clipping.
        """
        figures = {"loss": loss, "grad_norm": grad_norm}
        if not all(math.isfinite(value) for value in figures.values()):
            self._in_a_row += 1
            self._skipped += 1
            return Verdict("non_finite")
        self._in_a_row = 0
        found = {name: self._figures[name].spike(value) for name, value in figures.items()}
        for name, value in figures.items():
            self._figures[name].add(value)
        spikes = tuple(f"{name} {why}" for name, why in found.items() if why is not None)
        if not spikes or not self._config.skip_spikes:
            return Verdict(None, spikes)
        self._skipped += 1
        return Verdict("spike", spikes)

    def follow(self, step: int, verdict: Verdict, culprits: Sequence[Culprit] = ()) -> None:
        """Say what stood out in the step just taken, and end the run where it must.

        Args:
            step: steps taken, this one included.
            culprits: where something was not finite.

        Raises:
            TrainingError: `non_finite_limit` steps in a row were not finite.
        """
        first, end = self._sizes.samples_before(step - 1), self._sizes.samples_before(step)
        made = "no update was made" if verdict.skip else "the update was made"
        for spike in verdict.spikes:
            log.warning(f"step {step}: spike: {spike}; {made}; samples {first} to {end - 1}")
        if verdict.skip != "non_finite":
            return
        limit = self._config.non_finite_limit
        where = "; ".join(culprit.describe(first) for culprit in culprits) or "where is not known"
        log.warning(
            f"step {step}: loss or gradient not finite, no update was made ({self._in_a_row} in a row, the run ends at "
            f"{limit}); samples {first} to {end - 1}: {where}"
        )
        if self._in_a_row >= limit:
            raise TrainingError(self._end_of_run(step, where))

    def _end_of_run(self, step: int, where: str) -> str:
        first = self._sizes.samples_before(max(0, step - self._in_a_row))
        last = self._sizes.samples_before(step) - 1
        return (
            f"step {step}: loss or gradient not finite {self._in_a_row} steps in a row (health.non_finite_limit is "
            f"{self._config.non_finite_limit}); the weights are those before them. Their samples are {first} to "
            f"{last}; in the last step: {where}. Look at a step with tools/replay.py, lower optimizer.lr or set "
            "optimizer.clip_grad, and go on from an earlier checkpoint"
        )

    def state(self) -> dict[str, Any]:
        """What a checkpoint keeps: JSON of finite numbers, a few kilobytes."""
        figures = {name: figure.values for name, figure in self._figures.items()}
        return {"non_finite_in_a_row": self._in_a_row, "skipped": self._skipped, **figures}

    def restore(self, state: dict[str, Any]) -> None:
        """Take over what `state` gave; of an empty dict, a fresh start."""
        self._in_a_row = int(state.get("non_finite_in_a_row", 0))
        self._skipped = int(state.get("skipped", 0))
        for name, figure in self._figures.items():
            kept = state.get(name)
            figure.refill(kept if isinstance(kept, list) else ())
