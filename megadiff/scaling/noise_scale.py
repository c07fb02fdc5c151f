"""Components of gradient noise scales, for the hook that measures them and the fit that reads them.

A ratio of means is not the value at the last of them: |G|^2 falls as the run goes on, so that only measurements within
a factor of 2 in steps are averaged, and stand at the geometric mean of their tokens. Nothing here needs torch or numpy.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

WIDEST = 2
"""Factor in steps within which measurements are averaged."""


class Components(NamedTuple):
    """Unbiased estimates from one group, for the gradient of a sequence's summed loss."""

    data: float
    """Part of tr S that comes from which sequence it is."""
    noise: float
    """Part of tr S that comes from how the sequence was corrupted."""
    signal: float
    """|G|^2."""


MEASURED = ("measured_trace_data", "measured_trace_noise", "measured_norm_squared")
"""Names of the components of a single measurement in its line, after `gradient_noise/`."""


def mean_of(groups: Sequence[Components]) -> Components:
    """Return the mean components."""
    return Components(*(sum(values) / len(groups) for values in zip(*groups, strict=True)))


def scale_of(groups: Sequence[Components]) -> tuple[float | None, float | None]:
    """Return tr S / |G|^2 in sequences and its standard error; None where they are not determined."""
    return _with_jackknife(groups, lambda data, noise, signal: (data + noise, signal))


def noise_share_of(groups: Sequence[Components]) -> tuple[float | None, float | None]:
    """Return the part of tr S from noise draws and its standard error; None where they are not determined."""
    return _with_jackknife(groups, lambda data, noise, signal: (noise, data + noise))


def step_windows(steps: Iterable[int]) -> list[list[int]]:
    """Return the steps in windows within a factor of 2, ascending, of which the last is as long as it can be."""
    windows: list[list[int]] = []
    for step in sorted(steps, reverse=True):
        if windows and WIDEST * step >= windows[-1][0]:
            windows[-1].append(step)
        else:
            windows.append([step])
    return [window[::-1] for window in reversed(windows)]


def _with_jackknife(
    groups: Sequence[Components], parts: Callable[[float, float, float], tuple[float, float]]
) -> tuple[float | None, float | None]:
    """Return a ratio of sums over groups and its jackknife standard error; None where a denominator is not above 0."""
    pairs = [parts(*group) for group in groups]
    top, bottom = (sum(values) for values in zip(*pairs, strict=True))
    if bottom <= 0:
        return None, None
    others = [(top - own_top, bottom - own_bottom) for own_top, own_bottom in pairs]
    if any(below <= 0 for _, below in others):
        return top / bottom, None
    ratios = [above / below for above, below in others]
    mean, count = sum(ratios) / len(ratios), len(ratios)
    return top / bottom, math.sqrt((count - 1) / count * sum((ratio - mean) ** 2 for ratio in ratios))
