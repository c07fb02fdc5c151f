"""When a figure is a spike: far above its own recent mean."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterable


class RollingFigure:
    """The last `window` values of a figure, and whether the next one stands out.

    Spiking values join the window too: a figure that moves to a new level for good widens the deviation and is taken
    for normal within a few steps, so a rule that skips updates cannot skip for ever.

    Args:
        window: values kept; judgement begins once half of them are there.
        sigma: deviations above the mean from which a value is a spike.
    """

    def __init__(self, *, window: int, sigma: float) -> None:
        self._values: deque[float] = deque(maxlen=window)
        self._least = max(2, window // 2)
        self._sigma = sigma

    @property
    def values(self) -> list[float]:
        """What is kept, oldest first: the whole state."""
        return list(self._values)

    def refill(self, values: Iterable[float]) -> None:
        """Take over the state of another one; of more values than the window holds, the last."""
        self._values.clear()
        self._values.extend(values)

    def add(self, value: float) -> None:
        """Remember a finite value."""
        self._values.append(value)

    def spike(self, value: float) -> str | None:
        """What makes `value` a spike beside the values so far, in words; None where it is none."""
        count = len(self._values)
        if count < self._least:
            return None
        mean = math.fsum(self._values) / count
        deviation = math.sqrt(math.fsum((kept - mean) ** 2 for kept in self._values) / (count - 1))
        if value <= mean + self._sigma * deviation:
            return None
        return f"{value:.5g} against {mean:.5g} +- {deviation:.2g} over the {count} steps before"
