"""Gradients summed and divided by the global count of tokens, against megatron-core's own way, to the bit."""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import replace
from unittest.mock import patch

import pytest
import torch

from megadiff.train.health import StepDecision
from tests.support.ranks import on_ranks
from tests.support.runs import toy_config, wire_on_rank

LAYOUTS = {
    "dp2": {},
    "dp2_distopt_overlap": {
        "parallel__distributed_optimizer": True,
        "parallel__overlap_grad_reduce": True,
        "parallel__overlap_param_gather": True,
    },
    "pp2": {"parallel__pipeline": 2},
    "pp2_vp2": {"parallel__pipeline": 2, "parallel__virtual_pipeline": 2},
}


def _gradients(config, *, by_megatron):
    """Every parameter's reduced gradient after one step's microbatches."""
    from megatron.core.distributed import finalize_model_grads

    run = wire_on_rank(config, 2)
    if by_megatron:
        for chunk in run.step.chunks:
            chunk.config.finalize_model_grads_func = finalize_model_grads
    step = replace(run.step, check=lambda loss, norm: StepDecision("spike"))
    step([next(run.microbatches) for _ in range(run.microbatches_of(0))], 1e-3)
    run.close()
    return [p.main_grad.clone() for chunk in run.step.chunks for p in chunk.parameters()]


def _both(configs):
    found = []
    for config in configs:
        ours, theirs = (_gradients(config, by_megatron=by_megatron) for by_megatron in (False, True))
        equal = all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))
        found.append((equal, float(max(gradient.abs().max() for gradient in ours))))
    return found


@pytest.fixture(scope="module")
def found(toy_corpus, tmp_path_factory):
    output = tmp_path_factory.mktemp("division")
    configs = [
        toy_config(toy_corpus, output, name=name, noise__shift="masked", data__valid=[], **layout)
        for name, layout in LAYOUTS.items()
    ]
    return dict(zip(LAYOUTS, zip(*on_ranks(2, _both, configs), strict=True), strict=True))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_gradients_are_megatrons_to_the_bit(found, layout):
    for equal, largest in found[layout]:
        assert equal
        assert 0 < largest < 10


COLLECTIVES = ("all_reduce", "reduce_scatter_tensor", "all_gather_into_tensor", "broadcast", "send", "recv")


def _alone(config):
    """Number of a step's collectives on one rank, and whether megatron-core's sum over replicas changes a gradient."""
    from megatron.core.distributed import DistributedDataParallel

    run = wire_on_rank(config, 1)
    microbatches = [next(run.microbatches) for _ in range(run.microbatches_of(0))]
    with ExitStack() as stack:
        calls = [
            stack.enter_context(patch.object(torch.distributed, name, wraps=getattr(torch.distributed, name)))
            for name in COLLECTIVES
        ]
        run.step(microbatches, 1e-3)
        during = sum(call.call_count for call in calls)
        (chunk,) = run.step.chunks
        before = [p.main_grad.clone() for p in chunk.parameters()]
        DistributedDataParallel.finish_grad_sync(chunk)
        afterwards = sum(call.call_count for call in calls) - during
    is_same = all(torch.equal(p.main_grad, old) for p, old in zip(chunk.parameters(), before, strict=True))
    run.close()
    return during, afterwards, is_same, float(max(gradient.abs().max() for gradient in before))


def test_one_rank_alone_communicates_nothing(toy_corpus, tmp_path):
    config = toy_config(toy_corpus, tmp_path, data__valid=[])
    during, afterwards, is_same, largest = on_ranks(1, _alone, config)[0]
    assert (during, afterwards > 0, is_same) == (0, True, True)
    assert largest > 0


class _Chunk:
    """As much of a data-parallel wrapper as a division sees."""

    def __init__(self):
        self.gradient = torch.tensor([6.0, -3.0])

    def scale_gradients(self, factor):
        self.gradient *= factor


def _divided(tokens):
    from megadiff.parallel.config import Layout
    from megadiff.parallel.pipeline import _divide
    from megadiff.parallel.topology import open_topology

    chunks = [_Chunk(), _Chunk()]
    layout = Layout(tensor=1, pipeline=1, virtual_pipeline=1, data=1, num_microbatches=1)
    _divide(chunks, torch.tensor(tokens, dtype=torch.int), open_topology(layout))
    return [chunk.gradient.tolist() for chunk in chunks]


@pytest.mark.parametrize(("tokens", "left"), [(3, [2.0, -1.0]), (1, [6.0, -3.0]), (0, [6.0, -3.0])])
def test_every_chunk_is_divided_by_its_tokens_if_there_are_any(tokens, left):
    assert on_ranks(1, _divided, tokens)[0] == [pytest.approx(left)] * 2
