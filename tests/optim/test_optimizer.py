"""The optimizer as wired, step for step against torch's own AdamW on copies of the same weights and gradients."""

from __future__ import annotations

import math
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from megadiff.errors import TrainingError
from tests.support.ranks import on_ranks
from tests.support.runs import toy_config, wire_on_rank

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
