"""Why a test of this folder is skipped: no GPU, or no Transformer Engine on it."""

from __future__ import annotations

import importlib.util
import os

import pytest
import torch

IS_REHEARSED = os.environ.get("MEGADIFF_REHEARSE_GPU") == "1"
"""Whether tests that a CPU can run are to run without a GPU, to find mistakes in the tests themselves."""

DEVICE = "cuda" if torch.cuda.is_available() or not IS_REHEARSED else "cpu"
"""Device of tests that can be rehearsed."""

gpu = [
    pytest.mark.gpu,
    pytest.mark.skipif(
        not torch.cuda.is_available() and not IS_REHEARSED, reason="needs an NVIDIA GPU; torch sees none here"
    ),
]
only_on_a_gpu = pytest.mark.skipif(
    not torch.cuda.is_available(), reason="needs a GPU's kernels or clocks, so it cannot be rehearsed"
)
engine = [
    *gpu,
    pytest.mark.skipif(
        importlib.util.find_spec("transformer_engine") is None, reason="needs Transformer Engine; it is not installed"
    ),
]
