"""The training line: figures of a step, its speed, and the totals of the run, for every metric sink."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

from torch import Tensor

from megadiff.platform.machine import Platform
from megadiff.train.hooks import Hook, MetricSinks, Part, StepInfo


@dataclass
class LogHook(Hook):
    """A line every `every` steps, at the first and the last step, and at every skipped step.

    The line has the figures of the step itself, so that a resumed run repeats them, and speeds over the steps since the
    last line. The line of a skipped step also has `skipped`, the reason.
    """

    section: ClassVar[Part] = "step"
    every: int
    """Number of steps between lines."""
    steps: int
    """Number of steps of the whole run."""
    tokens_before: Callable[[int], int]
    """Function that returns the number of tokens in the first n steps of the run, given n."""
    flops_per_token: float
    """FLOPs of the matrix products of a token (`cost.matrix_flops_per_token`)."""
    flops_by_count: Mapping[str, float]
    """Training FLOPs of a token by the name of the count (`megadiff.scaling.flops`)."""
    executed_flops: Callable[[list[float]], float]
    """Function from a step's or several steps' sums (`step_metrics`) to the FLOPs that were computed."""
    world_size: int
    """Number of ranks."""
    platform: Platform
    """The machine, for its peak FLOP/s and its memory in use."""
    sinks: MetricSinks
    """Sinks of the lines; empty on ranks other than the main one."""
    extras: Sequence[Callable[[], dict[str, Any]]] = ()
    """Functions that return further keys of a line; called on the main rank alone."""
    epochs: Callable[[int], dict[str, float]] = lambda step: {}
    """Function from a number of steps to the number of passes through each training source."""
    _tokens: int = field(default=0, init=False)
    _seconds: float = field(default=0.0, init=False)
    _sums: Tensor | None = field(default=None, init=False)
    """Sums over all steps since the last line; they stay on their device until a line is due."""
    _started: float = field(default_factory=time.monotonic, init=False)

    def __call__(self, info: StepInfo) -> None:
        """Write the line of this step if it is due."""
        self._tokens += self.tokens_before(info.step) - self.tokens_before(info.step - 1)
        self._seconds += info.seconds
        self._sums = info.sums if self._sums is None else self._sums + info.sums
        if info.step % self.every and info.step not in (1, self.steps) and info.skipped is None:
            return
        seconds, tokens, sums = max(self._seconds, 1e-9), self._tokens, self._sums
        self._tokens, self._seconds, self._sums = 0, 0.0, None
        if self.sinks:
            line = self._line(info, tokens / seconds, self.executed_flops(sums.tolist()) / seconds)
            self.sinks.write(line, info.step)

    def _line(self, info: StepInfo, tokens_per_s: float, executed_per_s: float) -> dict[str, Any]:
        """Return the line from tokens and executed FLOPs per second of the whole run."""
        flops, executed = tokens_per_s * self.flops_per_token / self.world_size, executed_per_s / self.world_size
        peak = self.platform.peak_flops
        return {
            "step": info.step,
            "tokens": self.tokens_before(info.step),
            "flops": {name: self.tokens_before(info.step) * each for name, each in self.flops_by_count.items()},
            "epochs": self.epochs(info.step),
            **info.metrics,
            "lr": info.lr,
            "grad_norm": info.grad_norm,
            "tokens_per_s": tokens_per_s,
            "tflops_per_device": flops / 1e12,
            "mfu": flops / peak if peak else None,
            "executed_tflops_per_device": executed / 1e12,
            "hfu": executed / peak if peak else None,
            "peak_bytes": self.platform.peak_bytes(),
            "elapsed_s": time.monotonic() - self._started,
            **({"skipped": info.skipped} if info.skipped is not None else {}),
            **{key: value for extra in self.extras for key, value in extra().items()},
        }
