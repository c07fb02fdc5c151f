"""What happens between steps: log, evaluate, save. A list, run in this order; hooks do not see each other."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Literal, Protocol

from torch import Tensor

from megadiff.files import write_atomically
from megadiff.parallel.row_report import metrics_of
from megadiff.platform.machine import Platform
from megadiff.train.goodput import Goodput
from megadiff.train.metrics import MetricsFile

log = logging.getLogger("megadiff")

Part = Literal["step", "eval", "save"]
"""Parts of a run that have a time limit of their own."""


LOG_FIELDS = (
    "loss is what is minimised, elbo the bound (negative evidence lower bound) in nats per noisy token, mean weight "
    "should stay near 0.5; they are means over the steps since the line before, at noise levels drawn for each "
    "step, so they scatter, and elbo may lie above log N; the held-out elbo is the one to compare"
)
"""Explanation of the console's line, logged once before the first."""


@dataclass(frozen=True)
class StepResult:
    """What a hook learns of the step just taken."""

    step: int
    """Steps taken so far, this one included."""
    total: Tensor
    """Sums over the tokens of the whole batch (`row_report`), [SIZE] float64, the same on every rank."""
    lr: float
    grad_norm: float
    seconds: float
    """Wall time of the step alone, its batch included, evaluation and saving not."""
    skip: str | None = None
    """Why the step made no update (`non_finite`, `spike`); None where it did."""


class Measurement(Protocol):
    """What an evaluation found."""

    @property
    def elbo(self) -> float:
        """The bound, nats per token."""
        ...

    def as_metrics(self) -> dict[str, Any]:
        """Keys and values of an evaluation line."""
        ...

    def describe(self) -> str:
        """The same for the console."""
        ...


class Hook(Protocol):
    """Called after every step; decides itself whether it is due. Every rank calls it (collectives may hide inside)."""

    section: ClassVar[Part]
    """Whose time limit it is under."""

    def __call__(self, result: StepResult) -> None:
        """React to the step."""
        ...


@dataclass
class Log:
    """Console line, `metrics.jsonl` and TensorBoard: every `every` steps, at the first, the last and skipped ones.

    `metrics.jsonl` and TensorBoard have the figures of the step itself, so that a resumed run repeats them. The console
    shows means over the tokens of all steps since its last line. The line of a skipped step is of that step alone and
    also has `skipped`, the reason; what is not finite is null.
    """

    section: ClassVar[Part] = "step"
    every: int
    steps: int
    tokens_before: Callable[[int], int]
    """Tokens of the first so many steps."""
    flops_per_token: float
    """Model FLOPs of a token, by the convention `full` (`cost.training_flops_per_token`)."""
    executed_flops: Callable[[list[float]], float]
    """FLOPs that were computed, from a step's or several steps' sums (`row_report`)."""
    world_size: int
    platform: Platform
    metrics: MetricsFile | None
    """None on ranks other than the main one."""
    tensorboard: Any = None
    extras: Sequence[Callable[[], dict[str, Any]]] = ()
    """Each is asked, on the main rank alone, for more keys of a line."""
    epochs: Callable[[int], dict[str, float]] = lambda step: {}
    """(steps taken) -> number of times each training source has been gone through."""
    _total: Tensor | None = field(default=None, init=False)
    """Sums over the steps since the last line, skipped ones excluded, for the console's means."""
    _tokens: int = field(default=0, init=False)
    _seconds: float = field(default=0.0, init=False)
    _sums: Tensor | None = field(default=None, init=False)
    """Sums over all steps since the last line; they stay on their device until a line is due."""
    _started: float = field(default_factory=time.monotonic, init=False)

    def __call__(self, result: StepResult) -> None:
        """Write the lines of this step if due."""
        self._tokens += self.tokens_before(result.step) - self.tokens_before(result.step - 1)
        self._seconds += result.seconds
        self._sums = result.total if self._sums is None else self._sums + result.total
        if result.skip is None:
            self._total = result.total if self._total is None else self._total + result.total
        if result.step % self.every and result.step not in (1, self.steps) and result.skip is None:
            return
        seconds, tokens, sums = max(self._seconds, 1e-9), self._tokens, self._sums
        shown = result.total if result.skip is not None or self._total is None else self._total
        self._tokens, self._seconds, self._sums = 0, 0.0, None
        if result.skip is None:
            self._total = None
        if self.metrics is None:
            return
        line = self._line(result, tokens / seconds, self.executed_flops(sums.tolist()) / seconds)
        self.metrics.write(line)
        if self.tensorboard is not None:
            for key in ("loss", "elbo", "kl", "itakura_saito", "mean_weight", "lr", "grad_norm", "tokens_per_s"):
                if math.isfinite(line[key]):
                    self.tensorboard.add_scalar(f"train/{key}", line[key], result.step)
            for source, epochs in line["epochs"].items():
                self.tensorboard.add_scalar(f"epochs/{source}", epochs, result.step)
        log.info(self._console(line, metrics_of(shown.tolist())))

    def _line(self, result: StepResult, rate: float, executed: float) -> dict[str, Any]:
        """Return a line's figures from tokens and executed FLOPs per second of the whole run."""
        flops, executed = rate * self.flops_per_token / self.world_size, executed / self.world_size
        peak = self.platform.peak_flops
        return {
            "step": result.step,
            "tokens": self.tokens_before(result.step),
            "epochs": self.epochs(result.step),
            **metrics_of(result.total.tolist()),
            "lr": result.lr,
            "grad_norm": result.grad_norm,
            "tokens_per_s": rate,
            "tflops_per_device": flops / 1e12,
            "mfu": flops / peak if peak else None,
            "executed_tflops_per_device": executed / 1e12,
            "hfu": executed / peak if peak else None,
            "peak_bytes": self.platform.peak_bytes(),
            "elapsed_s": time.monotonic() - self._started,
            **({"skipped": result.skip} if result.skip is not None else {}),
            **{key: value for extra in self.extras for key, value in extra().items()},
        }

    def _console(self, line: dict[str, Any], means: dict[str, Any]) -> str:
        """Return the console's line: means since the line before, where `line` has the figures of its own step."""
        left = (self.tokens_before(self.steps) - line["tokens"]) / max(line["tokens_per_s"], 1e-9)
        mfu = f" | MFU {line['mfu']:.1%}, HFU {line['hfu']:.1%}" if line["mfu"] is not None else ""
        skipped = f" | skipped: {line['skipped']}" if "skipped" in line else ""
        return (
            f"step {line['step']:>7}/{self.steps} | loss {means['loss']:.4f} | elbo {means['elbo']:.4f} | "
            f"mean weight {means['mean_weight']:.3f} | lr {line['lr']:.3e} | grad norm {line['grad_norm']:.3f} | "
            f"{line['tokens_per_s']:,.0f} tokens/s | {line['tflops_per_device']:.3g} TFLOP/s/device "
            f"({line['executed_tflops_per_device']:.3g} executed){mfu} | "
            f"ETA {_duration(left)}{skipped}"
        )


@dataclass
class Evaluate:
    """The held-out bound, before the first step, every `every` steps, and after the last."""

    section: ClassVar[Part] = "eval"
    every: int
    steps: int
    measure: Callable[[], Measurement]
    metrics: MetricsFile | None
    goodput: Goodput
    tensorboard: Any = None
    baselines: Mapping[str, float] = field(default_factory=dict)
    """Keys and values that every evaluation line has beside what was found: figures to compare it with."""

    def __call__(self, result: StepResult) -> None:
        """Measure if due."""
        if (self.every and result.step % self.every == 0) or result.step == self.steps:
            self.run(result.step)

    def run(self, step: int) -> None:
        """Measure and write the line of this step."""
        with self.goodput.during("evaluate"):
            found = self.measure()
        if self.metrics is None:
            return
        self.metrics.write({"step": step, **found.as_metrics(), **self.baselines})
        if self.tensorboard is not None:
            self.tensorboard.add_scalar("eval/elbo", found.elbo, step)
        log.info(f"step {step:>7}/{self.steps} | {found.describe()}")


@dataclass
class WriteSamples:
    """Text drawn by the model as it stands, as often as it is measured: `samples/step_XXXXXXXX.txt`."""

    section: ClassVar[Part] = "eval"
    every: int
    steps: int
    draw: Callable[[], str]
    """Collective over the world."""
    folder: Path | None
    """The run folder; None on ranks other than the main one."""
    goodput: Goodput

    def __call__(self, result: StepResult) -> None:
        """Draw if due."""
        if (self.every and result.step % self.every == 0) or result.step == self.steps:
            self.run(result.step)

    def run(self, step: int) -> None:
        """Draw and write the file of this step; a disk that refuses costs the file and not the run."""
        with self.goodput.during("evaluate"):
            text = self.draw()
        if self.folder is None:
            return
        path = self.folder / "samples" / f"step_{step:08d}.txt"
        try:
            path.parent.mkdir(exist_ok=True)
            write_atomically(path, text.encode(errors="replace"), is_durable=False)
        except OSError as error:
            log.warning(f"step {step:>7}/{self.steps} | {path} was not written: {error.strerror or error}")


def _duration(seconds: float) -> str:
    if not math.isfinite(seconds):
        return "?"
    minutes, second = divmod(int(seconds), 60)
    hours, minute = divmod(minutes, 60)
    return f"{hours}:{minute:02d}:{second:02d}"
