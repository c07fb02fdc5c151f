"""A default of megatron-core 0.16 that makes recomputing norms fail without Transformer Engine, mended."""

from __future__ import annotations

import importlib
from typing import Any


def mend() -> None:
    """Let `CheckpointWithoutOutput()` mean "without FP8", as its callers mean it. Safe to call again.

    Its default is `fp8=False` and what it asks is `fp8 is not None` (tensor_parallel/random.py:637), so every norm that
    is recomputed asks Transformer Engine for its FP8 state: a NameError on a machine without it. Norms that are
    modules of their own never compute in FP8 here.
    """
    random: Any = importlib.import_module("megatron.core.tensor_parallel.random")
    if random.CheckpointWithoutOutput.__init__.__defaults__ == (False,):
        random.CheckpointWithoutOutput.__init__.__defaults__ = (None,)
