"""Comparison of this machine's clock with that of the disk the run writes to."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterable

from megadiff.doctor.examination import Finding, Subject, ok, warn

_TOLERATED_S = 5.0


def check(subject: Subject) -> Iterable[Finding]:
    """Compare the time of a new file with the clock.

    Yields nothing if no file can be created, because the check of the disk reports that.
    """
    folder = subject.existing_folder
    try:
        with tempfile.NamedTemporaryFile(prefix=".doctor-", dir=folder) as file:
            file.write(b".")
            file.flush()
            skew = os.stat(file.name).st_mtime - subject.now()
    except OSError:
        return
    message = (
        f"files of {folder} are dated {abs(skew):.1f} s {'ahead of' if skew > 0 else 'behind'} this machine's clock"
    )
    remedy = (
        "set both by NTP (chronyc tracking); runs go by steps, not dates, but logs of several nodes will not line up"
    )
    yield ok(message) if abs(skew) <= _TOLERATED_S else warn(message, remedy)
