"""One thing the doctor found."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Level = Literal["OK", "WARN", "FAIL"]


@dataclass(frozen=True)
class Finding:
    """OK as it is, a warning, or something a run would fail on."""

    level: Level
    text: str
    """What was looked at and found, one line."""
    remedy: str = ""
    """What to do about it; empty only where all is well."""
    check: str = ""
    """The check it comes from; filled in by the examination."""


def ok(text: str) -> Finding:
    """All is well."""
    return Finding("OK", text)


def warn(text: str, remedy: str) -> Finding:
    """A run starts, but worse than it could."""
    return Finding("WARN", text, remedy)


def fail(text: str, remedy: str) -> Finding:
    """A run would not start, or would not end well."""
    return Finding("FAIL", text, remedy)
