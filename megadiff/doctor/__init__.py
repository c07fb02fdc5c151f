"""Checks of a machine and a run description before a job is queued.

`machine` and `run` hold the checks. `examination` runs them on a `Subject` and yields their findings, which it also
shows on a terminal, in a log or as JSON.
"""
