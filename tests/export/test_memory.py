"""An export holds a tensor or two, never the model; measured as a process's peak of resident memory."""

from __future__ import annotations

import json
import subprocess
import sys

import torch

from tests.support.commands import REPOSITORY

MIB = 2**20


def peaks(tmp_path, *, layers):
    """Resident MiB before and at the peak of the benchmark's export, and the sizes it names."""
    command = [sys.executable, "tools/benchmarks/export_memory.py", "--layers", layers, "--hidden", 1024, "--heads", 8]
    command += ["--vocab-size", 16384, "--folder", tmp_path, "--json"]
    done = subprocess.run([*map(str, command)], cwd=REPOSITORY, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def test_memory_does_not_grow_with_the_model(tmp_path):
    """Six blocks more are 144 MiB of weights more; the peak stays where it was, a few tensors above the start."""
    small, large = (peaks(tmp_path / str(layers), layers=layers) for layers in (2, 8))
    assert large["model_bytes"] - small["model_bytes"] == 6 * (12 * 1024**2 + 11 * 1024) * torch.bfloat16.itemsize
    assert large["model_bytes"] > 250 * MIB
    assert large["peak_bytes"] - large["start_bytes"] < 3 * large["largest_tensor_bytes"] + 40 * MIB
    assert large["peak_bytes"] - small["peak_bytes"] < 40 * MIB  # torch's CUDA build varies by some MiB more
