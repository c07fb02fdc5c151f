"""Likelihoods of texts whose worth is known: estimates, their standard errors, and what they may not depend on."""

from __future__ import annotations

import itertools
import math
import os
from functools import cache
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
from scipy import stats
from torch import Tensor

from megadiff.diffusion.mixing import HybridMixing
from megadiff.diffusion.objective import gidd_objective
from megadiff.eval.effective_count import copy_bounds
from megadiff.eval.likelihood import (
    BoundSettings,
    Item,
    Likelihood,
    bounds,
    exact,
    mean_and_error,
    sequences_read,
    summed,
)
from tests.diffusion.dense import gauss
from tests.sampling.toy_joint import JOINT, MASK, NOISES, REAL, VOCAB, leave_one_out, probability

TEXT = (0, 3, 3, 1)
SEEDS = 100


def denoiser(name: str, level: float):
    """The toy's posterior as if every copy were of one level: what a model that is not told the level may answer."""
    process = HybridMixing(VOCAB, MASK, NOISES[name])
    return lambda ids, _prompts=None: leave_one_out(ids, level, process)


def at_level(name: str) -> float:
    """Of masked noise the posterior depends on no level, if only tokens that are no mask are certain."""
    return 30.0 if name == "masked" else 0.5


@cache
def enumerated_bound(name: str) -> float:
    """The bound of TEXT by summing over all 5^4 copies and quadrature over all levels: no Monte Carlo."""
    process = HybridMixing(VOCAB, MASK, NOISES[name])
    nodes, weights = gauss(-35, 35, panels=24)
    clean = torch.tensor(TEXT)
    copies = torch.tensor(list(itertools.product(range(VOCAB), repeat=4)))
    logits = denoiser(name, at_level(name))(copies)
    total = 0.0
    for node, weight in zip(nodes, weights, strict=True):
        q_token = process.marginal(torch.eye(VOCAB).double()[clean], node.expand(4))  # [4, V]
        q = q_token[torch.arange(4), copies].prod(-1)
        many, seen = node.expand(len(copies), 4), q > 0
        terms = gidd_objective(logits[seen], clean.expand_as(copies)[seen], copies[seen], many[seen], mixing=process)
        total += float(weight * (q[seen] * terms.loss.sum(-1)).sum())
    return total


@cache
def copies_known(name: str) -> dict[tuple[Any, ...], Any]:
    """Return the memo of a noise: the bound of each copy of TEXT, by copy and level, that a test has computed."""
    return {}


def estimates(name: str, item: Item, **settings) -> list[Likelihood]:
    """One estimate a seed. What a copy says is worked out once: there are 625 copies and many draws of them."""
    process = HybridMixing(VOCAB, MASK, NOISES[name])
    answer, known = denoiser(name, at_level(name)), copies_known(name)

    def remembered(logits, clean, noised, log_snr, *, process):
        key = (*noised.tolist(), log_snr)
        if key not in known:
            known[key] = copy_bounds(logits, clean, noised, log_snr, process=process)
        return known[key]

    with mock.patch("megadiff.eval.likelihood.copy_bounds", remembered):
        return [
            bounds([item], answer, process=process, settings=BoundSettings(seed=seed, batch_size=256, **settings))[0]
            for seed in range(SEEDS)
        ]


def covered(found: list[Likelihood], truth: float, errors: float = 2.0) -> int:
    return sum(abs(one.nll - truth) <= errors * one.stderr for one in found)


def test_masked_noise_and_the_exact_denoiser_bracket_the_likelihood():
    """The bound is tight here (the posteriors do not depend on the level), so the truth is the likelihood itself."""
    truth = -math.log(probability(list(TEXT)))
    assert enumerated_bound("masked") == pytest.approx(truth, abs=1e-8)
    found = estimates("masked", Item((), TEXT), draws=256)
    assert covered(found, truth) >= 95
    assert abs(np.mean([one.nll for one in found]) - truth) < 4 * np.std([one.nll for one in found]) / SEEDS**0.5
    assert np.mean([one.stderr for one in found]) < 0.1 * truth


@pytest.mark.parametrize("name", ["hybrid", "uniform"])
def test_estimates_with_uniform_tokens_bracket_the_bound_over_all_copies(name):
    """A model that is not told the level does not know the posterior, so the truth is its own bound, worked out."""
    truth = enumerated_bound(name)
    found = estimates(name, Item((), TEXT), draws=256)
    assert covered(found, truth) >= 95
    assert abs(np.mean([one.nll for one in found]) - truth) < 4 * np.std([one.nll for one in found]) / SEEDS**0.5


def test_stratified_levels_agree_with_counts_and_scatter_more():
    item, truth = Item((), TEXT), enumerated_bound("hybrid")
    levels, counts = (estimates("hybrid", item, draws=32, estimator=kind) for kind in ("levels", "counts"))
    spread = {kind: np.std([one.nll for one in found]) for kind, found in (("levels", levels), ("counts", counts))}
    assert np.mean([one.nll for one in levels]) == pytest.approx(truth, abs=4 * spread["levels"] / SEEDS**0.5 + 2e-3)
    assert spread["counts"] < 0.7 * spread["levels"]
    honest = np.mean([((one.nll - truth) / one.stderr) ** 2 for one in counts])
    assert honest < 2.0, honest  # 16 differences: a few degrees of freedom


def test_a_completion_is_measured_given_its_clean_prompt():
    """Only the completion is noised; the exact conditional is what comes out."""
    index = torch.searchsorted(REAL, torch.tensor(TEXT)).tolist()
    conditional = JOINT[index[0], index[1]] / JOINT[index[0], index[1]].sum()
    truth = -math.log(float(conditional[index[2], index[3]]))
    seen: list[Tensor] = []
    process, answer = HybridMixing(VOCAB, MASK, NOISES["masked"]), denoiser("masked", 30.0)

    def watch(ids: Tensor, prompts: Tensor) -> Tensor:
        seen.append(ids)
        assert prompts.tolist() == [2] * len(ids)
        return answer(ids)

    settings = BoundSettings(draws=400, batch_size=100)
    found = bounds([Item(TEXT[:2], TEXT[2:])], watch, process=process, settings=settings)[0]
    assert abs(found.nll - truth) <= 2 * found.stderr
    assert found.tokens == 2
    sequences = torch.cat(seen)
    assert bool((sequences[:, :2] == torch.tensor(TEXT[:2])).all())
    assert bool((sequences[:, 2:] == MASK).any())


@pytest.mark.parametrize("length", [1, 5, 50])
def test_masked_completions_of_any_length_show_no_bias_of_n_over_n_plus_1(length):
    """A model that always pays 1 nat a token is worth n nats, to the last digit: n^2 / (n + 1) is the biased answer."""
    process = HybridMixing(VOCAB, MASK, -1000.0)
    one_nat = torch.full((VOCAB,), math.log((1 - math.exp(-1)) / 3), dtype=torch.float64)
    one_nat[0] = -1.0
    item, settings = Item((), (0,) * length), BoundSettings(draws=16)
    found = bounds([item], lambda ids, _: one_nat.expand(*ids.shape, VOCAB), process=process, settings=settings)[0]
    assert found.nll == pytest.approx(length, rel=1e-12)
    assert found.stderr == pytest.approx(0, abs=1e-12)


@pytest.mark.parametrize("name", ["hybrid", "uniform"])
@pytest.mark.parametrize("length", [1, 5, 50])
def test_completions_with_uniform_noise_of_any_length_show_no_bias_either(name, length):
    """With a prediction that depends on nothing the bound is -log p a token, whatever the noise (it telescopes)."""
    process = HybridMixing(VOCAB, MASK, NOISES[name])
    logits = torch.tensor([0.8, -0.4, 0.0, 0.3, -1.1]).double()
    probs = logits.masked_fill(torch.arange(VOCAB) == MASK, -torch.inf).softmax(-1)
    draw = np.random.default_rng(0)
    ratios, scatter = [], []
    for seed in range(60 if length < 50 else 30):
        item = Item((), tuple(REAL[draw.integers(0, 4, size=length)].tolist()))
        truth = -float(probs[list(item.completion)].log().sum())
        found = bounds(
            [item], lambda ids, _: logits.expand(*ids.shape, VOCAB), process=process,
            settings=BoundSettings(draws=16 if length < 50 else 32, seed=seed),
        )[0]  # fmt: skip
        ratios.append(found.nll - truth)
        scatter.append(truth)
    bias, error = np.mean(ratios), np.std(ratios) / len(ratios) ** 0.5
    assert abs(bias) < 4 * error
    assert 4 * error < 2.0 * np.mean(scatter) / (length + 1), "too noisy to see the bias"


@pytest.mark.parametrize("name", ["hybrid", "uniform"])
def test_integrating_the_level_out_agrees_with_dense_quadrature(name):
    process, length = HybridMixing(9, 4, NOISES[name]), 40
    draw = torch.Generator().manual_seed(3)
    clean = torch.randint(0, 4, (length,), generator=draw)
    logits = torch.randn(length, 9, generator=draw).double()
    nodes, weights = gauss(-39.5, 39.5, panels=400, order=12)
    eye = torch.eye(9).double()[clean]
    for share in (0.0, 0.03, 0.4, 1.0):
        noised = torch.where(torch.arange(length) < share * length, (clean + 5) % 9, clean)
        if name == "hybrid":
            noised = torch.where(torch.arange(length) < share * length / 2, 4, noised)
        noised = torch.where((noised == 4) & (name == "uniform"), 5, noised)
        q = process.marginal(eye.expand(len(nodes), length, 9), nodes[:, None].expand(-1, length))
        q = q.gather(-1, noised.expand(len(nodes), length).unsqueeze(-1)).squeeze(-1).log().sum(-1)
        like = weights * torch.exp(q - q.max())
        many = len(nodes), length
        terms = gidd_objective(
            logits.expand(*many, 9),
            clean.expand(many),
            noised.expand(many),
            nodes[:, None].expand(many),
            mixing=process,
        )
        want = float((like * terms.loss.sum(-1)).sum() / (like * torch.sigmoid(nodes) * torch.sigmoid(-nodes)).sum())
        assert copy_bounds(logits, clean, noised, None, process=process) == pytest.approx(want, rel=1e-9), share


ITEMS = [Item((1, 2), (3, 5, 6)), Item((), (7,)), Item((8,), (1, 1, 1, 1)), Item((3,), ()), Item((2, 2, 2), (5, 6))]
TABLE = torch.randn(9, 9, generator=torch.Generator().manual_seed(0)).double()


def bigram(ids: Tensor, _prompts: Tensor) -> Tensor:
    return TABLE[ids] + TABLE.T[ids.roll(1, 1)]


@pytest.mark.parametrize("name", NOISES)
@pytest.mark.parametrize("context", [None, 12])
def test_an_item_does_not_depend_on_its_batch_or_place(name, context):
    process = HybridMixing(9, 4, NOISES[name])

    def measured(items, batch_size):
        settings = BoundSettings(draws=8, batch_size=batch_size, context_length=context)
        return bounds(items, bigram, process=process, settings=settings)

    together = measured(ITEMS, 7)
    assert together == measured(ITEMS, 1)
    assert together[::-1] == measured(ITEMS[::-1], 64)
    assert together[3].nll == together[3].stderr == 0.0
    assert [one.tokens for one in together] == [3, 1, 4, 0, 2]


def test_a_filled_context_is_pure_noise_behind_the_completion():
    seen: list[Tensor] = []

    def watch(ids: Tensor, _prompts: Tensor) -> Tensor:
        seen.append(ids)
        return bigram(ids, _prompts)

    settings = BoundSettings(draws=4, context_length=300)
    bounds([ITEMS[0]], watch, process=HybridMixing(9, 4, NOISES["uniform"]), settings=settings)
    tail = seen[0][:, 5:]
    assert tail.shape[1] == 295
    assert not bool((tail == 4).any())
    assert np.bincount(tail[0].numpy(), minlength=9)[[0, 1, 2, 3, 5, 6, 7, 8]].min() > 15
    with pytest.raises(ValueError, match="an item has 5 tokens, more than the context of 4"):
        bounds(ITEMS, bigram, process=HybridMixing(9, 4, 0.0), settings=BoundSettings(draws=4, context_length=4))


def test_an_autoregressive_model_is_measured_exactly():
    table = TABLE.clone()

    def next_token(ids: Tensor, _prompts: Tensor) -> Tensor:
        return torch.nn.functional.pad(table[ids], (0, 3), value=50.0)  # padding columns say nothing

    found = exact(ITEMS, next_token, start_id=0, mask_id=4, vocab_size=9, batch_size=2)
    log_p = table.masked_fill(torch.arange(9) == 4, -torch.inf).log_softmax(-1)
    for item, one in zip(ITEMS, found, strict=True):
        sequence = (0, *item.ids)
        want = -sum(float(log_p[sequence[i], sequence[i + 1]]) for i in range(len(item.prompt), len(item.ids)))
        assert one.nll == pytest.approx(want, rel=1e-12)
        assert one.stderr == 0.0


def test_the_standard_error_of_neighbouring_strata():
    """Two pairs, one of which makes all the variance: one degree of freedom, and an error that is widened for it."""
    mean, error, degrees = mean_and_error(np.array([1.0, 3.0, 2.0, 2.0]))
    assert (mean, degrees) == (2.0, 1.0)
    assert error == pytest.approx(0.5 * stats.t.ppf(0.975, 1) / stats.norm.ppf(0.975), rel=0.12)
    assert mean_and_error(np.full(8, 3.0)) == (3.0, 0.0, math.inf)
    draw = np.random.default_rng(0)
    for size, low, high in ((8, 0.925, 0.985), (64, 0.935, 0.965)):
        found = [mean_and_error(draw.normal(size=size)) for _ in range(2000)]
        assert low < np.mean([abs(mean) <= 1.96 * error for mean, error, _ in found]) < high
    with pytest.raises(ValueError, match="draws must be even and at least 4, got 5"):
        BoundSettings(draws=5)


@pytest.mark.parametrize("degrees", [3.0, 8.0, 31.0, 1e6])
def test_an_error_of_few_degrees_is_widened_by_students_t(degrees):
    item = Item((), (1,))
    found = {item: Likelihood(1.0, 0.5, 1, degrees), Item((), (2,)): Likelihood(1.0, 0.0, 1)}
    total = summed(found, found)
    assert (total.nll, total.tokens, total.degrees) == (2.0, 2, pytest.approx(degrees))
    assert total.stderr == pytest.approx(0.5)
    plain = 0.5 / stats.t.ppf(0.975, degrees) * stats.norm.ppf(0.975)
    both = summed([item, item, *found], {**found, Item((), (2,)): Likelihood(1.0, 3 * plain, 1)})
    assert both.degrees == pytest.approx(4 * degrees, rel=5e-3)  # equal variances, one of them of many degrees
    assert both.stderr == pytest.approx(plain * 18**0.5 * stats.t.ppf(0.975, 4 * degrees) / 1.96, rel=2e-3)


def test_equal_items_are_measured_once_and_their_errors_add_as_one():
    seen: list[Tensor] = []
    read: list[int] = []

    def watch(ids: Tensor, _prompts: Tensor) -> Tensor:
        seen.append(ids)
        return bigram(ids, _prompts)

    items = [ITEMS[0], ITEMS[1], ITEMS[0], ITEMS[0], ITEMS[3]]
    process, settings = HybridMixing(9, 4, -1000.0), BoundSettings(draws=16, batch_size=5)
    found = bounds(items, watch, process=process, settings=settings, progress=read.append)
    assert sum(len(ids) for ids in seen) == 2 * 16 == sum(read) == sequences_read(items, draws=16)
    assert found[0] == found[2] == found[3] != found[1]
    total = summed(items, dict(zip(items, found, strict=True)))
    assert total.nll == pytest.approx(3 * found[0].nll + found[1].nll)
    assert total.tokens == 3 * 3 + 1
    thrice = summed([items[0]] * 3, {items[0]: found[0]})
    assert thrice.stderr == pytest.approx(3 * found[0].stderr)
    seen.clear()
    table = TABLE.clone()
    once = exact([*items, *items], lambda ids, _: seen.append(ids) or table[ids], start_id=0, mask_id=4, vocab_size=9)
    assert sum(len(ids) for ids in seen) == 2
    assert len(once) == 10
    assert once[:5] == once[5:]


WHICH = {"distinct": list(range(8)), "repeated": [0] * 20, "mixed": [*[0] * 10, 1, 2, 3, 4, *[5] * 5]}
SPREAD = torch.tensor([0.8, -0.4, 9.0, 0.3, -1.1, 1.5, -2.0]).double()
"""Logits that a model answers everywhere, over seven entries of which 2 is the mask: its bound is -log p a token."""


@cache
def coverage(name: str, seeds: int, draws: int) -> dict[str, float]:
    """Return how often 1.96 standard errors hold the truth: of eight texts, one twenty times over, and a mixture."""
    process, real = HybridMixing(7, 2, NOISES[name]), np.array([0, 1, 3, 4, 5, 6])
    log_p = SPREAD.masked_fill(torch.arange(7) == 2, -torch.inf).log_softmax(-1).numpy()
    hits = dict.fromkeys(WHICH, 0)
    for seed in range(seeds):
        draw = np.random.default_rng(seed)
        items = [Item((), tuple(real[draw.integers(0, 6, size=12)].tolist())) for _ in range(8)]
        settings = BoundSettings(draws=draws, seed=seed, batch_size=1024)
        measured = bounds(items, lambda ids, _: SPREAD.expand(*ids.shape, 7), process=process, settings=settings)
        found = dict(zip(items, measured, strict=True))
        for kind, places in WHICH.items():
            total = summed([items[place] for place in places], found)
            truth = -sum(log_p[list(items[place].completion)].sum() for place in places)
            hits[kind] += bool(abs(total.nll - truth) <= 1.96 * total.stderr)
    return {kind: count / seeds for kind, count in hits.items()}


@pytest.mark.parametrize("kind", WHICH)
def test_the_stated_error_covers_the_truth_with_and_without_repeats(kind):
    """The bounds leave room for the chance of 100 seeds; MEGADIFF_COVERAGE=full takes more seeds and noises.

    Errors added as those of independent texts would hold the truth of a repeated text a third of the time.
    """
    assert 0.90 <= coverage("masked", 100, 32)[kind] <= 0.99


@pytest.mark.skipif(os.environ.get("MEGADIFF_COVERAGE") != "full", reason="minutes long; set MEGADIFF_COVERAGE=full")
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("kind", WHICH)
@pytest.mark.parametrize("name", NOISES)
def test_the_stated_error_covers_the_truth_under_every_noise(name, kind):
    seeds = 1000 if name == "masked" else 300
    assert 0.93 - 1.0 / seeds**0.5 <= coverage(name, seeds, 64)[kind] <= 0.97 + 1.0 / seeds**0.5
