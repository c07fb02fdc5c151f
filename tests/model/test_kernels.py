"""The choice of fast kernels: which a run gets, what is refused before anything starts, and how the log names it."""

from __future__ import annotations

from dataclasses import replace
from unittest.mock import patch

import pytest
import torch

from megadiff.errors import PlatformError
from megadiff.model.config import PrecisionConfig
from megadiff.model.kernels import check_kernels, describe_kernels, fuses_weight_gradients, layers_for
from megadiff.parallel.config import ParallelConfig
from megadiff.platform.machine import Platform, detect

BF16 = PrecisionConfig()
FP32 = PrecisionConfig(compute="fp32")
CPU = detect("cpu")
GPU = Platform(
    "cuda",
    torch.device("cuda", 0),
    "nccl",
    "NVIDIA H100",
    989e12,
    True,
    False,
    layers="transformer_engine",
    weight_gradients="torch addmm",
    weight_gradients_problem="",
)


def test_transformer_engines_layers_are_for_bf16():
    assert layers_for(BF16, GPU) == "transformer_engine"
    assert layers_for(FP32, GPU) == "local"
    assert layers_for(BF16, CPU) == "local"


def test_a_machine_without_transformer_engine_refuses_what_needs_it():
    with pytest.raises(
        PlatformError, match=r"^precision.fp8=delayed needs .* on a GPU, but this run is on CPU; leave it out$"
    ):
        check_kernels(ParallelConfig(), PrecisionConfig(fp8="delayed"), CPU)
    bare = replace(GPU, layers="local", layers_problem="`import transformer_engine.pytorch` fails (ImportError: gone)")
    overlap = ParallelConfig(tensor=2, sequence=True, tp_comm_overlap=True)
    with pytest.raises(
        PlatformError, match=r"^parallel.tp_comm_overlap=true needs .* fails \(ImportError: gone\); leave"
    ):
        check_kernels(overlap, BF16, bare)
    check_kernels(ParallelConfig(), BF16, bare)


def test_a_gpu_without_fp8_refuses_in_the_librarys_words():
    reason = "Device compute capability 8.9 or higher required for FP8 execution."
    with (
        patch("megadiff.platform.transformer_engine.fp8_problem", return_value=reason),
        pytest.raises(
            PlatformError, match=r"precision.fp8=tensorwise cannot be computed on NVIDIA H100: Device compute"
        ),
    ):
        check_kernels(ParallelConfig(), PrecisionConfig(fp8="tensorwise"), GPU)


@pytest.mark.parametrize(
    ("parallel", "setting"),
    [
        ({"tensor": 2}, "parallel.tensor=2"),
        ({"recompute": "full"}, "parallel.recompute=full"),
        ({"distributed_optimizer": True, "overlap_grad_reduce": True, "overlap_param_gather": True}, "overlap_param_g"),
    ],
)
def test_compiled_blocks_refuse_what_they_cannot_do(parallel, setting):
    compiled = PrecisionConfig(compute="fp32", compile=True)
    with pytest.raises(
        PlatformError, match=rf"^precision\.compile does not work with .*{setting}.*; leave one of them"
    ):
        check_kernels(ParallelConfig(**parallel), compiled, CPU)
    with pytest.raises(PlatformError, match=r"^precision\.compile does not work with platform=cuda"):
        check_kernels(ParallelConfig(), compiled, GPU)


def test_compiled_blocks_need_a_compiler(monkeypatch):
    compiled = PrecisionConfig(compute="fp32", compile=True)
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.raises(PlatformError, match="needs a C\\+\\+ compiler, but no-such-compiler was not found; install it"):
        check_kernels(ParallelConfig(), compiled, CPU)


def test_weight_gradients_are_fused_where_their_buffer_is_float32():
    assert fuses_weight_gradients(ParallelConfig(), BF16, GPU)
    assert not fuses_weight_gradients(ParallelConfig(gradient_accumulation_fusion=False), BF16, GPU)
    assert not fuses_weight_gradients(ParallelConfig(), PrecisionConfig(master_weights=False), GPU)
    assert not fuses_weight_gradients(ParallelConfig(), FP32, GPU)
    assert not fuses_weight_gradients(ParallelConfig(), BF16, CPU)
    insists = ParallelConfig(gradient_accumulation_fusion=True)
    with pytest.raises(PlatformError, match=r"is true, but that needs a GPU; set it to auto"):
        check_kernels(insists, BF16, CPU)
    with pytest.raises(PlatformError, match=r"is true, but it needs precision.compute=bf16 and master_weights=true"):
        check_kernels(insists, FP32, GPU)
    check_kernels(insists, BF16, GPU)


def test_the_log_says_which_way_each_choice_fell():
    assert describe_kernels(ParallelConfig(), FP32, CPU) == "local layers; fp32"
    said = describe_kernels(
        ParallelConfig(recompute="full"), PrecisionConfig(fp8="blockwise", fp8_first_last_bf16=1), GPU
    )
    assert said == (
        "Transformer Engine's layers; FP8 blockwise but for 1 block(s) at either end; weight gradients added up by "
        "torch addmm; recomputing all block(s) of each chunk"
    )
    without = replace(GPU, weight_gradients=None, weight_gradients_problem="torch.addmm does not")
    assert "weight gradients added up apart (torch.addmm does not)" in describe_kernels(ParallelConfig(), BF16, without)
