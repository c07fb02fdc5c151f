"""`validation.jsonl`: the bound of every validation sequence, a line per evaluation (`megadiff.scaling.paired`)."""

from __future__ import annotations

from typing import Any

from megadiff.scaling.paired import PerSequence
from megadiff.train.hooks.metrics_file import MetricsFile


class PerSequenceFile(MetricsFile):
    """A file beside `metrics.jsonl` that outlives kills and resumes as that one does.

    It is one of the run's sinks, so that checkpoints rely on its lines, but keeps no line of figures: evaluations give
    it theirs.
    """

    def write(self, line: dict[str, Any], step: int) -> None:
        """Leave a line of figures to the other sinks."""

    def add(self, step: int, figures: PerSequence) -> None:
        """Append the line of an evaluation."""
        super().write({"step": step, **figures.as_entries()}, step)
