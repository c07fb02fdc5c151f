"""Validation: the fixed-noise bound on held-out sequences."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

from megadiff.scaling.paired import PerSequence
from megadiff.train.hooks import MetricSinks
from megadiff.train.hooks._periodic import PeriodicHook
from megadiff.train.hooks.per_sequence_file import PerSequenceFile

log = logging.getLogger("megadiff")


class Measurement(Protocol):
    """The result of an evaluation."""

    @property
    def elbo(self) -> float:
        """The bound in nats per token."""
        ...

    @property
    def per_sequence(self) -> PerSequence:
        """The bound of every sequence."""
        ...

    def as_metrics(self) -> dict[str, Any]:
        """Return the keys and values of an evaluation line."""
        ...

    def describe(self) -> str:
        """Return the text for the console."""
        ...


@dataclass(kw_only=True)
class ValidationHook(PeriodicHook):
    """The held-out bound at the steps of a `PeriodicHook`."""

    evaluate: Callable[[], Measurement]
    """Function that measures the bound; collective over the run."""
    sinks: MetricSinks
    """Sinks of the lines; empty on ranks other than the main one."""
    per_sequence: PerSequenceFile | None = None
    """File that keeps the bound of every sequence; None on ranks other than the main one."""
    baselines: Mapping[str, float] = field(default_factory=dict)
    """Keys and values that every evaluation line has beside the measurement's: figures to compare it with."""

    def run(self, step: int) -> None:
        """Measure, and write the line of this step."""
        with self.goodput.during("evaluate"):
            found = self.evaluate()
        if self.sinks:
            self.sinks.write({"step": step, **found.as_metrics(), **self.baselines}, step)
            if self.per_sequence is not None:
                self.per_sequence.add(step, found.per_sequence)
            log.info(f"step {step:>7}/{self.steps} | {found.describe()}")
