"""AdamW with the fastest kernel present: Transformer Engine's, Apex's, or torch's fused one."""

from __future__ import annotations

from typing import Any

import torch

from megadiff.optim.config import OptimizerConfig


def build(groups: list[dict[str, Any]], settings: OptimizerConfig) -> torch.optim.Optimizer:
    """AdamW over parameter groups that carry their own `lr`, `weight_decay` and `eps`."""
    from megatron.core import optimizer as megatron

    betas = (settings.beta1, settings.beta2)
    if megatron.USING_PYTORCH_OPTIMIZER:
        return torch.optim.AdamW(groups, betas=betas, fused=True)
    return megatron.Adam(groups, betas=betas, adam_w_mode=True)  # type: ignore[attr-defined]


def kernel() -> str:
    """Name of the kernel `build` takes on this machine, for the log."""
    from megatron.core import optimizer as megatron

    if megatron.USING_PYTORCH_OPTIMIZER:
        return "torch fused"
    return megatron.Adam.__module__.split(".")[0]  # type: ignore[attr-defined]
