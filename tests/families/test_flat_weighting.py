"""A run under `objective.weighting: flat` prints the loss that its definition gives, in float64 and by brute force."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest

from megadiff.data.tokenizers.byte import ByteTokenizer
from megadiff.diffusion.mixing import HybridMixing
from megadiff.diffusion.noising import noise_batch
from megadiff.testing import check_weighting
from tests.support.ranks import on_ranks
from tests.support.runs import toy_config, train_all

SHIFTS = {"masked": -1000.0, "balanced": 0.0, "uniform": 1000.0}
ROWS, LENGTH, VOCAB, MASK = 8, 16, 260, ByteTokenizer().mask_id


@pytest.fixture(scope="module")
def runs(toy_corpus, tmp_path_factory):
    """Two steps of a model whose first prediction is uniform, under each noise: the first lines and evaluations."""
    root = tmp_path_factory.mktemp("flat")
    configs = [
        toy_config(
            toy_corpus, root / weighting, name=shift, noise__shift=shift, objective__weighting=weighting,
            model__head_init=0.0, schedule__steps=2, schedule__warmup_steps=0, schedule__decay_steps=0, eval__every=2,
        )
        for weighting in ("flat", "surrogate")
        for shift in SHIFTS
    ]  # fmt: skip
    return dict(
        zip([(c.objective.weighting, c.name) for c in configs], on_ranks(1, train_all, configs, 1)[0], strict=True)
    )


def drawn_share(shift: float) -> float:
    """Mean over the first batch of P(the noise has drawn z | z, x, lambda), by Bayes' rule over the two ways to z."""
    clean = np.random.default_rng(0).integers(4, VOCAB, (ROWS, LENGTH))
    sequences = noise_batch(
        clean, seed=3, sample_index=np.arange(ROWS), process=HybridMixing(VOCAB, MASK, shift), global_batch=ROWS
    )
    total, fields = 0.0, (sequences.clean, sequences.noised, sequences.log_snr)
    for x, z, level in zip(*(field.flatten().tolist() for field in fields), strict=True):
        alpha, u = 1 / (1 + math.exp(-level)), 1 / (1 + math.exp(-max(-700.0, min(700.0, level + shift))))
        drawn = (1 - alpha) * ((1 - u) if z == MASK else u / (VOCAB - 1))
        total += drawn / (drawn + alpha * (x == z))
    return total / clean.size


@pytest.mark.parametrize("shift", SHIFTS)
def test_the_first_loss_is_the_cross_entropy_of_drawn_tokens(runs, shift):
    """Log N nats a token that the noise has drawn; which tokens those are depends on positions, not on the text."""
    loss = runs["flat", shift].lines[0]["loss"]
    assert loss == pytest.approx(math.log(VOCAB - 1) * drawn_share(SHIFTS[shift]), rel=1e-4)


@pytest.mark.parametrize("shift", SHIFTS)
def test_the_reported_bound_does_not_depend_on_it(runs, shift):
    flat, plain = runs["flat", shift], runs["surrogate", shift]
    for key in ("elbo", "kl"):
        assert flat.lines[0][key] == plain.lines[0][key]
    assert flat.lines[0]["loss"] != plain.lines[0]["loss"]
    assert flat.evaluations[0]["step"] == 0
    assert flat.evaluations[0]["eval_elbo"] == plain.evaluations[0]["eval_elbo"]
    assert flat.lines[1]["elbo"] != plain.lines[1]["elbo"], "another loss must teach another model"


def test_its_minimum_is_the_posterior_from_the_other_tokens():
    """Minimise E[w (-log p_x)] given z = v over p, where w is flat's: the prior itself, also at p_v."""
    weighting = check_weighting("flat")
    import torch

    from megadiff.diffusion.objective import gidd_objective

    process, prior, v, level = HybridMixing(5, 3, 0.3), [0.5, 0.2, 0.3], 1, 0.7
    tokens = torch.tensor([0, 1, 2])
    at = torch.full((3,), level, dtype=torch.float64)
    like = torch.stack([process.marginal(torch.eye(5).double()[x][None], at[:1])[0, v] for x in tokens])
    joint = torch.tensor(prior, dtype=torch.float64) * like  # P(x) q(v | x)
    logits = torch.tensor([*prior, 0.0, 1e-300], dtype=torch.float64).log().clamp(min=-300).requires_grad_()
    terms = gidd_objective(logits.expand(3, 5), tokens, torch.full((3,), v), at, mixing=process, weighting=weighting)
    (slope,) = torch.autograd.grad((joint * terms.minimised).sum(), logits)
    assert float(slope.abs().max()) < 1e-15
    assert json.dumps(terms.minimised.tolist())  # every value is finite
