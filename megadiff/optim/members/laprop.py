"""LaProp, the optimizer of arXiv:2512.10858's code (`megadiff.optim.laprop`)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from megadiff.optim.config import AdamSettings, OptimizerConfig

if TYPE_CHECKING:  # a run description is checked without torch
    import torch

STATE_KEYS = ("exp_avg", "exp_avg_sq", "step")


class Settings(AdamSettings):
    """Settings of LaProp."""


def build(groups: list[dict[str, Any]], settings: OptimizerConfig) -> torch.optim.Optimizer:
    """Return LaProp over parameter groups that carry their own `lr`, `weight_decay` and `eps`."""
    from megadiff.optim.laprop import LaProp

    assert isinstance(settings, Settings)
    return LaProp(groups, betas=(settings.beta1, settings.beta2))


def kernel(_: torch.optim.Optimizer) -> str:
    """Return the name of the kernel."""
    return "torch foreach"
