"""The implementation of a model's layers, and megatron-core's configuration."""

from __future__ import annotations

from importlib import import_module
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from megadiff.errors import PlatformError
from megadiff.model import fp8
from megadiff.model.config import ModelConfig, PrecisionConfig
from megadiff.model.layers import LayerModules, local_parts
from megadiff.parallel.config import ParallelConfig
from megadiff.platform import transformer_engine
from megadiff.platform.machine import Layers, Platform


def transformer_config(
    model: ModelConfig, *, parallel: ParallelConfig, precision: PrecisionConfig, platform: Platform
) -> TransformerConfig:
    """megatron-core's settings for this model on this machine.

    Batched P2P is off on gloo, and with interleaving everywhere: two stages with virtual chunks exchange two messages
    each way in one batch and megatron-core matches them crosswise, wrong gradients without an error (its check lives
    in `megatron.training`, not in core). Overlapped P2P is off: on gloo a deallocated output races with its own send.
    """
    dtype = torch.bfloat16 if precision.compute == "bf16" else torch.float32
    interleaved = parallel.virtual_pipeline > 1
    return TransformerConfig(
        num_layers=model.layers,
        hidden_size=model.hidden,
        num_attention_heads=model.heads,
        ffn_hidden_size=model.ffn_hidden,
        kv_channels=model.head_dim,
        normalization="RMSNorm",
        layernorm_epsilon=model.norm_eps,
        layernorm_zero_centered_gamma=True,
        qk_layernorm=model.qk_norm == "head",
        add_bias_linear=model.mlp_bias,
        activation_func=squared_relu,
        gated_linear_unit=False,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        init_method=keep,
        output_layer_init_method=keep,
        embedding_init_method=keep,
        tensor_model_parallel_size=parallel.tensor,
        pipeline_model_parallel_size=parallel.pipeline,
        virtual_pipeline_model_parallel_size=parallel.virtual_pipeline if interleaved else None,
        sequence_parallel=parallel.sequence,
        params_dtype=dtype,
        pipeline_dtype=dtype,
        bf16=precision.compute == "bf16",
        use_cpu_initialization=platform.is_cpu,
        gradient_accumulation_fusion=fuses_weight_gradients(parallel, precision, platform),
        masked_softmax_fusion=False,
        bias_dropout_fusion=False,
        bias_activation_fusion=False,
        persist_layer_norm=False,
        calculate_per_token_loss=True,
        batch_p2p_comm=not platform.is_cpu and not interleaved,
        overlap_p2p_comm=False,
        deallocate_pipeline_outputs=not platform.is_cpu,
        tp_comm_overlap=parallel.tp_comm_overlap,
        apply_rope_fusion=layers_for(precision, platform) == "transformer_engine",
        **_recomputation(parallel, chunk_layers=model.layers // (parallel.pipeline * parallel.virtual_pipeline)),
        **fp8.megatron_settings(precision),
    )


def _recomputation(parallel: ParallelConfig, *, chunk_layers: int) -> dict[str, Any]:
    """megatron-core's words for what is computed again in the backward pass."""
    if parallel.recompute == "none":
        return {}
    if parallel.recompute == "selective":
        return {"recompute_granularity": "selective", "recompute_modules": list(parallel.recomputed_modules)}
    return {
        "recompute_granularity": "full",
        "recompute_method": "block",  # each block's input is kept, of as many blocks of a chunk as are named
        "recompute_num_layers": parallel.recompute_layers or chunk_layers,
    }


def squared_relu(x: Tensor) -> Tensor:
    """relu(x)^2."""
    return F.relu(x).square()


def keep(weight: Tensor) -> Tensor:
    """Leave a weight as it is: initialisation happens once, by name, after construction (`initialise`)."""
    return weight


def layers_for(precision: PrecisionConfig, platform: Platform) -> Layers:
    """Return the implementation of the layers: the platform's in bf16, the local one in float32."""
    return platform.layers if precision.compute == "bf16" else "local"


def modules_for(precision: PrecisionConfig, platform: Platform) -> LayerModules:
    """Return the modules of a block on this machine."""
    if layers_for(precision, platform) == "local":
        return local_parts()
    return import_module("megadiff.model.fused_layers").fused_parts()


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
        PlatformError: FP8 or tensor overlap without Transformer Engine, FP8 on a GPU that has none, or a fusion of
            weight gradients that was insisted on and cannot be.
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
    if parallel.gradient_accumulation_fusion is True and not fuses_weight_gradients(parallel, precision, platform):
        reason = platform.weight_gradients_problem or "it needs precision.compute=bf16 and master_weights=true"
        raise PlatformError(f"parallel.gradient_accumulation_fusion is true, but {reason}; set it to auto")


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
    if parallel.tp_comm_overlap:
        parts.append("tensor-parallel communication overlapped")
    if parallel.recompute == "full":
        parts.append(f"recomputing {parallel.recompute_layers or 'all'} block(s) of each chunk")
    elif parallel.recompute == "selective":
        parts.append(f"recomputing {', '.join(parallel.recomputed_modules)}")
    return "; ".join(parts)


def _has_float32_gradients(precision: PrecisionConfig) -> bool:
    return precision.compute == "bf16" and precision.master_weights
