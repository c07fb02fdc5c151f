"""Settings of what happens beside training: the log, hooks, health checks, and the goodput."""

from __future__ import annotations

from pydantic import Field, model_validator

from megadiff.config.registry import Family
from megadiff.config.section import Section

_SECTION_OF_MEMBER = {
    "checkpoint": "checkpoint",
    "console": "log",
    "log": "log",
    "metrics_file": "log",
    "per_sequence_file": "eval",
    "replicas": "health",
    "samples": "eval",
    "stragglers": "health",
    "tensorboard": "log",
    "validation": "eval",
}
"""Members that every run has, and the section that configures each."""


class HookFamily(Family):
    """The hooks and metric sinks that the list `hooks` can name: members without those that every run has."""

    def names(self) -> list[str]:
        """Return the names of the members that can be listed."""
        return [name for name in super().names() if name not in _SECTION_OF_MEMBER]


HOOKS = HookFamily("megadiff.train.hooks")


class LogConfig(Section):
    """`log:` the console line, `metrics.jsonl` and TensorBoard."""

    every: int = Field(default=10, gt=0)
    """Steps between lines; step 1, the last step and every skipped step always have one."""
    tensorboard: bool = True
    """Also write `tensorboard/` in the run folder."""


class HookConfig(Section):
    """`hooks:` one hook or metric sink of the list; the module that it names declares its other keys."""

    name: str = Field(min_length=1)
    """Name of a hook or sink of the package, or the dotted path of a module of your own."""
    every: int = Field(default=1, gt=0)
    """Steps between calls of a hook, or between steps whose lines a sink gets; the last step is always included."""

    @model_validator(mode="after")
    def _can_be_listed(self) -> HookConfig:
        if (section := _SECTION_OF_MEMBER.get(self.name)) is not None:
            raise ValueError(
                f"`{self.name}` is part of every run, with its settings under `{section}`; leave it out here"
            )
        if not callable(getattr(HOOKS.member(self.name), "build", None)):
            raise ValueError(f"the module `{self.name}` has no function `build(settings, context)`")
        return self


class HealthConfig(Section):
    """`health:` what is watched while the numbers move."""

    non_finite_limit: int = Field(default=3, ge=1)
    """Consecutive steps with a loss or gradient that is not finite, each skipped, at which the run ends (exit code
    5)."""
    spike_window: int = Field(default=128, ge=8)
    """Number of last steps over which mean and deviation of loss and gradient norm are taken; spikes are judged once
    half of them are there."""
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
