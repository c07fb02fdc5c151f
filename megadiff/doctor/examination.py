"""Run all checks in isolation: one that crashes or hangs does not affect the others."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from dataclasses import replace

from megadiff.config import registry
from megadiff.doctor.finding import Finding, fail
from megadiff.doctor.subject import Subject
from megadiff.errors import MegadiffError

CHECKS = "megadiff.doctor.checks"
"""Package with the family of checks."""

LIMIT_S = 60.0
"""Timeout per check in seconds; a hung network file system never returns."""


def examine(subject: Subject, *, package: str = CHECKS, limit_s: float = LIMIT_S) -> Iterator[Finding]:
    """Yield all findings, check by check in the order of the checks' names."""
    for name in registry.names(package):
        found: list[Finding] = []
        # A daemon thread, because a system call that never returns must not keep the process alive.
        thread = threading.Thread(target=_gather, args=(package, name, subject, found), daemon=True)
        thread.start()
        thread.join(limit_s)
        if thread.is_alive():
            found = [
                *found,
                fail(
                    f"no answer in {limit_s:.0f} s",
                    "check the disk and host it uses for a hang",
                ),
            ]
        yield from (replace(finding, check=name) for finding in found)


def _gather(package: str, name: str, subject: Subject, found: list[Finding]) -> None:
    try:
        for finding in registry.member(package, name).check(subject):
            found.append(finding)
    except MegadiffError as error:
        found.append(fail(_one_line(str(error)), "correct the setting that the message names"))
    except BaseException as error:  # some libraries raise errors that are no Exceptions; report these too
        found.append(
            fail(
                f"the check itself failed ({type(error).__name__}: {_one_line(str(error))})",
                "the other findings are valid; install the library if one is missing, else report this",
            )
        )


def _one_line(text: str) -> str:
    return "; ".join(line.strip() for line in text.splitlines() if line.strip())
