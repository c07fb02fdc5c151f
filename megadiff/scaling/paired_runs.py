"""Settings of two noises side by side at equal compute, compared over the same validation sequences."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean

from megadiff.errors import DataError, StorageError
from megadiff.scaling.cells import size_codes
from megadiff.scaling.paired import PairedDifference, PerSequence, average, compare, read
from megadiff.scaling.points import Point, size_name

_SAME_STEP = 1.0
"""Steps up to which an evaluation is at a budget: the first step that reaches it is less than one beyond."""


@dataclass(frozen=True)
class Side:
    """One setting of a pair: its runs of all seeds."""

    noise: str
    runs: tuple[str, ...]
    steps: tuple[int, ...]
    """Steps of the evaluations, in the order of `runs`."""

    def describe(self) -> str:
        """Return noise, number of runs and steps in words."""
        steps = sorted(set(self.steps))
        runs = f"{len(self.runs)} run{'s' * (len(self.runs) > 1)}"
        return f"{self.noise} ({runs}, step{'s' * (len(steps) > 1)} {', '.join(f'{step:,}' for step in steps)})"


@dataclass(frozen=True)
class PairedRuns:
    """The difference of two settings at one budget, each the mean of its seeds."""

    flops: float
    what: str
    """Kind of the pair: `best`, or the model size that both settings have."""
    first: Side
    second: Side
    difference: PairedDifference
    """Loss of the first less that of the second, in nats per token. Its error is over sequences, between these runs."""


def paired_runs(points: Sequence[Point]) -> tuple[list[PairedRuns], list[str]]:
    """Return the best settings of each two noises at each budget, and those of one size, and sentences of refusals.

    Runs that kept no figures of single sequences within a step of a budget, and points that are not of run folders,
    have no pairs.
    """
    found: list[PairedRuns] = []
    refusals: dict[str, None] = {}
    cache: dict[str, dict[int, PerSequence]] = {}
    for flops in sorted({point.flops for point in points}):
        chosen: dict[tuple[str, str], list[Point]] = {}
        for seeds in _settings([point for point in points if point.flops == flops]):
            for what in ("best", size_name(seeds[0])):
                chosen.setdefault((what, seeds[0].noise), seeds)
        for what in dict.fromkeys(what for what, _ in chosen):
            members = {noise: seeds for (kind, noise), seeds in chosen.items() if kind == what}
            for first, second in itertools.combinations(sorted(members), 2):
                try:
                    sides = _side(members[first], cache), _side(members[second], cache)
                    if sides[0] is None or sides[1] is None:
                        continue
                    difference = compare(sides[0][1], sides[1][1])
                except DataError as error:
                    refusals[f"pairs of {first} and {second}: {error}"] = None
                    continue
                found.append(PairedRuns(flops, what, sides[0][0], sides[1][0], difference))
    return found, list(refusals)


def _settings(points: Sequence[Point]) -> list[list[Point]]:
    """Return the points of one budget by setting, of which a list has all seeds; the lowest mean loss first."""
    found: dict[tuple[object, ...], list[Point]] = {}
    for size, point in zip(size_codes([point.flops_per_token for point in points]), points, strict=True):
        found.setdefault((point.noise, int(size), point.batch_tokens, point.learning_rate), []).append(point)
    return sorted(found.values(), key=lambda seeds: fmean(point.loss for point in seeds))


def _side(seeds: Sequence[Point], cache: dict[str, dict[int, PerSequence]]) -> tuple[Side, PerSequence] | None:
    """Return the runs of a setting with the mean of their figures; None if no run has any at the budget.

    Raises:
        DataError: the seeds were evaluated on different sequences or draws.
    """
    steps = {point.run: step for point in seeds if (step := _step_at_budget(point, cache)) is not None}
    if not steps:
        return None
    side = Side(seeds[0].noise, tuple(steps), tuple(steps.values()))
    return side, average([cache[run][step] for run, step in steps.items()])


def _step_at_budget(point: Point, cache: dict[str, dict[int, PerSequence]]) -> int | None:
    """Return the step at which a point's run kept figures at its budget; None if it kept none there."""
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
    return step if abs(step - wanted) <= _SAME_STEP else None
