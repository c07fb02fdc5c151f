"""Why a test of this folder is skipped: no GPU, or no Transformer Engine on it."""

from __future__ import annotations

import importlib.util

import pytest
import torch

gpu = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU; torch sees none here"),
]
engine = [
    *gpu,
    pytest.mark.skipif(
        importlib.util.find_spec("transformer_engine") is None, reason="needs Transformer Engine; it is not installed"
    ),
]
