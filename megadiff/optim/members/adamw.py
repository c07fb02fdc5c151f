"""AdamW with the fastest kernel present: Transformer Engine's or Apex's on a GPU, or torch's fused one."""

from __future__ import annotations

from typing import Any

from megadiff.optim.config import AdamSettings, OptimizerConfig

STATE_KEYS = ("exp_avg", "exp_avg_sq", "step")


class Settings(AdamSettings):
    """Settings of AdamW."""


def build(groups: list[dict[str, Any]], settings: OptimizerConfig) -> Any:
    """Return AdamW over parameter groups that carry their own `lr`, `weight_decay` and `eps`."""
    import torch
    from megatron.core import optimizer as megatron

    assert isinstance(settings, Settings)
    betas = (settings.beta1, settings.beta2)
    if _is_torchs([parameter for group in groups for parameter in group["params"]]):
        return torch.optim.AdamW(groups, betas=betas, fused=True)
    return megatron.Adam(groups, betas=betas, adam_w_mode=True)  # type: ignore[attr-defined]


def initial_state(parameter: Any, group: dict[str, Any]) -> dict[str, Any]:
    """Return zero moments, and a count of steps where the kernel keeps one for each parameter."""
    import torch

    state: dict[str, Any] = {}
    if _is_torchs([parameter]):
        # torch keeps `step` on the device only for kernels that read it there.
        on_device = group.get("fused") or group.get("capturable")
        state["step"] = torch.zeros((), device=parameter.device if on_device else torch.device("cpu"))
    for moment in ("exp_avg", "exp_avg_sq"):
        state[moment] = torch.zeros_like(parameter.data, dtype=torch.float32)
    return state


def _is_torchs(parameters: list[Any]) -> bool:
    """Return whether torch's kernel updates these parameters; the other libraries' kernels are for GPUs alone."""
    from megatron.core import optimizer as megatron

    return megatron.USING_PYTORCH_OPTIMIZER or any(not p.is_cuda for p in parameters)


def kernel(optimizer: Any) -> str:
    """Return the name of the kernel that `build` took."""
    library = type(optimizer).__module__.split(".")[0]
    return "torch fused" if library == "torch" else library
