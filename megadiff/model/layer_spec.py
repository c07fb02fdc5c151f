"""The Transformer block: one composition, with local or Transformer Engine modules."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from megatron.core.transformer.attention import SelfAttention, SelfAttentionSubmodules
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.identity_op import IdentityOp
from megatron.core.transformer.mlp import MLP, MLPSubmodules
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules
from megatron.core.transformer.transformer_layer import TransformerLayer, TransformerLayerSubmodules
from torch import Tensor

from megadiff.model.attention import BidirectionalAttention
from megadiff.model.config import ModelConfig
from megadiff.model.norms import AllHeadsRMSNorm


@dataclass(frozen=True)
class LayerModules:
    """Classes with megatron-core's constructor arguments, by their place in a block.

    Whatever the parts, parameters have the same shapes, and the same names in a checkpoint.
    """

    input_layernorm: Any
    """Before attention and before the MLP; `IdentityOp` where `qkv` and `up` normalise themselves."""
    qkv: Any
    """Column-parallel, never with a bias."""
    proj: Any
    """Row-parallel, never with a bias."""
    up: Any
    """The MLP's first matrix, column-parallel, with a bias if the model has."""
    down: Any
    """The MLP's second matrix, row-parallel, with a bias if the model has, added by itself."""
    norm: Any
    """The last norm, and that of queries and keys per head."""
    checkpoint_names: dict[str, str] = field(default_factory=dict)
    """Prefixes of parameter names in a layer, and the prefixes that replace them in a checkpoint."""


def block_spec(model: ModelConfig, parts: LayerModules, *, layers: int) -> Any:
    """megatron-core's description of a chunk of `layers` blocks and, on the last stage, the norm after them."""
    return TransformerBlockSubmodules(layer_specs=[_layer_spec(model, parts)] * layers, layer_norm=parts.norm)


def _layer_spec(model: ModelConfig, parts: LayerModules) -> ModuleSpec:
    qk_norm = {"full": AllHeadsRMSNorm, "head": parts.norm, "none": IdentityOp}[model.qk_norm]
    residual: Any = _scaled_residual(model.resid_factor)
    attention: Any = partial(BidirectionalAttention, sink=model.sink, softcap=model.softcap)
    return ModuleSpec(
        module=TransformerLayer,
        submodules=TransformerLayerSubmodules(
            input_layernorm=parts.input_layernorm,
            self_attention=ModuleSpec(
                module=SelfAttention,
                params={"attn_mask_type": AttnMaskType.no_mask},
                submodules=SelfAttentionSubmodules(
                    linear_qkv=parts.qkv,
                    core_attention=attention,
                    linear_proj=parts.proj,
                    q_layernorm=qk_norm,
                    k_layernorm=qk_norm,
                ),
            ),
            self_attn_bda=residual,
            pre_mlp_layernorm=parts.input_layernorm,
            mlp=ModuleSpec(module=MLP, submodules=MLPSubmodules(linear_fc1=parts.up, linear_fc2=parts.down)),
            mlp_bda=residual,
            sharded_state_dict_keys_map=parts.checkpoint_names,
        ),
    )


def _scaled_residual(factor: float) -> Callable[..., Any]:
    """megatron-core's bias-dropout-add seam: residual + factor * branch; biases are added before, dropout never."""

    def add(branch_with_bias: tuple[Tensor, Tensor | None], residual: Tensor, dropout: float) -> Tensor:
        branch, bias = branch_with_bias
        assert bias is None
        return torch.add(residual, branch, alpha=factor)

    def choose(training: bool, fused: bool) -> Callable[..., Tensor]:
        return add

    return choose
