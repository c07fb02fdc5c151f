"""When a run saves itself."""

from __future__ import annotations

from pydantic import Field

from megadiff.config.section import Section


class CheckpointConfig(Section):
    """`checkpoint:` how often, and how many are kept. The last step is always saved."""

    every: int = Field(default=1000, gt=0)
    """Steps between checkpoints."""
    start_from: str | None = None
    """A step folder of another run to begin with, weights, optimizer and step count: a cooldown branches from a trunk
    like this. Ignored once the run has checkpoints of its own."""
    keep: int = Field(default=2, ge=0)
    """Newest complete checkpoints that stay; 0 keeps all."""
