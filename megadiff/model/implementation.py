"""The implementation of a model's layers, and megatron-core's configuration."""

from __future__ import annotations

from dataclasses import replace
from importlib import import_module
from typing import Any

import torch
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.transformer_layer import TransformerLayer
from torch import Tensor

from megadiff.model import config
from megadiff.model.config import ModelConfig, PrecisionConfig
from megadiff.model.kernels import fuses_weight_gradients, layers_for
from megadiff.model.layers import ACTIVATIONS, LayerModules, local_parts
from megadiff.parallel.config import ParallelConfig
from megadiff.platform.machine import Platform


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
    layers = layers_for(precision, platform)
    return TransformerConfig(
        num_layers=model.layers,
        hidden_size=model.hidden,
        num_attention_heads=model.heads,
        num_query_groups=model.key_heads,
        ffn_hidden_size=model.mlp_width,
        kv_channels=model.head_width,
        normalization="RMSNorm",
        layernorm_epsilon=model.norm_eps,
        layernorm_zero_centered_gamma=True,
        qk_layernorm=model.qk_norm != "none",
        add_bias_linear=model.mlp_bias,
        activation_func=ACTIVATIONS[model.mlp],
        gated_linear_unit=False,  # a gate is a matter of `layers.gated_mlp` and its activation
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
        use_cpu_initialization=platform.is_cpu and (platform.has_values or layers == "local"),
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
        apply_rope_fusion=layers == "transformer_engine",
        **_recomputation(parallel, chunk_layers=model.layers // (parallel.pipeline * parallel.virtual_pipeline)),
        **config.megatron_settings(precision),
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


def keep(weight: Tensor) -> Tensor:
    """Leave a weight as it is: initialisation happens once, by name, after construction (`initialise`)."""
    return weight


def modules_for(parallel: ParallelConfig, precision: PrecisionConfig, platform: Platform) -> LayerModules:
    """Return the modules of a block on this machine.

    Parts of a layer are recomputed by megatron-core's own layer alone.
    """
    if layers_for(precision, platform) != "local":
        return import_module("megadiff.model.fused_layers").fused_parts()
    parts = local_parts()
    return replace(parts, layer=TransformerLayer) if parallel.recompute == "selective" else parts
