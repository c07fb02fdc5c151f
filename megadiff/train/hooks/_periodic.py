"""Hooks that measure the model before the first step, every few steps, at given steps, and after the last."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar

from megadiff.train.goodput import Goodput
from megadiff.train.hooks import Hook, Part, StepInfo


@dataclass(kw_only=True)
class PeriodicHook(Hook, ABC):
    """A hook that runs before the first step, every `every` steps, at some more, and after the last.

    It is collective over the run.
    """

    section: ClassVar[Part] = "eval"
    collectives: ClassVar[bool] = True
    every: int
    """Number of steps between calls of `run`; 0 for no regular ones."""
    at_steps: frozenset[int] = frozenset()
    """Further steps after which `run` is called."""
    steps: int
    """Number of steps of the whole run."""
    first_step: int
    """Number of steps taken before this process began."""
    goodput: Goodput
    """RankReport of where the run's time goes."""

    @abstractmethod
    def run(self, step: int) -> None:
        """Do the hook's work on the model after `step` steps."""

    def open(self) -> None:
        """Run on the first weights, unless the run resumes."""
        if self.first_step == 0:
            self.run(0)

    def __call__(self, info: StepInfo) -> None:
        """Run if due."""
        is_regular = self.every > 0 and info.step % self.every == 0
        if is_regular or info.step in self.at_steps or info.step == self.steps:
            self.run(info.step)
