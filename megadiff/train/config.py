"""What a run tells while it trains."""

from __future__ import annotations

from pydantic import Field

from megadiff.config.section import Section


class LogConfig(Section):
    """`log:` the console line, `metrics.jsonl` and TensorBoard."""

    every: int = Field(default=10, gt=0)
    """Steps between lines; step 1 and the last step always have one."""
    tensorboard: bool = True
    """Also write `tensorboard/` in the run folder."""
