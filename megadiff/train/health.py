"""Health of the numbers: whether a step's update is made, when a run must end, and where something was not finite.

Every rank checks the same two globally reduced numbers with the same state, so all decide alike without communication.
The state is a function of the run's steps and is saved with it: a resumed run decides as the uninterrupted one would.
"""

from __future__ import annotations

import logging
import math
import re
import socket
from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor

from megadiff.data.config import BatchSizes
from megadiff.data.loader import microbatch_samples
from megadiff.errors import TrainingError
from megadiff.parallel.step_metrics import has_finite_loss
from megadiff.parallel.topology import Topology
from megadiff.train.config import HealthConfig

log = logging.getLogger("megadiff")


@dataclass(frozen=True)
class StepDecision:
    """The decision about one step's update."""

    skip: Literal["non_finite", "spike"] | None = None
    """Reason why no update is made; None if it is made."""
    spikes: tuple[str, ...] = ()
    """Descriptions of figures that stand out."""


@dataclass(frozen=True)
class NonFiniteSource:
    """Samples or tensors of one rank that are not finite."""

    rank: int
    host: str
    stage: int
    samples: tuple[int, ...]
    """Samples of microbatches whose loss is not finite, counted from the step's first sample; empty on most ranks."""
    tensors: tuple[str, ...]
    """Parameters whose gradient is not finite, in the order of the model."""

    @property
    def described_place(self) -> str:
        """The rank and its machine."""
        return f"rank {self.rank} ({self.host})"

    def describe(self, first_sample: int) -> str:
        """Return a description; `first_sample` is the step's first global sample index."""
        if self.samples:
            named = ", ".join(str(first_sample + sample) for sample in self.samples)
            return f"loss of a microbatch on {self.described_place}, samples {named}"
        count = f"{len(self.tensors)} tensor(s), nearest the output {self.tensors[-1]}"
        return f"gradient on {self.described_place}, stage {self.stage}: {count}"


class Health:
    """The run's health checks: one decision a step, from the figures of the steps so far.

    Args:
        config: the section `health`.
        sizes: batch sizes of the run, which tell the samples of a step for messages.
    """

    def __init__(self, config: HealthConfig, *, sizes: BatchSizes) -> None:
        self._config, self._sizes = config, sizes
        self._consecutive = 0
        self._skipped = 0
        window = {"window": config.spike_window, "sigma": config.spike_sigma}
        self._figures = {name: RollingFigure(**window) for name in ("loss", "grad_norm")}

    @property
    def skipped(self) -> int:
        """Number of steps of the whole run that made no update."""
        return self._skipped

    def check(self, loss: float, grad_norm: float) -> StepDecision:
        """Return the decision about the step with these figures and remember them. Called once a step.

        Args:
            loss: mean over the step's whole batch.
            grad_norm: norm of the whole model's gradient before clipping.
        """
        figures = {"loss": loss, "grad_norm": grad_norm}
        if not all(math.isfinite(value) for value in figures.values()):
            self._consecutive += 1
            self._skipped += 1
            return StepDecision("non_finite")
        self._consecutive = 0
        found = {name: self._figures[name].spike(value) for name, value in figures.items()}
        for name, value in figures.items():
            self._figures[name].add(value)
        spikes = tuple(f"{name} {why}" for name, why in found.items() if why is not None)
        if not spikes or not self._config.skip_spikes:
            return StepDecision(None, spikes)
        self._skipped += 1
        return StepDecision("spike", spikes)

    def report(self, step: int, decision: StepDecision, sources: Sequence[NonFiniteSource] = ()) -> None:
        """Log what stood out in the step just taken, and end the run if it must end.

        Args:
            step: number of steps taken, this one included.
            decision: the decision about the step.
            sources: where something was not finite.

        Raises:
            TrainingError: `non_finite_limit` consecutive steps were not finite.
        """
        first, end = self._sizes.samples_before(step - 1), self._sizes.samples_before(step)
        made = "no update was made" if decision.skip else "the update was made"
        for spike in decision.spikes:
            log.warning(f"step {step}: spike: {spike}; {made}; samples {first} to {end - 1}")
        if decision.skip != "non_finite":
            return
        limit = self._config.non_finite_limit
        where = "; ".join(source.describe(first) for source in sources) or "where is not known"
        log.warning(
            f"step {step}: loss or gradient not finite, no update was made ("
            f"{self._consecutive} consecutive, the run ends at {limit}); samples {first} to {end - 1}: {where}"
        )
        if self._consecutive >= limit:
            raise TrainingError(self._end_of_run(step, where))

    def _end_of_run(self, step: int, where: str) -> str:
        first = self._sizes.samples_before(max(0, step - self._consecutive))
        last = self._sizes.samples_before(step) - 1
        return (
            f"step {step}: loss or gradient not finite {self._consecutive} consecutive steps ("
            f"health.non_finite_limit is {self._config.non_finite_limit}); the weights are those before them. Their "
            f"samples are {first} to {last}; in the last step: {where}. Look at a step with `megadiff replay`, "
            "lower optimizer.lr or set optimizer.clip_grad, and resume from an earlier checkpoint"
        )

    def state(self) -> dict[str, Any]:
        """Return what a checkpoint keeps: JSON of finite numbers, a few kilobytes."""
        figures = {name: figure.values for name, figure in self._figures.items()}
        return {"non_finite_consecutive": self._consecutive, "skipped": self._skipped, **figures}

    def restore(self, state: dict[str, Any]) -> None:
        """Take over what `state` returned; an empty dict is a fresh start."""
        self._consecutive = int(state.get("non_finite_consecutive", 0))
        self._skipped = int(state.get("skipped", 0))
        for name, figure in self._figures.items():
            kept = state.get(name)
            figure.refill(kept if isinstance(kept, list) else ())


class RollingFigure:
    """The last `window` values of a figure, against which the next one is compared.

    Spiking values join the window too: a figure that moves to a new level for good widens the deviation and counts as
    normal within a few steps, so a rule that skips updates cannot skip without end.

    Args:
        window: number of values kept; comparison begins once half of them are there.
        sigma: number of deviations above the mean from which a value is a spike.
    """

    def __init__(self, *, window: int, sigma: float) -> None:
        self._values: deque[float] = deque(maxlen=window)
        self._least = max(2, window // 2)
        self._sigma = sigma

    @property
    def values(self) -> list[float]:
        """The values kept, oldest first: the whole state."""
        return list(self._values)

    def refill(self, values: Iterable[float]) -> None:
        """Take over the state of another figure; of more values than the window holds, the last."""
        self._values.clear()
        self._values.extend(values)

    def add(self, value: float) -> None:
        """Remember a finite value."""
        self._values.append(value)

    def spike(self, value: float) -> str | None:
        """Return why `value` is a spike beside the values so far; None if it is none."""
        count = len(self._values)
        if count < self._least:
            return None
        mean = math.fsum(self._values) / count
        deviation = math.sqrt(math.fsum((kept - mean) ** 2 for kept in self._values) / (count - 1))
        if value <= mean + self._sigma * deviation:
            return None
        return f"{value:.5g} against {mean:.5g} +- {deviation:.2g} over the {count} steps before"


def non_finite_sources(
    reports: Tensor, chunks: Sequence[Any], topology: Topology, *, micro_batch_size: int
) -> tuple[NonFiniteSource, ...]:
    """Return where something is not finite, once it is known that something is. Collective over the world.

    If a loss is not finite, its rank and samples are returned (the lowest of the tensor-parallel ranks that share it).
    If all losses are finite, gradients are examined. They are reduced over replicas by now, so the lowest of the ranks
    that share a part of the model is named for all, and only the stage nearest the output: what is not finite there
    spreads to every stage before it.

    Args:
        reports: [M, SIZE] of this rank's microbatches; empty except on the last stage.
        chunks: data-parallel wrapped model chunks.
        topology: this rank's place in the layout.
        micro_batch_size: sequences of a microbatch.
    """
    found: list[Any] = [None] * topology.layout.world_size
    dist.all_gather_object(found, _own_source(reports, chunks, topology, micro_batch_size), group=topology.host_group)
    by_loss = {source.samples: source for source in reversed(found) if source.samples}
    if by_loss:
        return tuple(sorted(by_loss.values(), key=lambda source: source.rank))
    by_gradient = [source for source in found if source.tensors]
    last = max((source.stage for source in by_gradient), default=0)
    return tuple(source for source in by_gradient if source.stage == last)[:1]


def _own_source(reports: Tensor, chunks: Sequence[Any], topology: Topology, micro_batch_size: int) -> NonFiniteSource:
    samples: list[int] = []
    if topology.is_last_stage:
        for microbatch in (~has_finite_loss(reports)).nonzero().flatten().tolist():
            samples += microbatch_samples(
                0,
                micro_batch_size=micro_batch_size,
                dp_rank=topology.data_rank,
                dp_size=topology.layout.data,
                microbatch=microbatch,
            )
    tensors = [
        re.sub(r"^(module\.)+", "", name)  # the wrappers' own
        for chunk in chunks
        for name, parameter in chunk.named_parameters()
        if not bool(torch.isfinite(parameter.main_grad).all())
    ]
    return NonFiniteSource(topology.rank, socket.gethostname(), topology.stage, tuple(samples), tuple(tensors))
