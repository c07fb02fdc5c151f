"""The training line: figures of a step, its speed, and the totals of the run, for every metric sink and the log."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

from torch import Tensor

from megadiff.parallel.step_metrics import metrics_of
from megadiff.platform.machine import Platform
from megadiff.train.hooks import Hook, MetricSink, MetricSinks, Part, StepInfo

log = logging.getLogger("megadiff")


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


LOG_FIELDS = (
    "loss is what is minimised, elbo the bound (negative evidence lower bound) in nats per noisy token, mean weight "
    "should stay near 0.5; they are means over the steps since the line before, at noise levels drawn for each "
    "step, so they scatter, and elbo may lie above log N; the held-out elbo is the one to compare; lr is optimizer.lr "
    "under the schedule, which each group of parameters multiplies by its own factor"
)
"""Explanation of the line, logged once before the first."""


@dataclass
class Console(Hook, MetricSink):
    """A sink of training lines that is also a hook, since its means are over steps that have no line of their own.

    The means are over the noisy tokens of all steps since the last line, skipped ones excluded; the line of a skipped
    step shows that step alone. As a hook it comes before the one that makes the lines.
    """

    section: ClassVar[Part] = "step"
    steps: int
    """Number of steps of the whole run."""
    tokens_before: Callable[[int], int]
    """Function that returns the number of tokens in the first n steps of the run, given n."""
    _since_line: Tensor | None = field(default=None, init=False)
    """Sums over the steps since the last line, skipped ones excluded."""
    _skipped: Tensor | None = field(default=None, init=False)
    """Sums of the step just taken if it was skipped."""

    def __call__(self, info: StepInfo) -> None:
        """Add the step to the sums of the next line."""
        self._skipped = info.sums if info.skipped is not None else None
        if info.skipped is None:
            self._since_line = info.sums if self._since_line is None else self._since_line + info.sums

    def write(self, line: dict[str, Any], step: int) -> None:
        """Log a training line; evaluation lines and lines of other hooks are not shown."""
        if "loss" not in line:
            return
        sums = self._skipped if self._skipped is not None else self._since_line
        if self._skipped is None:
            self._since_line = None
        log.info(self._text(line, metrics_of(sums.tolist()) if sums is not None else line))

    def _text(self, line: dict[str, Any], means: dict[str, Any]) -> str:
        left = (self.tokens_before(self.steps) - line["tokens"]) / max(line["tokens_per_s"], 1e-9)
        mfu = f" | MFU {line['mfu']:.1%}, HFU {line['hfu']:.1%}" if line["mfu"] is not None else ""
        skipped = f" | skipped: {line['skipped']}" if "skipped" in line else ""
        return (
            f"step {line['step']:>7}/{self.steps} | loss {means['loss']:.4f} | elbo {means['elbo']:.4f} | "
            f"mean weight {means['weight']:.3f} | lr {line['lr']:.3e} | grad norm {line['grad_norm']:.3f} | "
            f"{line['tokens_per_s']:,.0f} tokens/s | {line['tflops_per_device']:.3g} TFLOP/s/device "
            f"({line['executed_tflops_per_device']:.3g} executed){mfu} | "
            f"ETA {_duration(left)}{skipped}"
        )


def _duration(seconds: float) -> str:
    if not math.isfinite(seconds):
        return "?"
    minutes, second = divmod(int(seconds), 60)
    hours, minute = divmod(minutes, 60)
    return f"{hours}:{minute:02d}:{second:02d}"
