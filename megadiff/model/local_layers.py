"""A block's parts from megatron-core's own linear layers and this package's norms, on torch kernels."""

from __future__ import annotations

from typing import Any

from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear

from megadiff.model.layer_spec import LayerModules
from megadiff.model.norms import RMSNorm


class UnbiasedColumnLinear(ColumnParallelLinear):
    """A column-parallel matrix that never has a bias; megatron-core has one bias switch for attention and MLP."""

    def __init__(self, *args: Any, bias: bool = False, **kwargs: Any) -> None:
        super().__init__(*args, bias=False, **kwargs)


class RowLinear(RowParallelLinear):
    """A row-parallel matrix that adds its bias itself.

    megatron-core's MLP hands its second bias on, to be fused with what follows. Recomputing such an MLP makes the bias
    an output of the recomputed part, and the backward pass then never ends.
    """

    def __init__(self, *args: Any, skip_bias_add: bool = False, **kwargs: Any) -> None:
        super().__init__(*args, skip_bias_add=False, **kwargs)


class UnbiasedRowLinear(RowParallelLinear):
    """A row-parallel matrix that never has a bias."""

    def __init__(self, *args: Any, bias: bool = False, **kwargs: Any) -> None:
        super().__init__(*args, bias=False, **kwargs)


def local_parts() -> LayerModules:
    """Return the modules that run on every machine."""
    return LayerModules(
        input_layernorm=RMSNorm,
        qkv=UnbiasedColumnLinear,
        proj=UnbiasedRowLinear,
        up=ColumnParallelLinear,
        down=RowLinear,
        norm=RMSNorm,
        # megatron-core's names for the norms fused into Transformer Engine's linears, so that a checkpoint of either
        # path loads in the other.
        checkpoint_names={
            "input_layernorm.": "self_attention.linear_qkv.layer_norm_",
            "pre_mlp_layernorm.": "mlp.linear_fc1.layer_norm_",
        },
    )
