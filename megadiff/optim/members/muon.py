"""Muon for the blocks' matrices and AdamW for everything else (`megadiff.optim.muon`)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field

from megadiff.optim.config import AdamSettings, OptimizerConfig

if TYPE_CHECKING:  # a run description is checked without torch
    import torch

STATE_KEYS = ("exp_avg", "exp_avg_sq", "step")
ROLE_STATE_KEYS = {"hidden": ("exp_avg", "step")}
ROLE_SETTINGS = {"hidden": ("momentum", "nesterov", "newton_schulz_steps", "update_scale")}
ELEMENTWISE = False
GATHERS = True


class Settings(AdamSettings):
    """Settings of Muon; `beta1`, `beta2` and `eps` are those of AdamW for embedding, head, norms and biases."""

    momentum: float = Field(default=0.95, ge=0, lt=1)
    """Decay of the matrices' momentum."""
    nesterov: bool = True
    """Whether the update looks ahead by the momentum of one more step."""
    newton_schulz_steps: int = Field(default=5, ge=1)
    """Number of iterations that make a matrix nearly orthogonal."""
    newton_schulz_precision: Literal["auto", "fp32", "bf16"] = "auto"
    """Precision of the iterations' products; `auto` is bf16 on GPUs and fp32 elsewhere."""
    update_scale: float = Field(default=0.2, gt=0)
    """Root mean square of the elements of a matrix's update at rate 1; AdamW's is about 0.2 (`standard`). Under
    `completep` the update has the spectral norm of a matrix of rank 1 with elements of this size."""


def build(groups: list[dict[str, Any]], settings: OptimizerConfig) -> torch.optim.Optimizer:
    """Return Muon over parameter groups that carry their own `lr`, `weight_decay` and `eps`."""
    from megadiff.optim.muon import Muon

    assert isinstance(settings, Settings)
    return Muon(groups, settings)


def kernel(_: torch.optim.Optimizer) -> str:
    """Return the name of the kernel."""
    return "torch, Newton-Schulz"
