"""Display of findings on a terminal, in a log, and as JSON."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict

from rich.console import Console
from rich.table import Table
from rich.text import Text

from megadiff.doctor.finding import Finding

_COLOURS = {"OK": "green", "WARN": "yellow", "FAIL": "bold red"}


def plain_line(finding: Finding) -> str:
    """Return a finding as one line of a log."""
    remedy = f"; {finding.remedy}" if finding.remedy else ""
    return f"{finding.level:<4} {finding.check:<14} {finding.text}{remedy}"


def table(findings: Sequence[Finding]) -> Table:
    """Return a table for people; text in findings is not interpreted as markup."""
    drawn = Table("", "check", "found", "what to do", show_lines=False)
    for finding in findings:
        level = Text(finding.level, style=_COLOURS[finding.level])
        drawn.add_row(level, finding.check, Text(finding.text), Text(finding.remedy))
    return drawn


def summary(findings: Sequence[Finding]) -> str:
    """Return the number of findings of each level, in one line."""
    counts = {level: sum(finding.level == level for finding in findings) for level in _COLOURS}
    return f"{counts['OK']} fine, {counts['WARN']} warning(s), {counts['FAIL']} failure(s)"


def as_json(findings: Sequence[Finding]) -> str:
    """Return JSON for programs: `findings`, and in `failed` whether one of them is a failure."""
    return json.dumps({"failed": has_failed(findings), "findings": [asdict(finding) for finding in findings]}, indent=1)


def has_failed(findings: Sequence[Finding]) -> bool:
    """Return whether a run would fail."""
    return any(finding.level == "FAIL" for finding in findings)


def show(findings: Sequence[Finding], console: Console) -> None:
    """Print a table on a terminal, plain lines elsewhere."""
    if console.is_terminal:
        console.print(table(findings))
    else:
        for finding in findings:
            console.out(plain_line(finding), highlight=False)
    console.out(summary(findings), highlight=False)
