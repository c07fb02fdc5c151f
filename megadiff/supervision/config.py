"""What asks a run to stop, and how long its parts may take."""

from __future__ import annotations

from pydantic import Field

from megadiff.config.section import Section


class StopConfig(Section):
    """`stop:` what asks a run to stop besides a signal: it saves, ends with exit code 0 and can go on later."""

    file: str = Field(default="STOP", min_length=1)
    """A file whose appearance stops the run; its path is relative to the run folder."""
    lead_s: float = Field(default=120.0, ge=0)
    """Seconds before the end of the SLURM job (`SLURM_JOB_END_TIME`) at which the run stops: what a step and a save
    take, and some more."""


class WatchdogConfig(Section):
    """`watchdog:` seconds a part of the run may take before its rank is named, its stacks are written and it is killed.

    A limit must exceed the slowest honest case.
    """

    enabled: bool = True
    """Whether ranks are watched; set it to false under a debugger."""
    setup_s: float = Field(default=1800.0, gt=0)
    """Process groups, data and checkpoint; and, again, the first step, which compiles kernels."""
    step_s: float = Field(default=600.0, gt=0)
    """One optimizer step, its batch included."""
    eval_s: float = Field(default=1800.0, gt=0)
    """One evaluation."""
    save_s: float = Field(default=1800.0, gt=0)
    """One checkpoint, as far as the step waits for it."""

    @property
    def longest_s(self) -> float:
        """The largest limit; what waits for other ranks must wait longer."""
        return max(self.setup_s, self.step_s, self.eval_s, self.save_s)
