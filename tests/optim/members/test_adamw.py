"""The choice of AdamW's kernel."""

from __future__ import annotations

import pytest
import torch

from megadiff.optim.members import adamw
from megadiff.platform.machine import detect


def test_kernels_for_gpus_are_left_alone_by_parameters_elsewhere(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine may have Transformer Engine or Apex while a run, or a dry run, is on its CPU or the meta device."""
    detect("cpu").prepare_megatron()
    from megatron.core import optimizer as megatron

    monkeypatch.setattr(megatron, "USING_PYTORCH_OPTIMIZER", False)
    monkeypatch.setattr(megatron, "Adam", None, raising=False)
    for device in ("cpu", "meta"):
        weight = torch.nn.Parameter(torch.ones(3, device=device))
        built = adamw.build([{"params": [weight], "lr": 0.1}], adamw.Settings(lr=0.1))
        assert isinstance(built, torch.optim.AdamW)
        assert "step" in adamw.initial_state(weight, built.param_groups[0])
