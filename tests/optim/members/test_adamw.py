"""The choice of AdamW's kernel."""

from __future__ import annotations

import torch

from megadiff.optim.members import adamw
from tests.support.ranks import on_ranks


def _built_with_kernels_for_gpus() -> list[bool]:
    """Return, for each device, whether the optimizer is torch's and counts steps."""
    from megatron.core import optimizer as megatron

    megatron.USING_PYTORCH_OPTIMIZER = False
    megatron.Adam = None  # type: ignore[attr-defined]
    found = []
    for device in ("cpu", "meta"):
        weight = torch.nn.Parameter(torch.ones(3, device=device))
        built = adamw.build([{"params": [weight], "lr": 0.1}], adamw.Settings(lr=0.1))
        found.append(isinstance(built, torch.optim.AdamW) and "step" in adamw.initial_state(weight, {}))
    return found


def test_kernels_for_gpus_are_left_alone_by_parameters_elsewhere() -> None:
    """A machine may have Transformer Engine or Apex while a run, or a dry run, is on its CPU or the meta device."""
    assert on_ranks(1, _built_with_kernels_for_gpus) == [[True, True]]
