from __future__ import annotations

import importlib.util
from contextlib import nullcontext
from dataclasses import replace

import pytest
import torch

from megadiff.errors import PlatformError
from megadiff.platform import transformer_engine
from megadiff.platform.machine import LAUNCH_QUEUES, Platform, detect, order_launches


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
        PlatformError, match=r"`platform=cuda`, but torch sees no CUDA device here; give `platform=cpu`"
    ):
        detect("cuda")


def test_on_cuda_the_scope_is_nothing_at_all():
    gpu = Platform("cuda", torch.device("cuda", 0), "nccl", "NVIDIA H200", 989e12, True, False)
    assert isinstance(gpu.scope(), nullcontext)
    assert "Transformer Engine" in gpu.describe()


def test_without_a_gpu_transformer_engine_is_refused_and_auto_is_local():
    with pytest.raises(
        PlatformError, match=r"^kernels is `transformer_engine`, which needs a GPU, but the run is on CPU"
    ):
        detect("cpu", layers="transformer_engine")
    found = detect("cpu", layers="auto")
    assert (found.layers, found.weight_gradients) == ("local", None)


@pytest.mark.skipif(
    importlib.util.find_spec("transformer_engine") is not None, reason="Transformer Engine is installed"
)
def test_where_transformer_engine_cannot_be_imported_the_reason_is_kept():
    found = transformer_engine.find()
    assert found.version is None
    assert found.problem.startswith("`import transformer_engine.pytorch` fails (ModuleNotFoundError: ")


def test_the_log_says_whose_layers_a_gpu_runs_and_why_not_the_faster_ones():
    gpu = Platform("cuda", torch.device("cuda", 0), "nccl", "NVIDIA H200", 989e12, True, False)
    assert gpu.describe().endswith("Transformer Engine; layers: local")
    assert replace(gpu, layers="transformer_engine").describe().endswith("; layers: Transformer Engine's")
    assert replace(gpu, layers_problem="it is broken").describe().endswith("; layers: local (it is broken)")


def test_tensor_ranks_order_their_launches_where_nothing_is_set():
    environ: dict[str, str] = {}
    said = order_launches(tensor_ranks=2, environ=environ)
    assert environ == {LAUNCH_QUEUES: "1"}
    assert said is not None
    assert said.startswith("CUDA_DEVICE_MAX_CONNECTIONS was not set and is 1 now")


def test_a_value_that_is_set_stays_and_is_warned_of():
    environ = {LAUNCH_QUEUES: "8"}
    said = order_launches(tensor_ranks=2, environ=environ)
    assert environ == {LAUNCH_QUEUES: "8"}
    assert said is not None
    assert said.startswith("CUDA_DEVICE_MAX_CONNECTIONS is 8: tensor-parallel communication may wait")
    assert order_launches(tensor_ranks=2, environ={LAUNCH_QUEUES: "1"}) is None


def test_one_tensor_rank_leaves_the_environment_alone():
    environ: dict[str, str] = {}
    assert order_launches(tensor_ranks=1, environ=environ) is None
    assert environ == {}
