"""Check of Python and the libraries: inside the ranges tested for this release, and without known vulnerabilities."""

from __future__ import annotations

import re
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version

from megadiff.doctor.examination import Finding, Subject, fail, ok, warn
from megadiff.platform import megatron_versions


@dataclass(frozen=True)
class Range:
    """A range of versions from `low` up to but excluding `high`, compared by their leading numbers."""

    project: str
    low: tuple[int, ...]
    high: tuple[int, ...] | None
    below: str
    """Problem of older versions."""
    is_needed: bool = True


_HOLES = "loading a file can corrupt memory or run code (CVE-2025-32434 below 2.6, CVE-2026-24747 below 2.10)"
_RANGES = (
    Range("torch", (2, 10), None, _HOLES),
    Range(
        "megatron-core",
        *megatron_versions.SUPPORTED,
        "untried here; below 0.15.3 also CVE-2026-24150 and CVE-2026-24152",
    ),
    Range("numpy", (1, 26), None, "untried here"),
    Range("transformer-engine", (2, 9), (2, 12), "untried with megatron-core 0.16 to 0.19", is_needed=False),
)


def check(subject: Subject) -> Iterable[Finding]:
    """Check Python first, then each library."""
    del subject
    found = sys.version_info[:2]
    message = ".".join(map(str, found))
    if (3, 10) <= found < (3, 14):
        yield ok(f"Python {message}")
    else:
        yield fail(f"Python {message}, wanted 3.10 to 3.13", "make the virtual environment with one of those")
    for wanted in _RANGES:
        try:
            yield judge(wanted, version(wanted.project))
        except PackageNotFoundError:
            if wanted.is_needed:
                yield fail(f"{wanted.project} is not installed", f"pip install '{requirement(wanted)}'")


def judge(wanted: Range, text: str) -> Finding:
    """Return the finding for an installed version."""
    numbers = tuple(int(number) for number in re.findall(r"\d+", text)[:3])
    remedy = f"pip install '{requirement(wanted)}'"
    if numbers < wanted.low:
        return fail(f"{wanted.project} {text}: {wanted.below}", remedy)
    if wanted.high is not None and numbers >= wanted.high:
        return warn(f"{wanted.project} {text} is newer than any this release was tested with", remedy)
    return ok(f"{wanted.project} {text}")


def requirement(wanted: Range) -> str:
    """Return the requirement in pip's syntax."""
    low, high = (".".join(map(str, numbers)) for numbers in (wanted.low, wanted.high or ()))
    return f"{wanted.project}>={low}" + (f",<{high}" if high else "")
