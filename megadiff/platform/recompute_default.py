"""A fix for a default of megatron-core 0.16 that makes recomputing norms fail without Transformer Engine."""

from __future__ import annotations

import importlib
from typing import Any


def fix() -> None:
    """Make `CheckpointWithoutOutput()` mean "without FP8", as its callers intend. It is safe to call this again.

    Its default is `fp8=False`, but it tests `fp8 is not None` (tensor_parallel/random.py:637), so every recomputed norm
    requests Transformer Engine's FP8 state, which is a NameError on a machine without that library. Norms that are
    separate modules never compute in FP8 here.
    """
    random: Any = importlib.import_module("megatron.core.tensor_parallel.random")
    if random.CheckpointWithoutOutput.__init__.__defaults__ == (False,):
        random.CheckpointWithoutOutput.__init__.__defaults__ = (None,)
