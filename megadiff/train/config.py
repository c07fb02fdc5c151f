"""What a run tells while it trains, and when it is to worry."""

from __future__ import annotations

from pydantic import Field

from megadiff.config.section import Section


class LogConfig(Section):
    """`log:` the console line, `metrics.jsonl` and TensorBoard."""

    every: int = Field(default=10, gt=0)
    """Steps between lines; step 1, the last step and every skipped step always have one."""
    tensorboard: bool = True
    """Also write `tensorboard/` in the run folder."""


class HealthConfig(Section):
    """`health:` what is watched while the numbers move."""

    non_finite_limit: int = Field(default=3, ge=1)
    """Steps in a row with a loss or gradient that is not finite, each skipped, at which the run ends (exit code 5)."""
    spike_window: int = Field(default=128, ge=8)
    """Last steps that the running mean and deviation of loss and gradient norm are of; judged once half of them are
    there."""
    spike_sigma: float = Field(default=6.0, gt=0)
    """Deviations above the mean from which a loss or gradient norm is a spike."""
    skip_spikes: bool = False
    """Make no update in a step that is a spike; otherwise it is only logged."""
    check_replicas_every: int = Field(default=1000, ge=0)
    """Steps between comparisons of the weights that several ranks hold, bit for bit; 0 never compares."""
    straggler_ratio: float = Field(default=1.5, gt=1)
    """A rank whose forward and backward passes take this many times the median of its pipeline stage is named."""


class GoodputConfig(Section):
    """`goodput:` what the suggested save interval is reckoned with."""

    mtbf_hours: float | None = Field(default=None, gt=0)
    """Mean hours between failures of the whole job, where it is known; 512 to 1,024 GPUs have seen 8 to 16. Unset: as
    seen in this run, once it has failed."""
