"""Transformer Engine on this machine: whether it can be used, and its communication buffers.

Imported only where a GPU is; nothing here is called on CPU ranks but `find`'s refusal.
"""

from __future__ import annotations

import importlib
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from typing import Any

SUPPORTED = ((2, 9), (2, 12))
"""Half-open range of (major, minor) that megatron-core 0.16 and `model/fused_layers.py` were written for."""


@dataclass(frozen=True)
class Found:
    """What a look for Transformer Engine brought."""

    version: str | None
    """Of the one that can be used; None where there is none."""
    problem: str = ""
    """Why there is none, as the end of a sentence."""


def find() -> Found:
    """Import it, and check its version. Takes seconds; a GPU must be there, or the import itself may fail."""
    try:
        importlib.import_module("transformer_engine.pytorch")
        said = version("transformer_engine")
    except PackageNotFoundError:
        said = str(getattr(importlib.import_module("transformer_engine"), "__version__", "0.0"))
    except Exception as error:  # a library that does not load raises whatever its loader raises
        return Found(None, f"`import transformer_engine.pytorch` fails ({type(error).__name__}: {error})")
    number = tuple(int(part) for part in said.split(".")[:2])
    if not SUPPORTED[0] <= number < SUPPORTED[1]:
        return Found(None, f"version {said} is installed and 2.9 to 2.11 are supported")
    return Found(said)


def fp8_problem(recipe: str) -> str | None:
    """Why this GPU cannot compute with FP8 scaled by `recipe`, in Transformer Engine's words; None where it can."""
    engine: Any = importlib.import_module("transformer_engine.pytorch")
    ask = engine.is_fp8_block_scaling_available if recipe == "blockwise" else engine.is_fp8_available
    is_there, reason = ask(return_reason=True)
    return None if is_there else str(reason)


def open_overlap_buffers(*, rows: int, hidden: int, tensor_ranks: int, with_fp8: bool, with_bf16: bool) -> None:
    """Allocate the buffers through which tensor-parallel matrix products overlap with their communication.

    Once a process, before the layers are built. Collective over the world: Transformer Engine opens a group of its own.

    Args:
        rows: tokens of a microbatch, all tensor ranks together; every forward pass must bring as many.
        with_fp8, with_bf16: which kinds of layers there are; both where some layers stay in bf16.
    """
    base: Any = importlib.import_module("transformer_engine.pytorch.module.base")
    modes = base.UserBufferQuantizationMode
    wanted = [mode for mode, is_wanted in ((modes.FP8, with_fp8), (modes.NONE, with_bf16)) if is_wanted]
    base.initialize_ub(shape=[rows, hidden], tp_size=tensor_ranks, quantization_modes=wanted, bootstrap_backend="nccl")
