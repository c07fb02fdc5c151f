"""Check of the run description itself."""

from __future__ import annotations

from collections.abc import Iterable

from megadiff.doctor.examination import Finding, Subject, fail, ok


def check(subject: Subject) -> Iterable[Finding]:
    """Check whether the description can be read; yield nothing if none was given."""
    if subject.problem is not None:
        yield from (fail(line, "correct the file or the override named there") for line in subject.problem.splitlines())
    elif subject.config is not None:
        config = subject.config
        yield ok(f"{config.name}: {config.steps:,} steps of {config.tokens_per_step:,} tokens into {config.folder}")
