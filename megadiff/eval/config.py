"""Configuration of the evaluation during training."""

from __future__ import annotations

from pydantic import Field

from megadiff.config.section import Section


class EvalConfig(Section):
    """Section `eval:` the ELBO of fixed validation sequences with fixed noise, and text samples to look at."""

    every: int = Field(default=1000, ge=0)
    """Number of steps between evaluations; 0 evaluates only before the first step and after the last."""
    sequences: int = Field(default=64, gt=1)
    """Number of validation sequences, spread evenly over the validation data."""
    num_noise_levels: int = Field(default=4, gt=0)
    """Number of noise levels per sequence, stratified over the schedule."""
    samples: int = Field(default=0, ge=0, le=64)
    """Number of text samples per evaluation, written to `samples/step_XXXXXXXX.txt` of the run folder; 0 for none."""
    sample_steps: int = Field(default=64, gt=0)
    """Number of denoising steps of a text sample; each is one pass of `samples` sequences through the model."""
