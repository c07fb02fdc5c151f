"""The training loop."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from megadiff.data.batch_sizes import BatchSizes
from megadiff.diffusion.noising import NoisedRows
from megadiff.errors import TrainingError
from megadiff.optim.schedule import WarmupStableDecay
from megadiff.train.hooks import Hook, StepResult
from megadiff.train.step import Step


@dataclass
class Run:
    """A wired run: what `build` makes and `train` works through."""

    step: Step
    first_step: int
    """Steps taken before this process started."""
    steps: int
    sizes: BatchSizes
    """Rows of every step."""
    rows_at_once: int
    """Rows that all replicas together take through the model at once: microbatch times data-parallel ranks."""
    schedule: WarmupStableDecay
    peak_lr: float
    rows: Iterator[NoisedRows]
    """This data-parallel rank's microbatches from `first_step` on."""
    hooks: Sequence[Hook]
    before: Callable[[], None]
    """Called once before the first step."""
    close: Callable[[], None]
    """Ends the loader and closes files."""

    def microbatches_of(self, step: int) -> int:
        """Microbatches each replica runs in the step after `step` steps."""
        return self.sizes.sequences(step) // self.rows_at_once


def train(run: Run) -> None:
    """Take optimizer steps until `run.steps`.

    Raises:
        TrainingError: a gradient is not finite; the weights are those before that step.
    """
    try:
        run.before()
        for done in range(run.first_step, run.steps):
            start = time.monotonic()
            lr = run.peak_lr * run.schedule.factor(done)
            microbatches = [next(run.rows) for _ in range(run.microbatches_of(done))]
            sums, grad_norm = run.step(microbatches, lr)
            if not math.isfinite(grad_norm):
                first, end = run.sizes.samples_before(done), run.sizes.samples_before(done + 1)
                raise TrainingError(
                    f"step {done + 1}: the gradient norm is {grad_norm}; no update was made. The step's samples are "
                    f"{first} to {end - 1}; lower optimizer.lr, or set optimizer.clip_grad, "
                    "and start again from the last checkpoint"
                )
            result = StepResult(done + 1, sums, lr, grad_norm, time.monotonic() - start)
            for hook in run.hooks:
                hook(result)
    finally:
        run.close()
