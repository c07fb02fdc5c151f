"""Checks: a folder as a registry. A member's file offers `check(subject) -> Iterable[Finding]`; `_` starts no member.

A check yields nothing where it has nothing to look at (no run description was given, for one). It may raise: a
`MegadiffError` becomes its finding, anything else is reported as the check's own failure.
"""
