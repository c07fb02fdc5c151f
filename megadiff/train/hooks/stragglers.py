"""Straggler detection: ranks that compute more slowly than their peers are named.

The forward and the backward computation of every microbatch is timed, between megatron-core's own marks. Inside them a
rank waits only for its tensor-parallel peers; waiting for the previous or next stage, for the reduction of gradients
and for data lies outside. So a slow rank stands out among the ranks of its pipeline stage, with tensor parallelism
together with the peers that wait for it; ranks of different stages do different work and are not compared.
"""

from __future__ import annotations

import logging
import os
import socket
from collections.abc import Sequence
from statistics import median_low
from typing import Any, ClassVar

import torch

from megadiff.parallel.pipeline import DataParallelChunk
from megadiff.parallel.topology import Topology
from megadiff.platform.machine import Platform, Stopwatch
from megadiff.train.hooks import Hook, Part, StepInfo

log = logging.getLogger("megadiff")

_CONTENDED_LOAD = 1.5
"""Load average per core from which CPU ranks are taken to compete with other programs."""

_COMPUTATION = ("forward-compute", "backward-compute")


def shared_cores(platform: Platform, *, world_size: int) -> str | None:
    """Return how this node's CPU ranks share its cores, or None where each has one of its own.

    Ranks that share cores wait for each other's turns, so their times say nothing about the cores they run on.

    Args:
        platform: this rank's machine.
        world_size: ranks of the run, all of them on this node unless the launcher gives their number.
    """
    local_ranks = int(os.environ.get("LOCAL_WORLD_SIZE", world_size))
    wanted = local_ranks * torch.get_num_threads()
    if not platform.is_cpu or wanted <= platform.local_devices():
        return None
    return f"{local_ranks} ranks of {torch.get_num_threads()} thread(s) share {platform.local_devices()} core(s)"


def has_contended_cores(platform: Platform) -> bool:
    """Return whether other programs now keep this node's cores busy, so that a CPU rank's times are not its own."""
    return platform.is_cpu and os.getloadavg()[0] > _CONTENDED_LOAD * platform.local_devices()


class ComputeTimers:
    """Implementation of megatron-core's `timers` that runs one stopwatch around computation and ignores the rest."""

    def __init__(self, stopwatch: Stopwatch) -> None:
        self._computing, self._ignored = _Training(stopwatch), _Ignored()

    def __call__(self, name: str, log_level: int = 0) -> Any:
        """Return the timer of this name."""
        return self._computing if name in _COMPUTATION else self._ignored


class _Training:
    """Timer of training alone. Evaluation runs without gradients and is not timed: its share may differ by rank."""

    def __init__(self, stopwatch: Stopwatch) -> None:
        self._stopwatch = stopwatch

    def start(self, *_: Any, **__: Any) -> None:
        if torch.is_grad_enabled():
            self._stopwatch.start()

    def stop(self, *_: Any, **__: Any) -> None:
        if torch.is_grad_enabled():
            self._stopwatch.stop()


class _Ignored:
    def start(self, *_: Any, **__: Any) -> None: ...

    def stop(self, *_: Any, **__: Any) -> None: ...


def time_computation(chunks: Sequence[DataParallelChunk], stopwatch: Stopwatch) -> None:
    """Run the stopwatch while these chunks (data-parallel wrappers) compute in training."""
    for chunk in chunks:
        chunk.config.timers = ComputeTimers(stopwatch)


class StragglerHook(Hook):
    """A warning, every `every` steps, about ranks whose computation took `ratio` times the median of their stage.

    The first step of a process, which also warms up, is not counted, and a CPU rank whose node is busy with other
    programs is not named.
    """

    section: ClassVar[Part] = "step"
    collectives: ClassVar[bool] = True

    def __init__(self, every: int, ratio: float, stopwatch: Stopwatch, topology: Topology, platform: Platform) -> None:
        self._every, self._ratio, self._platform = every, ratio, platform
        self._stopwatch, self._topology = stopwatch, topology
        self._seconds = 0.0
        self._steps = 0
        self._is_warm = False

    def __call__(self, info: StepInfo) -> None:
        """Count this step; compare if due."""
        seconds = self._stopwatch.read()
        if not self._is_warm:
            self._is_warm = True
            return
        self._seconds += seconds
        self._steps += 1
        if info.step % self._every:
            return
        mine = self._seconds / self._steps
        self._seconds, self._steps = 0.0, 0
        about = (self._topology.stage, mine, socket.gethostname(), has_contended_cores(self._platform))
        every = self._topology.gather_to_main(about)
        for rank, seconds, median in slow_ranks([sequence[:2] for sequence in every or []], ratio=self._ratio):
            _, _, host, is_contended = every[rank] if every else (0, 0.0, "", True)
            if is_contended:
                continue
            log.warning(
                f"step {info.step}: rank {rank} ({host}) is {seconds / median:.1f} times slower than the median of "
                f"its stage: {1e3 * seconds:.1f} ms of forward and backward a step, not {1e3 * median:.1f} ms"
            )


def slow_ranks(times: Sequence[tuple[int, float]], *, ratio: float) -> list[tuple[int, float, float]]:
    """Return (rank, its seconds, the median of its stage) for ranks that take `ratio` times that median or more.

    Args:
        times: (stage, seconds) by rank. The median of two ranks is the faster one's.
        ratio: number of medians from which a rank is slow.
    """
    by_stage: dict[int, list[float]] = {}
    for stage, seconds in times:
        by_stage.setdefault(stage, []).append(seconds)
    medians = {stage: median_low(found) for stage, found in by_stage.items()}
    return [
        (rank, seconds, medians[stage])
        for rank, (stage, seconds) in enumerate(times)
        if seconds >= ratio * medians[stage] > 0
    ]
