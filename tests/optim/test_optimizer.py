"""The optimizer as wired, step for step against torch's own AdamW on copies of the same weights and gradients.

The norm of gradients and the clipping are compared with megatron-core's own, on every kind of layout, and in float64.
"""

from __future__ import annotations

import math
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from megadiff.errors import TrainingError
from megadiff.optim.optimizer import clip_grad_norm_, gradient_norm
from megadiff.train.health import StepDecision
from tests.support.ranks import on_ranks
from tests.support.runs import platform_on_rank, toy_config, wire_on_rank

CLIP = 0.05
DECAY = 0.5


def _follow(config):
    """Take steps; at each, give torch's AdamW the gradients ours used. Returns largest gap, norms, clipped norms."""
    from megadiff.model.initialisation import global_parameters, role_of

    run = wire_on_rank(config, 1)
    named = [pair for chunk in run.step.chunks for pair in global_parameters(chunk.module)]
    copies = [torch.nn.Parameter(parameter.detach().clone()) for _, parameter in named]
    settings = config.optimizer
    decays = [DECAY if role_of(name) in ("hidden", "embedding", "head") else 0.0 for name, _ in named]
    reference = torch.optim.AdamW(
        [{"params": [copy], "weight_decay": decay} for copy, decay in zip(copies, decays, strict=True)],
        betas=(settings.beta1, settings.beta2),
        eps=settings.eps,
        foreach=False,
    )
    norms, clipped, gap = [], [], 0.0
    for step in range(5):
        lr = 1e-2 * (step + 1)
        _, norm, *_ = run.step([next(run.microbatches) for _ in range(run.microbatches_of(0))], lr)
        for group in reference.param_groups:
            group["lr"] = lr
        for copy, (_, parameter) in zip(copies, named, strict=True):
            copy.grad = parameter.main_grad.clone()
        reference.step()
        norms.append(norm)
        clipped.append(math.sqrt(sum(float(copy.grad.double().square().sum()) for copy in copies)))
        gaps = [(copy - parameter).abs().max() for copy, (_, parameter) in zip(copies, named, strict=True)]
        gap = max(gap, float(torch.stack(gaps).max()))
    run.close()
    return gap, norms, clipped


@pytest.mark.parametrize("distributed", [False, True])
@pytest.mark.parametrize("clip", [0.0, CLIP])
def test_five_steps_are_those_of_torchs_adamw_with_decay_on_matrices_only(toy_corpus, tmp_path, distributed, clip):
    config = toy_config(
        toy_corpus,
        tmp_path,
        model__layers=1,
        model__mlp_bias=True,
        model__sink=True,
        data__valid=[],
        optimizer__weight_decay=DECAY,
        optimizer__clip_grad=clip,
        parallel__distributed_optimizer=distributed,
    )
    gap, norms, clipped = on_ranks(1, _follow, config)[0]
    assert gap < 2e-6
    assert min(norms) > CLIP, "the norm reported is the one before clipping"
    wanted = [min(norm, clip or norm) for norm in norms]
    assert clipped == pytest.approx(wanted, rel=1e-4)


def _poisoned(config):
    """What training says of a loss that is not a number, and whether the weights stayed."""
    run = wire_on_rank(config, 1)

    def loss(answer, placed):
        total, count, report = good.report(answer, placed)
        return total * math.nan, count, report

    good = run.step.objective
    parameters = [p for chunk in run.step.chunks for p in chunk.parameters()]
    before = [p.detach().clone() for p in parameters]
    run.step = replace(run.step, objective=SimpleNamespace(place=good.place, forward=good.forward, report=loss))
    try:
        run.train()
    except TrainingError as error:
        return str(error), all(torch.equal(a, b) for a, b in zip(before, parameters, strict=True))
    return None, False


@pytest.mark.parametrize("clip", [0.0, 1.0])
def test_a_gradient_that_is_not_a_number_moves_nothing_and_ends_the_run(toy_corpus, tmp_path, clip):
    config = toy_config(toy_corpus, tmp_path, model__layers=1, data__valid=[], optimizer__clip_grad=clip)
    said, unmoved = on_ranks(1, _poisoned, config)[0]
    assert said is not None
    assert said.startswith("step 3: loss or gradient not finite 3 consecutive steps")
    assert unmoved


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
