"""The choice of a model's kernels on this machine, known before megatron-core is loaded."""

from __future__ import annotations

import os
import shutil
import sys

from megadiff.errors import PlatformError
from megadiff.model.config import ModelConfig, PrecisionConfig
from megadiff.parallel.config import ParallelConfig
from megadiff.platform import transformer_engine
from megadiff.platform.machine import Layers, Platform


def layers_for(precision: PrecisionConfig, platform: Platform) -> Layers:
    """Return the implementation of the layers: the platform's in bf16, the local one in float32."""
    return platform.layers if precision.compute == "bf16" else "local"


def fuses_weight_gradients(parallel: ParallelConfig, precision: PrecisionConfig, platform: Platform) -> bool:
    """Return whether weight gradients are accumulated inside their matrix products."""
    return (
        parallel.gradient_accumulation_fusion is not False
        and platform.weight_gradients is not None
        and _has_float32_gradients(precision)
    )


def check_kernels(parallel: ParallelConfig, precision: PrecisionConfig, platform: Platform) -> None:
    """Refuse what this machine cannot do, before any process group exists.

    Raises:
        PlatformError: FP8 or tensor overlap without Transformer Engine, FP8 on a GPU that has none, compiled blocks
            where they cannot be, or a fusion of weight gradients that was insisted on and cannot be.
    """
    has_engine = layers_for(precision, platform) == "transformer_engine"
    wanted = {
        f"precision.fp8={precision.fp8}": precision.fp8 != "none",
        "parallel.tp_comm_overlap=true": parallel.tp_comm_overlap,
    }
    for setting, is_wanted in wanted.items():
        if is_wanted and not has_engine:
            reason = platform.layers_problem or ("this run is on CPU" if platform.is_cpu else "kernels is `local`")
            raise PlatformError(f"{setting} needs Transformer Engine's layers on a GPU, but {reason}; leave it out")
    if precision.fp8 != "none" and (problem := transformer_engine.fp8_problem(precision.fp8)) is not None:
        raise PlatformError(f"precision.fp8={precision.fp8} cannot be computed on {platform.device_name}: {problem}")
    if precision.compile:
        check_compilation(parallel, gpu=None if platform.is_cpu else platform.kind)
        _check_compiler()
    if parallel.gradient_accumulation_fusion is True and not fuses_weight_gradients(parallel, precision, platform):
        reason = platform.weight_gradients_problem or "it needs precision.compute=bf16 and master_weights=true"
        raise PlatformError(f"parallel.gradient_accumulation_fusion is true, but {reason}; set it to auto")


def check_compilation(parallel: ParallelConfig, *, gpu: str | None = None) -> None:
    """Refuse what compiled blocks cannot do.

    Args:
        parallel: the run's layout.
        gpu: kind of the platform if it has GPUs.

    Raises:
        PlatformError: the platform or a setting cannot be combined with `precision.compile`.
    """
    unsupported = {
        f"platform={gpu}": gpu is not None,
        f"parallel.tensor={parallel.tensor}": parallel.tensor > 1,
        f"parallel.recompute={parallel.recompute}": parallel.recompute != "none",
        "parallel.overlap_param_gather=true": parallel.overlap_param_gather,
    }
    for setting, is_set in unsupported.items():
        if is_set:
            raise PlatformError(f"precision.compile does not work with {setting}; leave one of them out")


def _check_compiler() -> None:
    """Refuse a machine without a C++ compiler.

    Raises:
        PlatformError: none is found.
    """
    compiler = os.environ.get("CXX") or ("clang++" if sys.platform == "darwin" else "g++")
    if shutil.which(compiler) is None:
        raise PlatformError(
            f"precision.compile needs a C++ compiler, but {compiler} was not found; install it, name another in the "
            "environment variable CXX, or leave precision.compile out"
        )


def open_tensor_overlap(
    model: ModelConfig, parallel: ParallelConfig, precision: PrecisionConfig, *, micro_batch_size: int
) -> None:
    """Allocate the communication buffers of `parallel.tp_comm_overlap`, before the layers are built; nothing without
    it.

    Collective over the world.
    """
    if parallel.tp_comm_overlap:
        transformer_engine.open_overlap_buffers(
            sequences=micro_batch_size * model.seq_length,
            hidden=model.hidden,
            tensor_ranks=parallel.tensor,
            with_fp8=precision.fp8 != "none",
            with_bf16=True,  # evaluation computes in bf16 whatever the training does
        )


def describe_kernels(parallel: ParallelConfig, precision: PrecisionConfig, platform: Platform) -> str:
    """Return the line of the log that names each choice."""
    has_engine = layers_for(precision, platform) == "transformer_engine"
    parts = ["Transformer Engine's layers" if has_engine else "local layers"]
    if precision.fp8 != "none":
        ends = precision.fp8_first_last_bf16
        parts.append(f"FP8 {precision.fp8}" + (f" but for {ends} block(s) at either end" if ends else ""))
    else:
        parts.append(precision.compute)
    if fuses_weight_gradients(parallel, precision, platform):
        parts.append(f"weight gradients added up by {platform.weight_gradients}")
    elif not platform.is_cpu and parallel.gradient_accumulation_fusion is not False:
        reason = platform.weight_gradients_problem or "no float32 gradients of bf16 products"
        parts.append(f"weight gradients added up apart ({reason})")
    if precision.compile:
        parts.append("blocks compiled for training")
    if parallel.tp_comm_overlap:
        parts.append("tensor-parallel communication overlapped")
    if parallel.recompute == "full":
        parts.append(f"recomputing {parallel.recompute_layers or 'all'} block(s) of each chunk")
    elif parallel.recompute == "selective":
        parts.append(f"recomputing {', '.join(parallel.recomputed_modules)}")
    return "; ".join(parts)


def _has_float32_gradients(precision: PrecisionConfig) -> bool:
    return precision.compute == "bf16" and precision.master_weights
