"""A block's parts from Transformer Engine: norms fused into the matrices behind them, and FP8.

Imported only where Transformer Engine can be used. megatron-core's wrappers of its layers do the parallel work; what is
changed here is what a checkpoint holds and what evaluation computes in.

Transformer Engine keeps the scales of `delayed` FP8 as pickled bytes in a layer's extra state and unpickles them on
load, which would let a checkpoint run code. Here the same numbers are plain tensors in that place, where the local
layers keep nothing, so either kind of layer loads a checkpoint of the other.
"""

from __future__ import annotations

from typing import Any

import torch
import transformer_engine.pytorch as engine  # type: ignore[import-not-found]
from megatron.core.extensions.transformer_engine import (
    TELayerNormColumnParallelLinear,
    TERowParallelLinear,
    _get_extra_te_kwargs,
)
from megatron.core.fp8_utils import get_fp8_recipe
from megatron.core.transformer.identity_op import IdentityOp
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.transformer_layer import TransformerLayer
from torch import Tensor

from megadiff.model.layers import LayerModules

_DIRECTIONS = ("scaling_fwd", "scaling_bwd")
_KEPT = ("scale", "amax_history")


class _Linear:
    """Behaviour that both kinds of Transformer Engine's linears change here; mixed in before megatron-core's class."""

    fp8_meta: dict[str, Any]
    config: TransformerConfig
    training: bool

    def forward(self, x: Tensor) -> Any:
        """`x` [sequence, batch, in] to ([sequence, batch, out], bias or None); in bf16 while evaluating.

        So a held-out bound does not depend on the FP8 recipe, and evaluating leaves the scales of `delayed` alone.
        """
        if self.training or self.config.fp8 is None:
            return super().forward(x)  # type: ignore[misc]
        with engine.fp8_autocast(enabled=False):
            return super().forward(x)  # type: ignore[misc]

    def get_extra_state(self) -> dict[str, Tensor] | None:
        """Return the scales of `delayed` and the history they come from, on the CPU; None for every other recipe."""
        recipe = self.fp8_meta.get("recipe")
        if recipe is None or not recipe.delayed() or any(key not in self.fp8_meta for key in _DIRECTIONS):
            return None
        return {
            f"{direction}.{name}": getattr(self.fp8_meta[direction], name).cpu()
            for direction in _DIRECTIONS
            for name in _KEPT
        }

    @torch.no_grad()
    def set_extra_state(self, state: Any) -> None:
        """Restore the saved scales under `delayed`; start afresh from a checkpoint that has none."""
        recipe = get_fp8_recipe(self.config) if self.config.fp8 is not None else None
        if recipe is None or not recipe.delayed() or not isinstance(state, dict):
            return
        self.fp8_meta.update(num_gemms=1, recipe=recipe)
        self.init_fp8_meta_tensors(recipe)  # type: ignore[attr-defined]
        for direction in _DIRECTIONS:
            for name in _KEPT:
                getattr(self.fp8_meta[direction], name).copy_(state[f"{direction}.{name}"])


class NormedColumnLinear(_Linear, TELayerNormColumnParallelLinear):
    """RMSNorm and a column-parallel matrix in one."""


class RowLinear(_Linear, TERowParallelLinear):
    """A row-parallel matrix that adds its bias itself; see `layers.RowLinear`."""

    def __init__(self, *args: Any, skip_bias_add: bool = False, **kwargs: Any) -> None:
        super().__init__(*args, skip_bias_add=False, **kwargs)


class FusedRMSNorm(engine.RMSNorm):
    """Transformer Engine's RMSNorm with the gain stored as an offset, as `layers.RMSNorm`; it has no extra state."""

    get_extra_state = torch.nn.Module.get_extra_state
    set_extra_state = torch.nn.Module.set_extra_state

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float = 1e-6, **_: Any) -> None:
        super().__init__(
            hidden_size,
            eps=eps,
            sequence_parallel=config.sequence_parallel,
            zero_centered_gamma=config.layernorm_zero_centered_gamma,
            **_get_extra_te_kwargs(config),
        )


def fused_parts() -> LayerModules:
    """Return Transformer Engine's modules, whose parameter names are the ones checkpoints use."""
    return LayerModules(
        layer=TransformerLayer,
        input_layernorm=IdentityOp,
        column=NormedColumnLinear,
        row=RowLinear,
        norm=FusedRMSNorm,
    )
