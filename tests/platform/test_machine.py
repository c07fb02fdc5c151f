from __future__ import annotations

from contextlib import nullcontext

import pytest
import torch

from megadiff.errors import PlatformError
from megadiff.platform.machine import Platform, detect


def test_without_cuda_auto_and_cpu_are_the_same_machine():
    assert not torch.cuda.is_available()
    found = detect()
    assert found == detect("cpu")
    assert (found.kind, found.device, found.backend, found.peak_flops) == ("cpu", torch.device("cpu"), "gloo", None)
    assert found.peak_bytes() > 2**20
    assert "over gloo" in found.describe()
    assert "no Transformer Engine, no Apex" in found.describe()


def test_cuda_that_is_not_there_is_refused():
    with pytest.raises(
        PlatformError, match=r"platform is `cuda` but torch sees no CUDA device here; set `platform=cpu"
    ):
        detect("cuda")


def test_on_cuda_the_scope_is_nothing_at_all():
    gpu = Platform("cuda", torch.device("cuda", 0), "nccl", "NVIDIA H200", 989e12, True, False)
    assert isinstance(gpu.scope(), nullcontext)
    assert "Transformer Engine" in gpu.describe()
