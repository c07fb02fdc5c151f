"""The training loop, and one optimizer step: from noised microbatches to sums of terms, gradient norm and decision."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from megadiff.data.config import BatchSizes
from megadiff.diffusion.noising import NoisedBatch
from megadiff.loss.lm_head import LossOutput
from megadiff.optim.config import WarmupStableDecay
from megadiff.optim.optimizer import Optimizer
from megadiff.parallel.objective import DeviceBatch, ShardedObjective
from megadiff.parallel.pipeline import DataParallelChunk, run_microbatches
from megadiff.parallel.step_metrics import SIZE, mean_loss
from megadiff.parallel.topology import Topology
from megadiff.supervision.stopping import STOP_FILE, StopRequest
from megadiff.supervision.watchdog import Watchdog
from megadiff.train.goodput import Goodput
from megadiff.train.health import Health, NonFiniteSource, StepDecision, non_finite_sources
from megadiff.train.hooks import Hook, StepInfo
from megadiff.train.hooks.checkpoint import CheckpointHook

log = logging.getLogger("megadiff")


class StepOutput(NamedTuple):
    """The result of one optimizer step."""

    sums: Tensor
    """Sums over the tokens of the whole batch (`step_metrics`), [SIZE] float64 on the device, the same on every
    rank."""
    grad_norm: float
    """Norm of the whole model's gradient before clipping."""
    decision: StepDecision
    """Decision about the update; the same on every rank."""
    sources: tuple[NonFiniteSource, ...] = ()
    """Ranks, samples and tensors that were not finite."""
    is_stop_requested: bool = False
    """Whether some rank was requested to stop; the same on every rank."""


@dataclass(frozen=True)
class TrainStep:
    """The parts of an optimizer step; a call takes one."""

    chunks: Sequence[DataParallelChunk]
    """Data-parallel wrapped model chunks of this rank."""
    optimizer: Optimizer
    objective: ShardedObjective
    topology: Topology
    device: torch.device
    seq_length: int
    micro_batch_size: int
    check: Callable[[float, float], StepDecision]
    """Function from loss and gradient norm, both of the whole batch, to the decision about the update, which must be
    the same on every rank."""

    def __call__(
        self,
        microbatches: Sequence[NoisedBatch],
        lr: float,
        *,
        mark: Callable[[str], None] = lambda _: None,
        is_stop_requested: Callable[[], bool] = lambda: False,
    ) -> StepOutput:
        """Run forward and backward, reduce, check the figures, and update the weights.

        Args:
            microbatches: this data-parallel rank's microbatches, the same on its tensor and pipeline ranks.
            lr: learning rate of the step.
            mark: called with the name of each part of the step as it begins, in the same order on every rank.
            is_stop_requested: called after the backward pass; whether this rank was requested to stop. The answers
                travel with the sums, so ranks agree to stop without a collective of their own.
        """
        mark("forward and backward")
        for chunk in self.chunks:
            chunk.zero_grad_buffer()
        self.optimizer.zero_grad()
        found = run_microbatches(
            self.chunks,
            [self.objective.place(sequences, self.device) for sequences in microbatches],
            forward=self.objective.forward,
            loss=self._gated_loss,
            seq_length=self.seq_length,
            micro_batch_size=self.micro_batch_size,
        )
        mark("update")
        reports = torch.stack(found) if found else torch.zeros(0, SIZE, dtype=torch.float64, device=self.device)
        total = self.topology.sum_with_votes(reports.sum(0), float(is_stop_requested()))
        sums = total[:SIZE]
        # The host waits for the device only here.
        figures = torch.stack((mean_loss(sums), self.optimizer.gradient_norm(), total[SIZE]))
        loss, grad_norm, requests = figures.tolist()
        decision = self.check(loss, grad_norm)
        sources: tuple[NonFiniteSource, ...] = ()
        if decision.skip is None:
            self.optimizer.step(lr, norm=grad_norm)
        elif decision.skip == "non_finite":
            sources = non_finite_sources(reports, self.chunks, self.topology, micro_batch_size=self.micro_batch_size)
        return StepOutput(sums, grad_norm, decision, sources, is_stop_requested=requests > 0)

    def _gated_loss(self, output: LossOutput, placed: DeviceBatch) -> tuple[Tensor, Tensor, Tensor]:
        """Return the loss with its gradient multiplied by 1 if the loss is finite and by NaN if not.

        Only the first tensor-parallel rank's report is counted. A loss that is not finite on another one makes the
        gradient norm not finite on every rank, without a host sync, even if its own derivative is finite.
        """
        loss, tokens, report = self.objective.report(output, placed)
        return loss * (1.0 + 0.0 * loss.detach()), tokens, report


@dataclass(frozen=True)
class TrainResult:
    """The end of training."""

    step: int
    """Number of steps taken."""
    stopped: str | None
    """Reason why the run was asked to stop before its last step; None if it is finished."""


class AgreedStop:
    """A stop that all ranks make after the same step, whichever of them was asked.

    Args:
        request: this rank's request; without one the run cannot be stopped and ranks do not communicate.
        topology: this rank's place in the layout.
    """

    def __init__(self, request: StopRequest | None, topology: Topology) -> None:
        self._request, self._topology = request, topology
        self._is_by_file = False

    def is_requested(self) -> bool:
        """Return whether this rank was requested to stop; ranks may differ."""
        return self._request is not None and self._request.reason() is not None

    def reason(self, is_requested: bool) -> str | None:
        """Return why the run stops now, by the first rank that was asked; None to go on. Called once a step.

        Collective over the world if the run stops, over the host's network.

        Args:
            is_requested: whether any rank was requested to (`is_requested`); the same on every rank.
        """
        if not is_requested or self._request is None:
            return None
        reasons = self._topology.from_main(self._topology.gather_to_main(self._request.reason()))
        self._is_by_file = any(reason is not None and reason.startswith(STOP_FILE) for reason in reasons)
        return next(reason for reason in reasons if reason is not None)

    def honoured(self) -> None:
        """Remove a stop file that was seen, once the run has saved itself; a later file stops the next launch."""
        if self._request is not None and self._is_by_file:
            self._request.honoured()


@dataclass
class Trainer:
    """A run ready to train, made by `build.build_trainer`.

    The parts are public and may be replaced before `train`, as tests and benchmarks do.
    """

    step: TrainStep
    """The optimizer step."""
    health: Health
    """The run's health checks, whose state is saved with a checkpoint."""
    first_step: int
    """Number of steps taken before this process started."""
    steps: int
    """Number of steps of the whole run."""
    sizes: BatchSizes
    """Sequences of every step."""
    sequences_at_once: int
    """Sequences that all replicas together process at once: micro-batch size times data-parallel ranks."""
    schedule: WarmupStableDecay
    """Course of the learning rate, as a factor of `peak_lr`."""
    peak_lr: float
    """The setting `optimizer.lr`."""
    microbatches: Iterator[NoisedBatch]
    """This data-parallel rank's microbatches from `first_step` on."""
    hooks: Sequence[Hook]
    """Hooks, called after every step in this order."""
    checkpoint: CheckpointHook
    """The hook that saves a run which is asked to stop; also one of `hooks`, if the run saves at all."""
    stop: AgreedStop
    """Requests to stop."""
    watchdog: Watchdog
    """Time limits of the parts of a run."""
    goodput: Goodput
    """Record of where the run's time goes."""
    closing: Sequence[Callable[[], None]] = ()
    """Functions that end the loader and close files, called after the hooks are closed."""
    failing: Callable[[BaseException, int], None] = lambda error, step: None
    """Function called with an error that ends the run and the steps taken, before anything is closed: closing may take
    long, or hang."""

    def train(self) -> TrainResult:
        """Take optimizer steps until `steps`, or until the run is asked to stop and has saved itself.

        A step whose update is skipped counts: data and schedule go on.

        Raises:
            TrainingError: too many consecutive steps were not finite (the weights are those before them), or a hook
                found that the run cannot go on.
            HookError: a hook of the user's list failed.
            StorageError: the run cannot save itself.
        """
        done, stopped = self.first_step, None
        try:
            self._open_hooks()
            for done in range(self.first_step, self.steps):
                # The first step compiles kernels and opens communicators: it may take as long as setting up.
                with self.watchdog.section("setup" if done == self.first_step else "step", step=done + 1):
                    info, is_stop_requested = self._take_step(done)
                    for hook in self.hooks:
                        with self.watchdog.section(hook.section, step=done + 1):
                            self.watchdog.mark(_mark(hook))
                            hook(info)
                    self.watchdog.mark("agreement")
                    stopped = self.stop.reason(is_stop_requested)
                if stopped is not None:
                    break
            result = self._finish(self.steps if stopped is None else done + 1, stopped)
        except BaseException as error:
            self.failing(error, done)
            self.goodput.close("failed")
            raise
        finally:
            self.close()
        return result

    def close(self) -> None:
        """Close the hooks and everything that the run has opened; no collective."""
        for hook in self.hooks:
            hook.close()
        for close in self.closing:
            close()

    def microbatches_of(self, step: int) -> int:
        """Return the number of microbatches that each replica runs in the step after `step` steps."""
        return self.sizes.sequences(step) // self.sequences_at_once

    def _open_hooks(self) -> None:
        for hook in self.hooks:
            part = "setup" if hook.section == "step" else hook.section
            with self.watchdog.section(part, step=self.first_step):
                self.watchdog.mark(_mark(hook))
                hook.open()

    def _take_step(self, done: int) -> tuple[StepInfo, bool]:
        """Take the step after `done` steps; return also whether some rank was requested to stop."""
        start = time.monotonic()
        lr = self.peak_lr * self.schedule.factor(done)
        self.watchdog.mark("data")
        microbatches = [next(self.microbatches) for _ in range(self.microbatches_of(done))]
        waited = time.monotonic() - start
        output = self.step(microbatches, lr, mark=self.watchdog.mark, is_stop_requested=self.stop.is_requested)
        self.health.report(done + 1, output.decision, output.sources)
        seconds = time.monotonic() - start
        self.goodput.step_taken(done + 1, seconds, waited_s=waited)
        info = StepInfo(done + 1, output.sums, lr, output.grad_norm, seconds, output.decision.skip)
        return info, output.is_stop_requested

    def _finish(self, step: int, stopped: str | None) -> TrainResult:
        """Save a run that was asked to stop, remove the stop file, and close the accounts."""
        if stopped is not None and step == self.steps:
            stopped = None  # asked during the last step: it is finished
        if stopped is not None:
            with self.watchdog.section("save", step=step):
                self.checkpoint.save_now(step)
        self.stop.honoured()
        self.goodput.close("finished" if stopped is None else "stopped")
        log.info(self.goodput.describe())
        if stopped is not None:
            log.info(f"stopped after step {step} of {self.steps} ({stopped}); run the same command again to go on")
        return TrainResult(step, stopped)


def _mark(hook: Hook) -> str:
    """Return the name of a hook in the watchdog's report: of the list's name, or of its class."""
    return f"hook {getattr(hook, 'name', type(hook).__name__)}"
