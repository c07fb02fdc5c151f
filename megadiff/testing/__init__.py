"""Contract tests: what a member of a family must satisfy, for members in this package and for the user's own.

One module a family: `check_optimizer` in `optimizers.py`, `check_tokenizer` in `tokenizers.py`, `check_process` in
`processes.py`, `check_weighting` in `weightings.py`, `check_method` in `methods.py`, `check_hook` and `check_sink` in
`hooks.py`. A check takes a member's name or dotted path, raises an AssertionError or a sentence of `megadiff.errors`
at the first thing that is wrong, and needs no pytest. `ranks.py` and `toy_run.py` are the real training at toy size
that checks run. `coordinates.py` checks a parametrisation over model sizes, for `megadiff coordinate_check`.
"""

from __future__ import annotations

import importlib
from typing import Any

_MODULES = {
    "check_hook": "hooks",
    "check_method": "methods",
    "check_optimizer": "optimizers",
    "check_process": "processes",
    "check_sink": "hooks",
    "check_tokenizer": "tokenizers",
    "check_weighting": "weightings",
}


def __getattr__(name: str) -> Any:
    """Import a check when it is used: those of optimizers load torch and megatron-core."""
    if name in _MODULES:
        return getattr(importlib.import_module(f"{__name__}.{_MODULES[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
