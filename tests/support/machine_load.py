"""Time limits of tests that hold promises in seconds, on machines that others use too."""

from __future__ import annotations

import os


def within(seconds: float) -> float:
    """Return the limit to assert: `seconds`, or in proportion more where over two processes compete for each core.

    The promise is about a machine with time to spare. Under load a rank waits for its turn to run, and the same
    measurement then shows the scheduler's queue.
    """
    waiting = os.getloadavg()[0] / (os.cpu_count() or 1)
    return seconds * (waiting if waiting > 2.0 else 1.0)
