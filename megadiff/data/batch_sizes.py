"""Number of sequences in each step: constant, or ramped up.

With a ramp the global batch grows in stages: `start` sequences for the first `every_steps` steps, `increment` more in
each further stage, up to `global_sequences`. The samples of a step are a closed-form function of the step alone, so a
resumed run, a planner and the noise need no history.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

from megadiff.data.config import RampConfig
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
        global_sequences: number in every step, or after the ramp.
        ramp: its start is at most `global_sequences`, which `BatchConfig` checks.
    """

    global_sequences: int
    ramp: RampConfig | None = None

    @cached_property
    def num_stages(self) -> int:
        """K: number of stages of the ramp before the final size is reached; 0 without a ramp."""
        if self.ramp is None:
            return 0
        return -((self.ramp.start - self.global_sequences) // self.ramp.increment)

    @property
    def final_step_of_ramp(self) -> int:
        """The first step with `global_sequences` sequences."""
        return 0 if self.ramp is None else self.num_stages * self.ramp.every_steps

    @property
    def distinct(self) -> list[int]:
        """All sizes that occur, ascending."""
        return [self._size(stage) for stage in range(self.num_stages + 1)]

    def sequences(self, step: int) -> int:
        """Return the number of sequences in a step."""
        return self._size(self.num_stages if self.ramp is None else min(step // self.ramp.every_steps, self.num_stages))

    def samples_before(self, step: int) -> int:
        """Return the number of samples before a step, which is the first sample of its batch.

        k stages of E steps each take E (k start + increment k (k - 1) / 2) samples.
        """
        if self.ramp is None:
            return step * self.global_sequences
        stage = min(step // self.ramp.every_steps, self.num_stages)
        whole = stage * self.ramp.start + self.ramp.increment * (stage * (stage - 1) // 2)
        return self.ramp.every_steps * whole + (step - stage * self.ramp.every_steps) * self._size(stage)

    def batch_of(self, step: int) -> StepBatch:
        """Return the global batch of a step."""
        return StepBatch(step, self.samples_before(step), self.sequences(step))

    def step_of(self, sample: int) -> int:
        """Return the step that contains a sample."""
        if self.ramp is None:
            return sample // self.global_sequences
        low, high = 0, self.num_stages  # binary search for the last stage that starts at or before the sample
        while low < high:
            middle = (low + high + 1) // 2
            if self.samples_before(middle * self.ramp.every_steps) <= sample:
                low = middle
            else:
                high = middle - 1
        first = low * self.ramp.every_steps
        return first + (sample - self.samples_before(first)) // self._size(low)

    def origin_of(self, sample: int) -> tuple[int, int]:
        """Return (first sample, sequences) of the global batch that contains a sample."""
        batch = self.batch_of(self.step_of(sample))
        return batch.first_sample, batch.sequences

    def steps_for_samples(self, samples: int) -> int:
        """Return the smallest number of steps with at least this number of samples."""
        return 0 if samples <= 0 else self.step_of(samples - 1) + 1

    def num_microbatches(self, step: int, *, micro_sequences: int, dp_size: int) -> int:
        """Return the number of microbatches per data-parallel rank in a step; call `check` first."""
        return self.sequences(step) // (micro_sequences * dp_size)

    def check(self, *, micro_sequences: int, dp_size: int) -> None:
        """Refuse sizes that do not divide over the ranks.

        Raises:
            ConfigError: a size does not divide; the message names the first such size, and sizes that would.
        """
        together = micro_sequences * dp_size
        for stage, size in enumerate(self.distinct):
            if size % together:
                below = size // together * together
                near = f"{below} or {below + together}" if below else f"{together}"
                raise ConfigError(
                    "every global batch must be a multiple of batch.micro_sequences x data-parallel ranks = "
                    f"{micro_sequences} x {dp_size}, found {self._name(stage)}; use {near}, or change "
                    "batch.micro_sequences"
                )

    def _size(self, stage: int) -> int:
        if self.ramp is None:
            return self.global_sequences
        return min(self.ramp.start + stage * self.ramp.increment, self.global_sequences)

    def _name(self, stage: int) -> str:
        """Return the setting that determines a stage's size, with its value."""
        if self.ramp is None or stage == self.num_stages:
            return f"batch.global_sequences = {self.global_sequences}"
        if stage == 0:
            return f"batch.ramp.start = {self.ramp.start}"
        step = stage * self.ramp.every_steps
        return f"{self._size(stage)} from step {step} on (batch.ramp.increment = {self.ramp.increment})"
