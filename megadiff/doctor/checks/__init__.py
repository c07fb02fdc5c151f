"""The doctor's checks: every file of this folder is one, except those whose names start with `_`.

A file defines `check(subject) -> Iterable[Finding]`. A check yields nothing if there is nothing to examine (for example
because no run description was given). It may raise: a `MegadiffError` becomes its finding, anything else is reported as
a failure of the check itself.
"""
