"""The gradient noise scale: the batch size at which noise and signal of a gradient are equal, and the noise's sources.

    hooks:
      - {name: gradient_noise, every: 2000}

With G the gradient and S the covariance of the gradient of one sequence under one draw of its noise, the simple noise
scale of arXiv:1812.06162 is tr S / |G|^2, in sequences: a batch far below it wastes steps, one far above it wastes
tokens. In a diffusion model tr S has two sources, which sequences a batch holds and which noise they are corrupted
with, and the hook measures them apart.

A measurement takes independent groups of R microbatches, each under K independent draws of noise, and needs three sums
of squared norms of each group: of the gradients, of their sums over the draws of a microbatch, and of the sum over the
group. These give unbiased estimates of both parts of tr S and of |G|^2 by the analysis of variance with random
effects (`components`). Numerator and denominator are averaged over the groups of the last `window` measurements, of
those within a factor of 2 in steps, before the ratio is taken, and its standard error is a jackknife over these groups.
The components of each measurement alone are written too, and are what a law over tokens is fitted to.

A measurement is `groups` x `microbatches` x `draws` backward passes of one microbatch, each at most as long as a step.
The 16 passes of the default every 2,000 steps are at most 0.8 % of the run on any layout; where a step has several
microbatches, or several replicas share the groups, they are that much less. Two further copies of the gradient in
float32 are held meanwhile, and the run's own one waits in the host's memory. Weights, gradients, optimizer and random
state are the same to the bit afterwards.

Noise levels are drawn independently here. A training batch stratifies them, so its gradient has somewhat less of the
noise's part than tr S divided by the batch says.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import Field

from megadiff.config.section import Section
from megadiff.errors import ConfigError
from megadiff.scaling.noise_scale import (
    MEASURED,
    WIDEST,
    Components,
    mean_of,
    noise_share_of,
    scale_of,
    step_windows,
)
from megadiff.train.hooks import Hook, HookContext, Part, StepInfo

if TYPE_CHECKING:  # a run description is checked without torch
    from torch import Tensor

log = logging.getLogger("megadiff")

MOST_SHARE = 0.01
"""Share of the run's time above which the hook warns of its cost."""


class Settings(Section):
    """Keys of `{name: gradient_noise, ...}`."""

    every: int = Field(default=2000, gt=0)
    """Steps between measurements; the last step always has one."""
    groups: int = Field(default=2, ge=2)
    """Number of independent groups of a measurement; replicas share them."""
    microbatches: int = Field(default=4, ge=2)
    """Number of microbatches of different sequences in a group."""
    draws: int = Field(default=2, ge=2)
    """Number of draws of noise for each microbatch."""
    window: int = Field(default=8, ge=1)
    """Largest number of last measurements that the figures are averaged over; those before half the steps never are."""
    source: Literal["train", "validation"] = "train"
    """Sequences to measure on: the next ones of the training data, or the validation data in turn."""


def build(settings: Any, context: HookContext) -> GradientNoise:
    """Return the hook of this run.

    Raises:
        ConfigError: the run trains in FP8, or has no validation data to measure on.
    """
    config = context.config
    if config.precision.fp8 != "none":
        raise ConfigError(
            f"precision.fp8={config.precision.fp8} keeps scaling factors that further passes would change; measure the "
            "gradient noise of a run with precision.fp8=none"
        )
    if settings.source == "validation" and not context.gradients.validation:
        raise ConfigError("source is validation, but data.valid is empty; set it, or source: train")
    share = cost_share(settings, context)
    message = f"gradient noise    measured every {settings.every:,} steps, about {share:.2%} of the run's time"
    if share > MOST_SHARE and context.topology.is_main:
        log.warning(f"{message}; raise `every` to {math.ceil(settings.every * share / MOST_SHARE):,} for 1 %")
    elif context.topology.is_main:
        log.info(message)
    if context.topology.is_main and (sentence := repeated_sequences(settings, context)):
        log.warning(f"gradient noise    {sentence}")
    return GradientNoise(settings, context)


def cost_share(settings: Any, context: HookContext) -> float:
    """Return the expected share of the run's time, in passes of a microbatch through all stages of the pipeline."""
    layout, batch = context.topology.layout, context.config.batch
    in_step = batch.global_batch_size // (batch.micro_batch_size * layout.data) + layout.pipeline - 1
    passes = -(-settings.groups // layout.data) * settings.microbatches * settings.draws
    return passes * layout.pipeline / (in_step * settings.every)


def repeated_sequences(settings: Any, context: HookContext) -> str:
    """Return a sentence if measurements that are averaged share sequences; empty if all are different."""
    config, every = context.config, settings.every
    wanted = settings.groups * settings.microbatches * config.batch.micro_batch_size
    if settings.source == "validation":
        there = sum(len(kind) for kind in context.gradients.validation)
        together = math.ceil(config.steps / every) - math.ceil(config.steps / WIDEST / every) + 1
        if there >= wanted * together:
            return ""
        return (
            f"the {there:,} validation sequences come around again within the {together:,} measurements of {wanted:,} "
            "that are averaged together, so the standard errors are too small; raise `every` or eval.sequences"
        )
    last = (config.steps - 1) // every * every
    pairs = [(step, after) for step, after in ((every, 2 * every), (last, config.steps)) if 0 < step < after]
    before = config.sizes.samples_before
    gap = min((before(after) - before(step) for step, after in pairs if after <= config.steps), default=wanted)
    if gap >= wanted:
        return ""
    return (
        f"a measurement takes {wanted:,} sequences, of which the next one takes some again after {gap:,}, so the "
        "standard errors are too small; raise `every`, or let it divide the number of steps"
    )


class GradientNoise(Hook):
    """The noise scale, measured whenever the hook is called.

    Args:
        settings: the entry of the list.
        context: the run.
    """

    section: ClassVar[Part] = "eval"
    collectives: ClassVar[bool] = True

    def __init__(self, settings: Any, context: HookContext) -> None:
        self._settings, self._context = settings, context
        self._measured: dict[int, list[Components]] = {}
        """Components by group of the last measurements, by step."""

    def __call__(self, info: StepInfo) -> None:
        """Measure, and write a line. Collective over the run."""
        settings, size = self._settings, self._context.config.batch.micro_batch_size
        sums = self._measure(info.step)
        if not all(math.isfinite(value) for group in sums for value in group):
            log.warning(f"step {info.step}: gradient noise not measured, since a gradient is not finite")
            return
        found = [components(group, settings.microbatches, settings.draws, size) for group in sums]
        self._measured = last_measurements({**self._measured, info.step: found}, settings.window)
        groups = [group for measured in self._measured.values() for group in measured]
        figures = summary(groups, seq_length=self._context.config.model.seq_length)
        for name, value in zip(MEASURED, mean_of(found), strict=True):
            figures[f"gradient_noise/{name}"] = value
        figures["gradient_noise/measurements"] = len(self._measured)
        self._context.write(figures, info.step)
        if self._context.topology.is_main:
            log.info(f"step {info.step:>7}/{self._context.config.steps} | {describe(figures)}")

    def state(self) -> dict[str, Any]:
        """Return the components of the last measurements, and their steps."""
        measured = [[list(group) for group in groups] for groups in self._measured.values()]
        return {"steps": list(self._measured), "measured": measured}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Take over the last measurements of a run that resumes; those whose steps are not known are left out."""
        found = zip(state.get("steps", ()), state.get("measured", ()), strict=False)
        self._measured = {step: [Components(*group) for group in groups] for step, groups in found}

    def _measure(self, step: int) -> list[list[float]]:
        """Return the three sums of squared norms of each group, over the whole model."""
        import torch

        settings, context = self._settings, self._context
        gradients, topology = context.gradients, context.topology
        size = gradients.micro_batch_size
        count = settings.groups * settings.microbatches
        start = context.config.sizes.samples_before(step)
        first = start if settings.source == "train" else (-(-step // settings.every) - 1) * count * size
        sums = torch.zeros(settings.groups, 3, dtype=torch.float64, device=gradients.device)
        with gradients.borrowed() as gradient_of:
            for group in range(topology.data_rank, settings.groups, topology.layout.data):
                microbatches = []
                for row in range(group * settings.microbatches, (group + 1) * settings.microbatches):
                    rows = settings.source, first + row * size, size
                    clean, predicted = gradients.clean(*rows), gradients.predicted(*rows)
                    documents = gradients.documents(*rows)
                    draw = ((start + row * size) * settings.draws, size)
                    draws = [draw[0] + k * size for k in range(settings.draws)]
                    microbatches.append(
                        [gradients.noised(clean, number, predicted, documents, step=step) for number in draws]
                    )
                sums[group] = sums_of_squares(microbatches, gradient_of, device=gradients.device)
        return topology.sum_over_ranks(sums).tolist()


def last_measurements(measured: Mapping[int, list[Components]], window: int) -> dict[int, list[Components]]:
    """Return the last measurements by step, at most `window` and within a factor of 2 in steps."""
    return {step: measured[step] for step in step_windows(measured)[-1][-window:]}


def sums_of_squares(
    microbatches: Sequence[Sequence[Any]], gradient_of: Callable[[Any], list[Tensor]], *, device: Any
) -> Tensor:
    """Return the three sums of squared norms of a group, of this rank's part of the gradients: [3] float64.

    Args:
        microbatches: by sequences, then by draw of noise.
        gradient_of: function that returns the gradient of a microbatch, in tensors that its next call may overwrite.
    """
    import torch

    from megadiff.optim.optimizer import sum_of_squares

    single = over_draws = torch.zeros((), dtype=torch.float64, device=device)
    total: list[Tensor] = []
    for draws in microbatches:
        row: list[Tensor] = []
        for microbatch in draws:
            gradient = gradient_of(microbatch)
            single = single + sum_of_squares(gradient, device=device)
            row = _added(row, gradient)
        over_draws = over_draws + sum_of_squares(row, device=device)
        total = _added(total, row)
    return torch.stack((single, over_draws, sum_of_squares(total, device=device)))


def _added(total: list[Tensor], gradient: Sequence[Tensor]) -> list[Tensor]:
    """Add a gradient to a float32 total, which an empty list begins."""
    if not total:
        return [tensor.float().clone() for tensor in gradient]
    for tensor, other in zip(total, gradient, strict=True):
        tensor.add_(other)
    return total


def components(sums: Sequence[float], rows: int, draws: int, size: int) -> Components:
    """Return the parts of a group's variance and its squared mean, by the analysis of variance with random effects.

    With g[r, k] the mean gradient of the `size` sequences of microbatch r under draw k, the mean squares within and
    between microbatches have the expectations noise / size and (noise + K data) / size.

    Args:
        sums: sums over the group of |g[r, k]|^2, |sum over k of g[r, k]|^2 and |sum of g|^2, of summed gradients.
        rows: R, number of microbatches.
        draws: K, number of draws of each.
        size: sequences of a microbatch.
    """
    single, over_draws, total = (value / size**2 for value in sums)
    within = (single - over_draws / draws) / (rows * (draws - 1))
    between = (over_draws / draws - total / (rows * draws)) / (rows - 1)
    return Components(
        data=size * (between - within) / draws,
        noise=size * within,
        signal=total / (rows * draws) ** 2 - between / (rows * draws),
    )


def summary(groups: Sequence[Components], *, seq_length: int) -> dict[str, float | None]:
    """Return the figures of a line, from the components of all groups.

    A figure is None where the groups do not determine it: |G|^2 is estimated as 0 or less while it drowns in noise.
    """
    scale, error = scale_of(groups)
    share, share_error = noise_share_of(groups)
    data, noise, signal = mean_of(groups)
    return {
        "gradient_noise/scale": scale,
        "gradient_noise/scale_stderr": error,
        "gradient_noise/scale_tokens": None if scale is None else scale * seq_length,
        "gradient_noise/noise_share": share,
        "gradient_noise/noise_share_stderr": share_error,
        "gradient_noise/trace_data": data,
        "gradient_noise/trace_noise": noise,
        "gradient_noise/norm_squared": signal,
    }


def describe(figures: Mapping[str, float | None]) -> str:
    """Return the text for the console."""
    scale, error, share = (figures[f"gradient_noise/{name}"] for name in ("scale", "scale_stderr", "noise_share"))
    if scale is None:
        return "gradient noise scale not determined: the gradient drowns in its noise"
    spread = "" if error is None else f" +- {error:.3g}"
    part = "" if share is None else f", {share:.0%} of its variance from noise draws"
    tokens = f"{figures['gradient_noise/scale_tokens']:,.0f} tokens"
    return f"gradient noise scale {scale:.4g}{spread} sequences ({tokens}){part}"
