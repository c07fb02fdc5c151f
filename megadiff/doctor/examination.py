"""Runs every check; what one does, crashing and hanging included, hides nothing of the others."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from dataclasses import replace

from megadiff.config import registry
from megadiff.doctor.finding import Finding, fail
from megadiff.doctor.subject import Subject
from megadiff.errors import MegadiffError

CHECKS = "megadiff.doctor.checks"
"""The family of checks."""

LIMIT_S = 60.0
"""Seconds a check may take; a dead network disk answers never."""


def examine(subject: Subject, *, package: str = CHECKS, limit_s: float = LIMIT_S) -> Iterator[Finding]:
    """All findings, check by check in the order of their names."""
    for name in registry.names(package):
        found: list[Finding] = []
        # A daemon: a system call that never returns must not keep the process alive.
        thread = threading.Thread(target=_gather, args=(package, name, subject, found), daemon=True)
        thread.start()
        thread.join(limit_s)
        if thread.is_alive():
            found = [
                *found,
                fail(f"no answer in {limit_s:.0f} s", "look at what it touches: a dead network disk or host"),
            ]
        yield from (replace(finding, check=name) for finding in found)


def _gather(package: str, name: str, subject: Subject, found: list[Finding]) -> None:
    try:
        for finding in registry.member(package, name).check(subject):
            found.append(finding)
    except MegadiffError as error:
        found.append(fail(_one_line(str(error)), "change what the sentence names"))
    except BaseException as error:  # some libraries' errors are no Exceptions; a thread must not end in silence
        found.append(
            fail(
                f"the check itself failed ({type(error).__name__}: {_one_line(str(error))})",
                "the other findings stand; if a library is missing install it, else report this",
            )
        )


def _one_line(text: str) -> str:
    return "; ".join(line.strip() for line in text.splitlines() if line.strip())
