"""Runs of two noises side by side at equal compute, compared over the same validation sequences."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from megadiff.errors import DataError, StorageError
from megadiff.scaling.paired import PairedDifference, PerSequence, compare, read
from megadiff.scaling.points import Point, size_name

_SAME_STEP = 0.02
"""Relative difference up to which an evaluation is at a budget; budgets are reached in whole steps."""


@dataclass(frozen=True)
class PairedRuns:
    """The difference of two runs at one budget."""

    flops: float
    what: str
    """Kind of the pair: `best`, or the model size that both runs have."""
    first: str
    second: str
    first_noise: str
    second_noise: str
    difference: PairedDifference
    """Loss of the first less that of the second, in nats per token."""


def paired_runs(points: Sequence[Point]) -> tuple[list[PairedRuns], list[str]]:
    """Return the best runs of each two noises at each budget, and their runs of one size, and sentences of refusals.

    Runs that kept no figures of single sequences at a budget, and points that are not of run folders, have no pairs.
    """
    found: list[PairedRuns] = []
    refusals: dict[str, None] = {}
    cache: dict[str, dict[int, PerSequence]] = {}
    for flops in sorted({point.flops for point in points}):
        own = sorted((point for point in points if point.flops == flops), key=lambda point: point.loss)
        chosen: dict[tuple[str, str], Point] = {}
        for point in own:
            for what in ("best", size_name(point)):
                chosen.setdefault((what, point.noise), point)
        for what in dict.fromkeys(what for what, _ in chosen):
            members = [point for (kind, _), point in chosen.items() if kind == what]
            for first, second in itertools.combinations(sorted(members, key=lambda point: point.noise), 2):
                figures = _figures(first, cache), _figures(second, cache)
                if figures[0] is None or figures[1] is None:
                    continue
                try:
                    difference = compare(figures[0], figures[1])
                except DataError as error:
                    refusals[f"pairs of {first.noise} and {second.noise}: {error}"] = None
                    continue
                found.append(
                    PairedRuns(flops, what, first.run, second.run, first.noise, second.noise, difference)
                )  # fmt: skip
    return found, list(refusals)


def _figures(point: Point, cache: dict[str, dict[int, PerSequence]]) -> PerSequence | None:
    """Return the figures of a point's run at its budget; None if it kept none there."""
    if point.run not in cache:
        folder = Path(point.run)
        try:
            cache[point.run] = read(folder) if folder.is_dir() else {}
        except (StorageError, ValueError):
            cache[point.run] = {}
    wanted = point.step
    if wanted is None or not cache[point.run]:
        return None
    step = min(cache[point.run], key=lambda each: abs(each - wanted))
    return cache[point.run][step] if abs(step - wanted) <= max(1.0, _SAME_STEP * wanted) else None
