"""How a run is measured on held-out text."""

from __future__ import annotations

from pydantic import Field

from megadiff.config.section import Section


class EvalConfig(Section):
    """`eval:` the held-out evidence bound, on fixed rows with fixed noise; and text to look at."""

    every: int = Field(default=1000, ge=0)
    """Steps between evaluations; 0 evaluates only before the first step and after the last."""
    rows: int = Field(default=64, gt=1)
    """Held-out rows, spread evenly over the validation data."""
    noise_levels: int = Field(default=4, gt=0)
    """Noise levels per row, stratified over the schedule."""
    samples: int = Field(default=0, ge=0, le=64)
    """Rows of text drawn with each evaluation, into `samples/step_XXXXXXXX.txt` of the run folder; 0 draws none."""
    sample_steps: int = Field(default=64, gt=0)
    """Denoising steps of such a row: each is one pass of `samples` rows through the model."""
