"""Progress of a run at a step, in the units of the x axis."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Iterable
from typing import Literal

from megadiff.train.metrics import Line, number

Axis = Literal["tokens", "steps"]
_MOST_TOKENS = 1e30
AXIS_LABELS: dict[Axis, str] = {"tokens": "tokens seen", "steps": "optimizer steps"}


def position_of(axis: Axis, training: Iterable[Line]) -> Callable[[int], float | None]:
    """Return a function from a step to its position on the axis, or None if the position is not known.

    The tokens of steps between two training lines are interpolated, those of later steps extrapolated at the last rate;
    batches may grow during a run. For a run without training lines only step 0, with no tokens, is known.
    """
    if axis == "steps":
        return float
    known = [(0.0, 0.0)]
    for line in training:
        tokens = number(line, "tokens")
        if tokens is not None and 0 <= tokens < _MOST_TOKENS and line["step"] > known[-1][0]:
            known.append((float(line["step"]), tokens))
    steps = [step for step, _ in known]

    def place(step: int) -> float | None:
        if len(known) == 1:
            return 0.0 if step == 0 else None
        right = min(max(bisect_left(steps, step), 1), len(known) - 1)
        (step0, tokens0), (step1, tokens1) = known[right - 1], known[right]
        return tokens0 + (tokens1 - tokens0) * (step - step0) / (step1 - step0)

    return place
