"""RMS normalisation with the gain stored as an offset: y = x / rms(x) * (1 + weight).

Both modules take megatron-core's norm constructor arguments, so a layer spec can name them.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.tensor_parallel import copy_to_tensor_model_parallel_region, reduce_from_tensor_model_parallel_region
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.utils import make_sharded_tensors_for_checkpoint
from torch import Tensor


class RMSNorm(torch.nn.Module):
    """Normalises the last dimension; the statistic is taken in float32.

    megatron-core's own torch norm refuses sequence parallelism (transformer/torch_norm.py), hence this one: under it,
    each tensor rank sees a part of the sequence and the weight's gradient is marked to be summed over ranks.

    Source: arXiv:2512.10858 appendix (gain 1 + g, g zero at start, eps inside the root).
    """

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float = 1e-6, **_: Any) -> None:
        super().__init__()
        self.eps = eps
        self.weight = torch.nn.Parameter(torch.zeros(hidden_size, dtype=config.params_dtype))
        self.weight.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]

    def forward(self, x: Tensor) -> Tensor:
        """`x` [..., hidden_size] to the same shape and dtype."""
        return F.rms_norm(x.float(), x.shape[-1:], 1.0 + self.weight.float(), self.eps).type_as(x)


class AllHeadsRMSNorm(torch.nn.Module):
    """Normalises queries or keys over all heads together, with a gain per feature.

    Under tensor parallelism a rank holds some heads only, so the mean square is summed over the tensor group: one
    all-reduce of a float32 scalar per token forward, and one backward.

    Source: arXiv:2512.10858's model (RMSNorm of q and k before the head split).
    """

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float = 1e-6, **_: Any) -> None:
        """`hidden_size` is one head's width, as megatron-core passes it."""
        super().__init__()
        self.eps = eps
        self.features = hidden_size * config.num_attention_heads
        self.is_cut = config.tensor_model_parallel_size > 1
        local = self.features // config.tensor_model_parallel_size
        self.weight = torch.nn.Parameter(torch.zeros(local, dtype=config.params_dtype))
        self.weight.tensor_model_parallel = self.is_cut  # type: ignore[attr-defined]
        self.weight.partition_dim = 0  # type: ignore[attr-defined]
        self.weight.partition_stride = 1  # type: ignore[attr-defined]

    def forward(self, x: Tensor) -> Tensor:
        """`x` [sequence, batch, local heads, head_dim] to the same shape and dtype."""
        flat = x.float().flatten(-2)
        square = flat.square().sum(-1, keepdim=True)
        if self.is_cut:
            # Summed forward by the first, and the statistic's gradient, which every rank feeds, by the second.
            square = copy_to_tensor_model_parallel_region(reduce_from_tensor_model_parallel_region(square))
        scale = torch.rsqrt(square / self.features + self.eps)
        return (flat * scale * (1.0 + self.weight.float())).view_as(x).type_as(x)

    def sharded_state_dict(
        self, prefix: str = "", sharded_offsets: Any = (), metadata: dict[str, Any] | None = None
    ) -> dict[str, Any]:
        """Return the state, with the weight cut over tensor ranks along its only dimension."""
        state = self.state_dict(prefix="", keep_vars=True)
        return make_sharded_tensors_for_checkpoint(state, prefix, {"weight": 0}, sharded_offsets)
