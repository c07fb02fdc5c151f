"""Settings for saving checkpoints."""

from __future__ import annotations

from pydantic import Field, field_validator, model_validator

from megadiff.config.section import Section


class CheckpointConfig(Section):
    """Frequency of checkpoints and number of those kept (section `checkpoint:`). The last step is always saved."""

    every: int = Field(default=1000, gt=0)
    """Number of steps between checkpoints."""
    start_from: str | None = None
    """Step folder of another run to begin with, including weights, optimizer state and step count; this is how a
    cooldown branches from a trunk. Ignored once the run has checkpoints of its own."""
    weights_only: bool = False
    """Whether the run takes only the weights of `start_from`, with a new optimizer and schedule, from step 0 on; this
    is how a model is adapted or fine-tuned. Imported weights are always taken so."""
    keep: int = Field(default=2, ge=0)
    """Number of newest complete checkpoints to keep, at least two (1 is refused); 0 keeps all. The last one before the
    cooldown is kept as well, so that other cooldowns can branch from it."""
    in_background: bool = Field(default=True, alias="async")
    """Whether files are written while training continues; training then pauses only for the copy to host memory."""

    @property
    def branches_from(self) -> str | None:
        """Step folder whose run this one continues; None for a run from step 0, with the weights of another or not."""
        return None if self.weights_only else self.start_from

    @field_validator("keep")
    @classmethod
    def _one_is_none(cls, keep: int) -> int:
        if keep == 1:
            raise ValueError("keep must be 0 (all) or at least 2: a single checkpoint may prove damaged when needed")
        return keep

    @model_validator(mode="after")
    def _weights_have_an_origin(self) -> CheckpointConfig:
        if self.weights_only and self.start_from is None:
            raise ValueError("weights_only is true, but start_from names no checkpoint to take weights from")
        return self
