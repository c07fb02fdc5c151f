"""Number of sequences in each step: constant, or ramped up.

With a rampup the global batch grows in stages: `start` sequences for the first `every_steps` steps, `increment` more in
each further stage, up to `global_batch_size`. The samples of a step are a closed-form function of the step alone, so a
resumed run, a planner and the noise need no history.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

from megadiff.data.config import RampupConfig
from megadiff.errors import ConfigError


class StepBatch(NamedTuple):
    """A step's global batch: the samples first_sample .. first_sample + sequences - 1."""

    step: int
    """Number of steps taken before it."""

    first_sample: int

    sequences: int
    """Number of sequences over all ranks."""


@dataclass(frozen=True)
class BatchSizes:
    """Number of sequences in every step of a run; steps and samples count from 0.

    Args:
        global_batch_size: number in every step, or after the rampup.
        rampup: its start is at most `global_batch_size`, which `BatchConfig` checks.
    """

    global_batch_size: int
    rampup: RampupConfig | None = None

    @cached_property
    def num_stages(self) -> int:
        """K: number of stages of the rampup before the final size is reached; 0 without a rampup."""
        if self.rampup is None:
            return 0
        return -((self.rampup.start - self.global_batch_size) // self.rampup.increment)

    @property
    def end_of_rampup(self) -> int:
        """The first step with `global_batch_size` sequences."""
        return 0 if self.rampup is None else self.num_stages * self.rampup.every_steps

    @property
    def distinct(self) -> list[int]:
        """All sizes that occur, ascending."""
        return [self._size(stage) for stage in range(self.num_stages + 1)]

    def sequences(self, step: int) -> int:
        """Return the number of sequences in a step."""
        return self._size(
            self.num_stages if self.rampup is None else min(step // self.rampup.every_steps, self.num_stages)
        )

    def samples_before(self, step: int) -> int:
        """Return the number of samples before a step, which is the first sample of its batch.

        k stages of E steps each take E (k start + increment k (k - 1) / 2) samples.
        """
        if self.rampup is None:
            return step * self.global_batch_size
        stage = min(step // self.rampup.every_steps, self.num_stages)
        whole = stage * self.rampup.start + self.rampup.increment * (stage * (stage - 1) // 2)
        return self.rampup.every_steps * whole + (step - stage * self.rampup.every_steps) * self._size(stage)

    def batch_of(self, step: int) -> StepBatch:
        """Return the global batch of a step."""
        return StepBatch(step, self.samples_before(step), self.sequences(step))

    def step_of(self, sample: int) -> int:
        """Return the step that contains a sample."""
        if self.rampup is None:
            return sample // self.global_batch_size
        low, high = 0, self.num_stages  # binary search for the last stage that starts at or before the sample
        while low < high:
            middle = (low + high + 1) // 2
            if self.samples_before(middle * self.rampup.every_steps) <= sample:
                low = middle
            else:
                high = middle - 1
        first = low * self.rampup.every_steps
        return first + (sample - self.samples_before(first)) // self._size(low)

    def origin_of(self, sample: int) -> tuple[int, int]:
        """Return (first sample, sequences) of the global batch that contains a sample."""
        batch = self.batch_of(self.step_of(sample))
        return batch.first_sample, batch.sequences

    def steps_for_samples(self, samples: int) -> int:
        """Return the smallest number of steps with at least this number of samples."""
        return 0 if samples <= 0 else self.step_of(samples - 1) + 1

    def num_microbatches(self, step: int, *, micro_batch_size: int, dp_size: int) -> int:
        """Return the number of microbatches per data-parallel rank in a step; call `check` first."""
        return self.sequences(step) // (micro_batch_size * dp_size)

    def check(self, *, micro_batch_size: int, dp_size: int) -> None:
        """Refuse sizes that do not divide over the ranks.

        Raises:
            ConfigError: a size does not divide; the message names the first such size, and sizes that would.
        """
        together = micro_batch_size * dp_size
        for stage, size in enumerate(self.distinct):
            if size % together:
                below = size // together * together
                near = f"{below} or {below + together}" if below else f"{together}"
                raise ConfigError(
                    "every global batch must be a multiple of batch.micro_batch_size x data-parallel ranks = "
                    f"{micro_batch_size} x {dp_size}, found {self._name(stage)}; use {near}, or change "
                    "batch.micro_batch_size"
                )

    def _size(self, stage: int) -> int:
        if self.rampup is None:
            return self.global_batch_size
        return min(self.rampup.start + stage * self.rampup.increment, self.global_batch_size)

    def _name(self, stage: int) -> str:
        """Return the setting that determines a stage's size, with its value."""
        if self.rampup is None or stage == self.num_stages:
            return f"batch.global_batch_size = {self.global_batch_size}"
        if stage == 0:
            return f"batch.rampup.start = {self.rampup.start}"
        step = stage * self.rampup.every_steps
        return f"{self._size(stage)} from step {step} on (batch.rampup.increment = {self.rampup.increment})"
