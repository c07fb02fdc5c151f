"""Choice of a run's loss kernel: the LM head with the objective."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from functools import partial
from typing import Literal

from megadiff.errors import ConfigError
from megadiff.loss.fused_lm_head import fused_objective
from megadiff.loss.inputs import LossOutput
from megadiff.loss.plain_lm_head import plain_objective

LossKernelName = Literal["auto", "plain", "chunked", "triton"]
LossKernel = Callable[..., LossOutput]
"""Function (hidden, weight, tokens, spec, *, shard) -> `LossOutput`; see `fused_lm_head.fused_objective`."""


def choose_loss_kernel(wanted: LossKernelName, *, is_cpu: bool) -> tuple[str, LossKernel]:
    """Return the implementation's description, for the log, and the implementation.

    Args:
        wanted: auto takes triton on GPUs if it is installed, else chunked.
        is_cpu: whether ranks run on the CPU, for which Triton has no compiler.

    Raises:
        ConfigError: triton was requested and cannot run here.
    """
    problem = _what_keeps_triton_away(is_cpu=is_cpu)
    if wanted == "triton" and problem is not None:
        raise ConfigError(
            f"objective.loss_kernel is triton, but {problem}; set objective.loss_kernel to auto or chunked"
        )
    name, why = wanted, ""
    if wanted == "auto":
        name, why = ("triton", "") if problem is None else ("chunked", f", since {problem}")
    kernels: dict[str, LossKernel] = {"plain": plain_objective, "chunked": fused_objective}
    return name + why, _triton_kernel() if name == "triton" else kernels[name]


def _what_keeps_triton_away(*, is_cpu: bool) -> str | None:
    if is_cpu:
        return "this run is on CPU ranks and Triton compiles for GPUs alone"
    if importlib.util.find_spec("triton") is None:
        return "the package triton is not installed (a CUDA build of torch brings it; pip install triton)"
    return None


def _triton_kernel() -> LossKernel:
    from megadiff.loss.triton_passes import TritonPasses

    return partial(fused_objective, passes=TritonPasses)
