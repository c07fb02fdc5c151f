"""One result of the doctor's checks."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Level = Literal["OK", "WARN", "FAIL"]


@dataclass(frozen=True)
class Finding:
    """The result of a check: fine, a warning, or a problem on which a run would fail."""

    level: Level
    text: str
    """Result in one line: the thing checked and its state."""
    remedy: str = ""
    """Advice on how to solve the problem; empty only if all is well."""
    check: str = ""
    """Name of the check that produced this; filled in by the examination."""


def ok(text: str) -> Finding:
    """Return a finding that all is well."""
    return Finding("OK", text)


def warn(text: str, remedy: str) -> Finding:
    """Return a finding that a run would start, but not run as well as it could."""
    return Finding("WARN", text, remedy)


def fail(text: str, remedy: str) -> Finding:
    """Return a finding that a run would not start, or would not end well."""
    return Finding("FAIL", text, remedy)
