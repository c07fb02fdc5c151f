"""Configuration of the evaluation during training."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from megadiff.config.section import Section


class EvalConfig(Section):
    """Section `eval:` the ELBO of fixed validation sequences with fixed noise, and text samples to look at."""

    every: int = Field(default=1000, ge=0)
    """Number of steps between evaluations; 0 evaluates only before the first step and after the last, and at the steps
    that `at_steps` and `at_flops` name."""
    at_steps: tuple[Annotated[int, Field(gt=0)], ...] = ()
    """Further steps with an evaluation, at most the run's last."""
    at_flops: tuple[Annotated[float, Field(gt=0, allow_inf_nan=False)], ...] = ()
    """Budgets with an evaluation each: at the first step after which the run's training FLOPs reach them, by
    `schedule.flop_count` and counted as `flops` in `metrics.jsonl`; at most what the whole run takes."""
    sequences: int = Field(default=64, gt=1)
    """Number of validation sequences, spread evenly over the validation data."""
    num_noise_levels: int = Field(default=4, gt=0)
    """Number of noise levels per sequence, stratified over the schedule."""
    samples: int = Field(default=0, ge=0, le=64)
    """Number of text samples per evaluation, written to `samples/step_XXXXXXXX.txt` of the run folder; 0 for none."""
    sample_steps: int = Field(default=64, gt=0)
    """Number of denoising steps of a text sample; each is one pass of `samples` sequences through the model."""
