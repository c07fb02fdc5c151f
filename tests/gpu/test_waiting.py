"""Between two log steps the host waits for the device where a step needs it: to judge the loss and the gradient norm.

Everything else that would make it wait (a number made on the host and copied over, a mask turned into indices, a branch
on a device's value) leaves the device without work while the host catches up.
"""

from __future__ import annotations

import warnings
from collections import Counter
from contextlib import nullcontext

import pytest
import torch
import torch.distributed as dist

from megadiff.platform.machine import detect
from megadiff.platform.quiet import quiet

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU; torch sees none here"),
]

MICROBATCHES = 4
ALLOWED = 1
OBJECTIVES = {
    "next token": {"method__name": "next_token"},
    "masked": {"noise__shift": "masked"},
    "balanced": {"noise__shift": "balanced"},
}


def waits_of(call):
    """Where the host waited for the device while `call` ran, by file and line."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            call()
        finally:
            torch.cuda.set_sync_debug_mode("default")
    return Counter(f"{w.filename}:{w.lineno}" for w in caught if "synchronizing CUDA operation" in str(w.message))


def test_a_wait_is_noticed():
    """The control: without it a silent debug mode would let everything pass."""
    values = torch.ones(3, device="cuda")
    assert sum(waits_of(lambda: values.sum().item()).values()) == 1
    assert sum(waits_of(lambda: values.sum()).values()) == 0


@pytest.mark.parametrize("optimizer", ["adamw", "laprop"])
@pytest.mark.parametrize("objective", OBJECTIVES)
def test_a_step_waits_for_the_device_once_and_where_it_must(toy_corpus, tmp_path, objective, optimizer):
    """After two steps to warm up."""
    with quiet():
        from megadiff.parallel.topology import process_group
        from megadiff.run import build
    from tests.support.runs import toy_config

    config = toy_config(
        toy_corpus, tmp_path, platform="cuda", data__valid=[], optimizer__name=optimizer, **OBJECTIVES[objective]
    )
    config.folder.mkdir(parents=True)
    platform = detect("cuda")
    with nullcontext() if dist.is_initialized() else process_group(platform, alone=True):
        platform.prepare_megatron()
        with quiet():
            run = build.build_trainer(build.validate_run(config, world_size=1), platform)
        try:
            assert run.microbatches_of(0) == MICROBATCHES
            batches = [[next(run.microbatches) for _ in range(MICROBATCHES)] for _ in range(3)]
            for sequences in batches[:2]:
                run.step(sequences, 1e-3)
            platform.synchronize()
            found = waits_of(lambda: run.step(batches[2], 1e-3))
        finally:
            run.close()
    assert sum(found.values()) <= ALLOWED, dict(found)
