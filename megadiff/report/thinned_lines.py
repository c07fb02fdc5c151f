"""Lines of metrics of a run of any length in bounded memory: all of a short run, and of a long one those that show.

A chart draws a few hundred points of a curve: the lowest and the highest of each interval. Lines are therefore kept in
blocks of equal length, and a block of a long run holds only lines in which a charted figure is lowest or highest, the
first and the last line, and those of steps without an update. When there are too many blocks, neighbours are joined.
"""

from __future__ import annotations

from collections.abc import Iterable

from megadiff.metric_lines import Line

CHARTED = (
    "elbo",
    "loss",
    "grad_norm",
    "lr",
    "tokens_per_s",
    "tflops_per_device",
    "executed_tflops_per_device",
    "mfu",
    "hfu",
    "peak_bytes",
)
"""Figures of training lines that are charted."""
CHARTED_BY_LOG_SNR = "loss_by_log_snr"
"""Figures by noise level that are charted, a curve for each bin."""

_NUMBERS = (float, int)

_MOST_BLOCKS = 320
_JOINED = 4
"""Number of neighbouring blocks that are joined when there are too many."""
_FIRST_LENGTH = 32
_AT_ONCE = 256
"""Number of lines of an unfinished block from which it is thinned."""


class ThinnedLines:
    """Training lines, added in the order of the file: all of the first 10,000, or of more those described above."""

    def __init__(self) -> None:
        self._blocks: list[list[Line]] = []
        self._length = _FIRST_LENGTH
        """Number of lines of the file from which a block is made."""
        self._open: list[Line] = []
        self._missing = _FIRST_LENGTH
        """Number of lines of the file that the open block still takes."""

    def add(self, line: Line) -> None:
        """Add a line."""
        self._open.append(line)
        self._missing -= 1
        if self._missing == 0:
            self._close_block()
        elif len(self._open) >= _AT_ONCE:
            self._open = _thinned(self._open)

    def in_order(self) -> list[Line]:
        """Return the lines that are kept in the order of their steps; of two with one step the one added later."""
        return in_order(line for block in (*self._blocks, self._open) for line in block)

    def _close_block(self) -> None:
        self._blocks.append(self._open if self._length == _FIRST_LENGTH else _thinned(self._open))
        if len(self._blocks) == _MOST_BLOCKS:
            firsts = range(0, _MOST_BLOCKS, _JOINED)
            joined = ([line for block in self._blocks[at : at + _JOINED] for line in block] for at in firsts)
            self._blocks = list(map(_thinned, joined))
            self._length *= _JOINED
        self._open, self._missing = [], self._length


def in_order(lines: Iterable[Line]) -> list[Line]:
    """Return lines in the order of their steps; of two with one step the later one."""
    found = {line["step"]: line for line in lines}
    return [found[step] for step in sorted(found)]


def _thinned(lines: list[Line]) -> list[Line]:
    """Return the lines of a block that are kept, in their order."""
    kept = {0, len(lines) - 1}
    kept.update(place for place, line in enumerate(lines) if line.get("skipped") is not None)
    for key in CHARTED:
        having = [place for place, line in enumerate(lines) if type(line.get(key)) in _NUMBERS]
        _keep_extremes(kept, [lines[place][key] for place in having], having)
        if len(having) < len(lines):  # the first line with null, which breaks the curve
            kept.update([place for place, line in enumerate(lines) if key in line and line[key] is None][:1])
    bins: dict[tuple[float, float], tuple[list[float], list[int]]] = {}
    for place, line in enumerate(lines):
        parts = line.get(CHARTED_BY_LOG_SNR)
        for part in parts if type(parts) is list else ():
            if type(part) is list and len(part) == 3:
                low, high, value = part
                if type(low) is type(high) is type(value) is float:
                    found = bins.get((low, high))
                    if found is None:
                        found = bins[low, high] = ([], [])
                    found[0].append(value)
                    found[1].append(place)
    for values, places in bins.values():
        _keep_extremes(kept, values, places)
    return [lines[place] for place in sorted(kept)]


def _keep_extremes(kept: set[int], values: list[float], places: list[int]) -> None:
    if values:
        kept.update((places[values.index(min(values))], places[values.index(max(values))]))
