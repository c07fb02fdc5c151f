"""Axes: a range of values, linear or logarithmic, mapped to 0 to 1, with round ticks."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

_SMALLEST, _LARGEST = 1e-280, 1e280
"""Bounds on the sizes of numbers that axes can show; their ratios and differences do not overflow."""


@dataclass(frozen=True)
class Scale:
    """A range of values with `low < high`, both positive if it is logarithmic."""

    low: float
    high: float
    is_log: bool = False

    def at(self, value: float) -> float:
        """Return the position of a value: 0 at `low`, 1 at `high`."""
        low, high = self._bent(self.low), self._bent(self.high)
        inside = max(_held(value), self.low) if self.is_log else _held(value)
        return (self._bent(inside) - low) / (high - low)

    def ticks(self, most: int = 6) -> list[float]:
        """Return round values inside the range, at least two if the range allows it."""
        return self._decades(most) if self.is_log else _round_steps(self.low, self.high, most)

    def _bent(self, value: float) -> float:
        return math.log10(value) if self.is_log else value

    def _decades(self, most: int) -> list[float]:
        """Return powers of ten; if there are too few, also their multiples by 2 and 5, or else linear steps."""
        first, last = math.floor(math.log10(self.low)), math.ceil(math.log10(self.high))
        for factors in ((1,), (1, 2, 5)):
            found = [f * 10.0**power for power in range(first, last + 1) for f in factors]
            inside = [value for value in found if self.low <= value <= self.high]
            if len(inside) >= 3:
                return inside[:: math.ceil(len(inside) / most)]
        return _round_steps(self.low, self.high, most)


def scale_of(values: Iterable[float], *, is_log: bool = False, margin: float = 0.05) -> Scale | None:
    """Return a scale that shows all values with a margin; None if no value can be shown."""
    shown = [_held(value) for value in values if not is_log or value > 0]
    shown = [value for value in shown if not is_log or value > 0]
    if not shown:
        return None
    low, high = min(shown), max(shown)
    if is_log:
        room = max(margin * (math.log10(high) - math.log10(low)), 0.02)
        return Scale(low / 10**room, high * 10**room, True)
    room = margin * (high - low) or 0.05 * abs(high) or 1.0
    return Scale(low - room, high + room)


def _held(value: float) -> float:
    """Clamp a value to sizes for which sums, differences and powers of ten can be computed; tiny values become 0."""
    if abs(value) < _SMALLEST:
        return 0.0
    return min(max(value, -_LARGEST), _LARGEST)


def _round_steps(low: float, high: float, most: int) -> list[float]:
    rough = (high - low) / most
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(factor * power for factor in (1, 2, 2.5, 5, 10) if factor * power >= rough * (1 - 1e-9))
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    return [round(place * step, 12 - math.floor(math.log10(step))) for place in range(first, last + 1)]
