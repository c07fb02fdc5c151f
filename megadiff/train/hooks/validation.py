"""Validation: the fixed-noise bound on held-out sequences."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar, Protocol

from megadiff.train.goodput import Goodput
from megadiff.train.hooks import Hook, MetricSinks, Part, StepInfo

log = logging.getLogger("megadiff")


class Measurement(Protocol):
    """The result of an evaluation."""

    @property
    def elbo(self) -> float:
        """The bound in nats per token."""
        ...

    def as_metrics(self) -> dict[str, Any]:
        """Return the keys and values of an evaluation line."""
        ...

    def describe(self) -> str:
        """Return the text for the console."""
        ...


@dataclass
class ValidationHook(Hook):
    """The held-out bound before the first step, every `every` steps (0: never between), and after the last."""

    section: ClassVar[Part] = "eval"
    collectives: ClassVar[bool] = True
    every: int
    """Number of steps between evaluations; 0 for the first and the last alone."""
    steps: int
    """Number of steps of the whole run."""
    first_step: int
    """Number of steps taken before this process began."""
    evaluate: Callable[[], Measurement]
    """Function that measures the bound; collective over the run."""
    sinks: MetricSinks
    """Sinks of the lines; empty on ranks other than the main one."""
    goodput: Goodput
    """Account of where the run's time goes."""
    baselines: Mapping[str, float] = field(default_factory=dict)
    """Keys and values that every evaluation line has beside the measurement's: figures to compare it with."""

    def open(self) -> None:
        """Measure the first weights, unless the run resumes."""
        if self.first_step == 0:
            self._run(0)

    def __call__(self, info: StepInfo) -> None:
        """Measure if due."""
        if (self.every and info.step % self.every == 0) or info.step == self.steps:
            self._run(info.step)

    def _run(self, step: int) -> None:
        with self.goodput.during("evaluate"):
            found = self.evaluate()
        if self.sinks:
            self.sinks.write({"step": step, **found.as_metrics(), **self.baselines}, step)
            log.info(f"step {step:>7}/{self.steps} | {found.describe()}")
