"""Time spent in marked intervals of work, measured without waiting for the device."""

from __future__ import annotations

import time
from typing import Any, Protocol

import torch

from megadiff.platform.machine import Platform


class Stopwatch(Protocol):
    """A clock that adds up the intervals between `start` and `stop`."""

    def start(self) -> None:
        """Begin an interval."""
        ...

    def stop(self) -> None:
        """End the interval."""
        ...

    def read(self) -> float:
        """Return the seconds of all finished intervals that no earlier reading has counted."""
        ...


def stopwatch(platform: Platform) -> Stopwatch:
    """Return the stopwatch for the platform: wall time on CPU ranks, time of the current stream on CUDA."""
    return WallStopwatch() if platform.is_cpu else EventStopwatch()


class WallStopwatch:
    """Wall time of the calling thread's work."""

    def __init__(self) -> None:
        self._seconds = 0.0
        self._started: float | None = None

    def start(self) -> None:
        """Begin an interval; one that was never stopped is dropped."""
        self._started = time.perf_counter()

    def stop(self) -> None:
        """End the interval."""
        if self._started is not None:
            self._seconds += time.perf_counter() - self._started
            self._started = None

    def read(self) -> float:
        """Return the seconds since the last reading."""
        seconds, self._seconds = self._seconds, 0.0
        return seconds


class EventStopwatch:
    """Time between events on the current CUDA stream, read once the device has passed them."""

    def __init__(self) -> None:
        self._free: list[Any] = []
        self._pending: list[tuple[Any, Any]] = []
        self._started: Any = None

    def start(self) -> None:
        """Begin an interval; one that was never stopped is dropped."""
        self._started = self._recorded()

    def stop(self) -> None:
        """End the interval."""
        if self._started is not None:
            self._pending.append((self._started, self._recorded()))
            self._started = None

    def read(self) -> float:
        """Return the seconds of the intervals that the device has finished; the others are left for a later reading."""
        milliseconds, waiting = 0.0, []
        for start, stop in self._pending:
            if stop.query():
                milliseconds += start.elapsed_time(stop)
                self._free += [start, stop]
            else:
                waiting.append((start, stop))
        self._pending = waiting
        return milliseconds / 1e3

    def _recorded(self) -> Any:
        event = self._free.pop() if self._free else torch.cuda.Event(enable_timing=True)
        event.record()
        return event
