"""Transformer Engine on this machine: whether it can be used, and its communication buffers.

It is imported only on machines with a GPU; CPU ranks use nothing from here except the refusal of `find`. A test builds
its layers without one (`tests/model/test_fused_layers.py`).
"""

from __future__ import annotations

import importlib
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from megadiff.platform.megatron_versions import major_minor

SUPPORTED = ((2, 9), (2, 12))
"""Half-open range of versions (major, minor) that megatron-core and `model/fused_layers.py` were checked against."""
SUPPORTED_VERSIONS = "2.9 to 2.11"
"""The same range for messages."""


@dataclass(frozen=True)
class Found:
    """The result of a search for Transformer Engine."""

    version: str | None
    """Version of the usable library; None if there is none."""
    problem: str = ""
    """Reason why there is none, as the end of a sentence."""


def find() -> Found:
    """Import the library and check its version.

    This takes seconds and needs a GPU: without one the import itself may fail.
    """
    try:
        importlib.import_module("transformer_engine.pytorch")
        installed = version("transformer_engine")
    except PackageNotFoundError:
        installed = str(getattr(importlib.import_module("transformer_engine"), "__version__", "0.0"))
    except Exception as error:  # a library that does not load raises whatever its loader raises
        return Found(None, f"`import transformer_engine.pytorch` fails ({type(error).__name__}: {error})")
    if not is_supported(installed):
        return Found(None, f"version {installed} is installed and {SUPPORTED_VERSIONS} are supported")
    return Found(installed)


def is_supported(installed: str) -> bool:
    """Return whether a version of the library is one of those in `SUPPORTED`."""
    return SUPPORTED[0] <= major_minor(installed) < SUPPORTED[1]


def fp8_problem(recipe: str) -> str | None:
    """Return why this GPU cannot compute in FP8 scaled by `recipe`, in Transformer Engine's words; None if it can."""
    engine: Any = importlib.import_module("transformer_engine.pytorch")
    ask = engine.is_fp8_block_scaling_available if recipe == "blockwise" else engine.is_fp8_available
    is_there, reason = ask(return_reason=True)
    return None if is_there else str(reason)


def open_overlap_buffers(*, sequences: int, hidden: int, tensor_ranks: int, with_fp8: bool, with_bf16: bool) -> None:
    """Allocate the buffers through which tensor-parallel matrix products overlap with their communication.

    To be called once per process, before the layers are built. It is a collective call of all ranks, because
    Transformer Engine opens a process group of its own.

    Args:
        sequences: number of tokens in a microbatch, of all tensor ranks together; every forward pass must have exactly
            as many.
        with_fp8, with_bf16: kinds of layers in the model; both if some layers stay in bf16.
    """
    base: Any = importlib.import_module("transformer_engine.pytorch.module.base")
    modes = base.UserBufferQuantizationMode
    wanted = [mode for mode, is_wanted in ((modes.FP8, with_fp8), (modes.NONE, with_bf16)) if is_wanted]
    base.initialize_ub(
        shape=[sequences, hidden], tp_size=tensor_ranks, quantization_modes=wanted, bootstrap_backend="nccl"
    )
