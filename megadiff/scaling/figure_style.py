"""Colours of figures: readable on white and on black, and the same as those of a report's charts."""

from __future__ import annotations

import colorsys

SERIES = ("#0072b2", "#d55e00", "#007a5a", "#b2589a", "#9a6a00", "#444444")
"""Colours of series, in the order of a report's palette on white paper."""
QUIET = "#5c6370"
"""Colour of what stands back: grid, ranges, remarks."""


def series(place: int) -> str:
    """Return the colour of a series; colours repeat after the sixth."""
    return SERIES[place % len(SERIES)]


def ordered(place: int, count: int) -> tuple[float, float, float]:
    """Return the colour of one of several ordered things: from blue to red, all about equally bright."""
    share = place / max(count - 1, 1)
    red, green, blue = colorsys.hls_to_rgb(0.60 + 0.42 * share, 0.52, 0.70)
    brightness = 0.2126 * red**2.2 + 0.7152 * green**2.2 + 0.0722 * blue**2.2
    factor = (0.21 / brightness) ** (1 / 2.2)
    return min(1.0, red * factor), min(1.0, green * factor), min(1.0, blue * factor)
