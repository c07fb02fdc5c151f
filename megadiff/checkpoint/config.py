"""When a run saves itself."""

from __future__ import annotations

from pydantic import Field

from megadiff.config.section import Section


class CheckpointConfig(Section):
    """`checkpoint:` how often, and how many are kept. The last step is always saved."""

    every: int = Field(default=1000, gt=0)
    """Steps between checkpoints."""
    keep: int = Field(default=2, ge=0)
    """Newest complete checkpoints that stay; 0 keeps all."""
