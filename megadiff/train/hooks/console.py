"""The console: a line of text for every training line, with means over the steps since the line before."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, ClassVar

from torch import Tensor

from megadiff.parallel.step_metrics import metrics_of
from megadiff.train.hooks import Hook, MetricSink, Part, StepInfo

log = logging.getLogger("megadiff")

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
