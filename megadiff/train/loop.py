"""The training loop."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from megadiff.data.batch_sizes import BatchSizes
from megadiff.diffusion.noising import NoisedRows
from megadiff.optim.schedule import WarmupStableDecay
from megadiff.supervision.watchdog import Watchdog
from megadiff.train.goodput import Goodput
from megadiff.train.health import Health
from megadiff.train.hooks import Hook, StepResult
from megadiff.train.saving import Saves
from megadiff.train.step import Step
from megadiff.train.stopping import AgreedStop

log = logging.getLogger("megadiff")


@dataclass
class Run:
    """A wired run: what `build` makes and `train` works through."""

    step: Step
    health: Health
    """Follows every step; what it remembers is saved with a checkpoint."""
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
    saves: Saves
    """Also one of the hooks, if the run saves at all."""
    stop: AgreedStop
    watchdog: Watchdog
    goodput: Goodput
    before: Sequence[Callable[[], None]]
    """Called once before the first step."""
    ends: Sequence[Callable[[], None]]
    """End the loader and close files."""
    failing: Callable[[BaseException, int], None] = lambda error, step: None
    """Told of what ends the run after so many steps, before anything is closed: closing may take long, or hang."""

    def close(self) -> None:
        """End what the run has opened; no collective."""
        for end in self.ends:
            end()

    def microbatches_of(self, step: int) -> int:
        """Microbatches each replica runs in the step after `step` steps."""
        return self.sizes.sequences(step) // self.rows_at_once


@dataclass(frozen=True)
class Ending:
    """How training came to its end."""

    step: int
    """Steps taken."""
    stopped: str | None
    """Who asked the run to stop before its last step; None if it is finished."""


def train(run: Run) -> Ending:
    """Take optimizer steps until `run.steps`, or until the run is asked to stop and has saved itself.

    A step whose update is skipped counts: data and schedule go on.

    Raises:
        TrainingError: too many steps in a row were not finite (the weights are those before them), or a hook found the
            run beyond repair.
        StorageError: it cannot save itself.
    """
    done = run.first_step
    try:
        with run.watchdog.section("eval", step=run.first_step):
            for prepare in run.before:
                prepare()
        stopped = None
        for done in range(run.first_step, run.steps):
            # The first step compiles kernels and opens communicators: it may take as long as setting up.
            with run.watchdog.section("setup" if done == run.first_step else "step", step=done + 1):
                result = _take_step(run, done)
                for hook in run.hooks:
                    with run.watchdog.section(hook.section, step=done + 1):
                        hook(result)
                run.watchdog.at("agreement")
                stopped = run.stop.reason()
            if stopped is not None:
                break
        ending = _end(run, run.steps if stopped is None else done + 1, stopped)
    except BaseException as error:
        run.failing(error, done)
        run.goodput.close("failed")
        raise
    finally:
        run.close()
    return ending


def _take_step(run: Run, done: int) -> StepResult:
    """The step after `done` steps."""
    start = time.monotonic()
    lr = run.peak_lr * run.schedule.factor(done)
    run.watchdog.at("data")
    microbatches = [next(run.rows) for _ in range(run.microbatches_of(done))]
    waited = time.monotonic() - start
    taken = run.step(microbatches, lr, mark=run.watchdog.at)
    run.health.follow(done + 1, taken.verdict, taken.culprits)
    seconds = time.monotonic() - start
    run.goodput.step_taken(done + 1, seconds, waited_s=waited)
    return StepResult(done + 1, taken.total, lr, taken.grad_norm, seconds, taken.verdict.skip)


def _end(run: Run, step: int, stopped: str | None) -> Ending:
    """Save what is not saved, clear what asked for the stop, and settle the accounts."""
    if stopped is not None and step == run.steps:
        stopped = None  # asked during the last step: it is finished
    if stopped is not None:
        with run.watchdog.section("save", step=step):
            run.saves.save_now(step)
    run.stop.honoured()
    run.goodput.close("finished" if stopped is None else "stopped")
    log.info(run.goodput.describe())
    if stopped is not None:
        log.info(f"stopped after step {step} of {run.steps} ({stopped}); run the same command again to go on")
    return Ending(step, stopped)
