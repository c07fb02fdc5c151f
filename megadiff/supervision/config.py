"""Settings for stopping a run early and for limiting the duration of its parts."""

from __future__ import annotations

from pydantic import Field

from megadiff.config.section import Section


class StopConfig(Section):
    """Conditions that stop a run, besides a signal (section `stop:`).

    A stopped run saves a checkpoint, ends with exit code 0 and can be resumed.
    """

    file: str = Field(default="STOP", min_length=1)
    """Path, relative to the run folder, of a file whose appearance stops the run."""
    grace_period_s: float = Field(default=120.0, ge=0)
    """Seconds before the end of the SLURM job (`SLURM_JOB_END_TIME`) at which the run stops: enough for one step and
    one save, and a margin."""


class WatchdogConfig(Section):
    """Limits, in seconds, on the parts of a run (section `watchdog:`).

    A rank that exceeds a limit is reported and killed after its stack traces are written. Each limit must exceed the
    slowest healthy case.
    """

    enabled: bool = True
    """Whether ranks are watched; set it to false under a debugger."""
    setup_s: float = Field(default=1800.0, gt=0)
    """Limit on setting up process groups, data and checkpoint, and again on the first step, which compiles kernels."""
    step_s: float = Field(default=600.0, gt=0)
    """Limit on one optimizer step, loading of its batch included."""
    eval_s: float = Field(default=1800.0, gt=0)
    """Limit on one evaluation."""
    save_s: float = Field(default=1800.0, gt=0)
    """Limit on the part of saving one checkpoint that blocks the training step."""

    @property
    def longest_s(self) -> float:
        """Largest limit; timeouts for waiting on other ranks must be longer."""
        return max(self.setup_s, self.step_s, self.eval_s, self.save_s)
