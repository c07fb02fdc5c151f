"""AdamW with the fastest kernel present: Transformer Engine's, Apex's, or torch's fused one."""

from __future__ import annotations

from typing import Any

import torch

from megadiff.optim.config import OptimizerConfig


def build(groups: list[dict[str, Any]], settings: OptimizerConfig) -> torch.optim.Optimizer:
    """AdamW over parameter groups that carry their own `lr`, `weight_decay` and `eps`."""
    from megatron.core.optimizer import USING_PYTORCH_OPTIMIZER, Adam

    betas = (settings.beta1, settings.beta2)
    if USING_PYTORCH_OPTIMIZER:
        return torch.optim.AdamW(groups, betas=betas, fused=True)
    return Adam(groups, betas=betas, adam_w_mode=True)


def kernel() -> str:
    """Name of the kernel `build` takes on this machine, for the log."""
    from megatron.core.optimizer import USING_PYTORCH_OPTIMIZER, Adam

    return "torch fused" if USING_PYTORCH_OPTIMIZER else Adam.__module__.split(".")[0]
