"""When a run saves itself."""

from __future__ import annotations

from pydantic import Field, field_validator

from megadiff.config.section import Section


class CheckpointConfig(Section):
    """`checkpoint:` how often, and how many are kept. The last step is always saved."""

    every: int = Field(default=1000, gt=0)
    """Steps between checkpoints."""
    start_from: str | None = None
    """A step folder of another run to begin with, weights, optimizer and step count: a cooldown branches from a trunk
    like this. Ignored once the run has checkpoints of its own."""
    keep: int = Field(default=2, ge=0)
    """Newest complete checkpoints that stay, at least two; 0 keeps all. The last one before the cooldown stays as well,
    so that other cooldowns can branch from it."""
    in_background: bool = Field(default=True, alias="async")
    """Write while training goes on; training stops only for the copy to host memory."""

    @field_validator("keep")
    @classmethod
    def _one_is_none(cls, keep: int) -> int:
        if keep == 1:
            raise ValueError("keep must be 0 (all) or at least 2: a single checkpoint may prove damaged when needed")
        return keep
