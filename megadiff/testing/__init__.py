"""Contract tests: what a member of a family must satisfy, for members in this package and for the user's own.

One module a family: `check_hook` and `check_sink` in `hooks.py`. A check takes a member's name or dotted path, raises
an AssertionError or a sentence of `megadiff.errors` at the first thing that is wrong, and needs no pytest. `ranks.py`
and `toy_run.py` are the real training at toy size that checks run.
"""

from __future__ import annotations

from typing import Any


def __getattr__(name: str) -> Any:
    """Import a check when it is used: it loads torch and megatron-core."""
    if name in ("check_hook", "check_sink"):
        from megadiff.testing import hooks

        return getattr(hooks, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
