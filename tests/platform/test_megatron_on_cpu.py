"""The seam on forked ranks only: `install` changes a process for good, and this one stays as it is."""

from __future__ import annotations

import importlib
import os
import types

import pytest
import torch

from megadiff.errors import PlatformError
from megadiff.platform import megatron_on_cpu
from tests.support.ranks import on_ranks
from tests.support.runs import platform_on_rank, toy_config, train_on_rank


def test_an_attribute_that_is_gone_is_refused():
    with pytest.raises(PlatformError, match=r"schedules no longer has `torch`, which .* replaces on CPU"):
        megatron_on_cpu._replace(types.ModuleType("schedules"), "torch", None)


def test_every_replaced_attribute_exists_in_the_installed_libraries():
    for name in megatron_on_cpu._facade():
        assert hasattr(torch.cuda, name)
    random = importlib.import_module("megatron.core.tensor_parallel.random")
    assert hasattr(random, "_get_cuda_rng_state")
    assert hasattr(random, "_set_cuda_rng_state")


def test_inside_the_scope_cuda_devices_and_types_mean_the_cpu():
    ones = torch.ones(3)
    with megatron_on_cpu.scope():
        assert torch.zeros(2, device="cuda").device.type == "cpu"
        assert torch.zeros(2, device=torch.device("cuda", 3), pin_memory=True).device.type == "cpu"
        assert ones.cuda() is ones
        assert ones.to("cuda").device.type == "cpu"
        assert [ones.to(kind).type() for kind in (torch.float32, torch.bfloat16, torch.float16)] == [
            "torch.cuda.FloatTensor",
            "torch.cuda.BFloat16Tensor",
            "torch.cuda.HalfTensor",
        ]
        assert ones.long().type() == "torch.LongTensor"
        assert ones.type(torch.float64).dtype == torch.float64


def test_the_scope_leaves_torch_as_it_was_even_after_an_error():
    factory, method = torch.zeros, torch.Tensor.cuda
    with pytest.raises(RuntimeError, match="inside"), megatron_on_cpu.scope():
        raise RuntimeError("inside")
    assert (torch.zeros, torch.Tensor.cuda) == (factory, method)
    assert torch.ones(1).type() == "torch.FloatTensor"
    with pytest.raises((AssertionError, RuntimeError), match=r"CUDA|NVIDIA"):  # torch's builds word this differently
        torch.zeros(1, device="cuda")


def _seam_on_rank(config):
    """Facts of a rank after `install` and a few steps."""
    platform_on_rank()
    from megatron.core.pipeline_parallel import schedules
    from megatron.core.tensor_parallel import random

    factory = torch.zeros
    before = torch.cuda.get_rng_state()
    torch.cuda.manual_seed(7)
    drawn = torch.rand(2)
    random._set_cuda_rng_state(before)
    came_back = torch.equal(random._get_cuda_rng_state(), before)
    queued = len(torch.cuda._queued_calls)
    train_on_rank(config, 1)
    megatron_on_cpu.install()  # again
    return {
        "is_available": torch.cuda.is_available(),
        "device_count": torch.cuda.device_count(),
        "current_device": torch.cuda.current_device(),
        "same_factory": torch.zeros is factory,
        "schedules_zeros": schedules.torch.zeros(1, device="cuda").device.type,
        "schedules_forwards": schedules.torch.no_grad is torch.no_grad,
        "seed_is_the_cpus": bool((drawn == torch.rand(2, generator=torch.Generator().manual_seed(7))).all()),
        "state_comes_back": came_back,
        "queue_growth": len(torch.cuda._queued_calls) - queued,
    }


def test_an_installed_seam_answers_for_the_gpu_and_queues_nothing(toy_corpus, tmp_path):
    """The stock setter of megatron-core would queue a closure in torch.cuda at every call."""
    found = on_ranks(1, _seam_on_rank, toy_config(toy_corpus, tmp_path, schedule__steps=4, data__valid=[]))[0]
    assert found == {
        "is_available": False,
        "device_count": 0,
        "current_device": torch.device("cpu"),
        "same_factory": True,
        "schedules_zeros": "cpu",
        "schedules_forwards": True,
        "seed_is_the_cpus": True,
        "state_comes_back": True,
        "queue_growth": 0,
    }


def test_the_parent_of_the_ranks_is_untouched():
    with pytest.raises((AssertionError, RuntimeError)):
        torch.cuda.current_device()


def test_groups_of_the_same_ranks_are_one_until_the_world_closes(tmp_path):
    """Two pairs of pairs: a rank alone, its tensor pair, its data pair, and all four."""
    for first, second in on_ranks(4, _groups_of_two_worlds, tmp_path / "store"):
        assert len(first) == len(second) == 4
        assert not set(first) & set(second)


def _groups_of_two_worlds(store):
    import torch.distributed as dist

    platform_on_rank()
    from megatron.core import parallel_state as state

    found, kept = [], []
    for world in range(2):
        if world:
            dist.destroy_process_group()
            state.destroy_model_parallel()
            rank = int(os.environ["RANK"])
            dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=4)
        state.initialize_model_parallel(tensor_model_parallel_size=2, create_gloo_process_groups=False)
        groups = [group for group in dist.distributed_c10d._world.pg_map if group is not dist.group.WORLD]
        kept += groups  # so that no identity is used twice
        found.append([id(group) for group in groups])
        assert state.get_tensor_model_parallel_group() is state.get_model_parallel_group()
        assert dist.get_world_size(state.get_data_parallel_group()) == 2
    return found
