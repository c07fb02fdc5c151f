"""Checks of a machine and a run description before a job is queued.

Every file of `checks` is one check. `examination` runs them on a `Subject` and yields their findings, which it also
shows on a terminal, in a log or as JSON.
"""
