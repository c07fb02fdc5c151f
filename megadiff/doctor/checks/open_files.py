"""Check of the number of files and sockets that a process may have open."""

from __future__ import annotations

import resource
from collections.abc import Iterable

from megadiff.doctor.examination import Finding, Subject, fail, ok, warn

_BASE, _PER_RANK, _COMFORT = 128, 8, 1024


def check(subject: Subject) -> Iterable[Finding]:
    """Compare the limit with the needs of a rank: data files, its log, and sockets to the ranks of each of its
    groups."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    sources = (
        len(subject.config.data.training_sources) + len(subject.config.data.valid) if subject.config is not None else 0
    )
    needed = _BASE + _PER_RANK * subject.ranks + 2 * sources
    if soft == resource.RLIM_INFINITY:
        yield ok("a process may open any number of files")
        return
    message = f"a process may open {soft} files; {subject.ranks} rank(s) may need about {needed} each"
    ceiling = "unlimited" if hard == resource.RLIM_INFINITY else str(hard)
    remedy = f"ulimit -n {max(4096, 2 * needed)} before the launch (the hard limit is {ceiling})"
    if soft < needed:
        yield fail(message, remedy)
    else:
        yield ok(message) if soft >= _COMFORT else warn(message, remedy)
