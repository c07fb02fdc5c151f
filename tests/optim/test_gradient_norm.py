"""The norm and the clipping against megatron-core's own, on real gradients of every kind of layout, and in float64."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from megadiff.optim.optimizer import clip_grad_norm_, gradient_norm
from megadiff.train.health import StepDecision
from tests.support.ranks import on_ranks
from tests.support.runs import platform_on_rank, toy_config, wire_on_rank

LIMIT = 0.05
LAYOUTS = {
    "tp2": {"parallel__tensor": 2},
    "tp2_sp": {"parallel__tensor": 2, "parallel__sequence": True},
    "pp2_vp2": {"parallel__pipeline": 2, "parallel__virtual_pipeline": 2},
    "dp2": {},
    "dp2_distopt": {"parallel__distributed_optimizer": True},
    "tp2_bf16": {"parallel__tensor": 2, "precision__compute": "bf16"},
    "dp2_distopt_bf16": {"parallel__distributed_optimizer": True, "precision__compute": "bf16"},
}


def _both_ways(configs):
    return [_ours_and_theirs(config) for config in configs]


def _ours_and_theirs(config):
    """(our norm, megatron-core's, largest relative gap of the gradients clipped) for the first step of a run."""
    run = wire_on_rank(config, 2)
    step = replace(run.step, check=lambda loss, norm: StepDecision("spike"))  # gradients stay as they are
    norm = step([next(run.microbatches) for _ in range(run.microbatches_of(0))], 1e-3).grad_norm
    wrapped = step.optimizer._wrapped
    gradients = [p.grad for p in wrapped.get_parameters() if p.grad is not None]
    ours = [gradient.clone() for gradient in gradients]
    clip_grad_norm_(ours, LIMIT, norm=norm)
    with platform_on_rank().scope():
        theirs = wrapped.get_grad_norm()
        wrapped.clip_grad_norm(LIMIT)
    gaps = [float((a - b).abs().max() / b.abs().max().clamp(min=1e-30)) for a, b in zip(ours, gradients, strict=True)]
    run.close()
    return norm, theirs, max(gaps)


@pytest.fixture(scope="module")
def found(toy_corpus, tmp_path_factory):
    output = tmp_path_factory.mktemp("norms")
    configs = [
        toy_config(toy_corpus, output, name=name, model__sink=True, model__mlp_bias=True, data__valid=[], **layout)
        for name, layout in LAYOUTS.items()
    ]
    ranks = on_ranks(2, _both_ways, configs)
    return {name: [rank[i] for rank in ranks] for i, name in enumerate(LAYOUTS)}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_norm_and_clipped_gradients_are_megatrons(found, layout):
    for ours, theirs, gap in found[layout]:
        assert ours > LIMIT
        assert ours == pytest.approx(theirs, rel=1e-6)
        assert gap < 1e-6


def test_every_rank_gets_the_same_norm_to_the_bit(found):
    for ranks in found.values():
        assert ranks[0][0] == ranks[1][0]


def _norm_alone(gradients):
    return float(gradient_norm(gradients, group=None, device=torch.device("cpu")))


def test_a_large_tensor_has_the_norm_of_its_elements_in_float64():
    """Torch's CPU kernel, asked for the whole of it, is 2e-4 off at 8 million elements."""
    large = torch.randn(2**22, generator=torch.Generator().manual_seed(0))
    assert on_ranks(1, _norm_alone, [large])[0] == pytest.approx(float(large.double().norm()), rel=1e-6)
    assert abs(float(large.norm()) / float(large.double().norm()) - 1) > 1e-5, "the care is not needed any more"


@pytest.mark.parametrize(
    ("gradients", "norm"), [([], 0.0), ([torch.tensor([3.0]), torch.tensor([[-4.0, 12.0]]).bfloat16()], 13.0)]
)
def test_small_norms_by_hand(gradients, norm):
    assert on_ranks(1, _norm_alone, gradients)[0] == pytest.approx(norm, rel=1e-6)


def test_a_number_that_is_none_makes_the_norm_none():
    for bad in (torch.nan, torch.inf):
        assert not torch.isfinite(torch.tensor(on_ranks(1, _norm_alone, [torch.tensor([1.0, bad])])[0]))


def test_gradients_within_the_limit_are_left_as_they_are():
    gradients = [torch.tensor([3.0]), torch.tensor([4.0])]
    clip_grad_norm_(gradients, 6.0, norm=5.0)
    assert [float(g) for g in gradients] == [3.0, 4.0]
    clip_grad_norm_(gradients, 2.5, norm=5.0)
    assert [float(g) for g in gradients] == pytest.approx([1.5, 2.0], rel=1e-6)
    clip_grad_norm_([], 1.0, norm=5.0)
