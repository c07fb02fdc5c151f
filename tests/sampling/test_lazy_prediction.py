"""Probabilities made for a few positions at a time against those of the whole vocabulary at once: to the bit."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from megadiff.diffusion.mixing import HybridMixing
from megadiff.diffusion.noise_process import NoiseProcess
from megadiff.sampling import standalone
from megadiff.sampling.standalone import (
    LazyPrediction,
    Prediction,
    Settings,
    adaptive_candidates,
    draw_tokens,
    generate,
    noise_probability,
    predict,
    reverse_kernel,
    reverse_step,
)

SHIFTS = (-1000.0, -2.0, 0.0, 2.0, 1000.0)
OPTIONS: tuple[dict[str, Any], ...] = ({}, {"temperature": 0.7, "top_k": 3}, {"top_p": 0.8}, {"temperature": 0})


def of_ids(probs: Tensor, ids: Tensor) -> Tensor:
    return probs.gather(-1, ids.unsqueeze(-1)).squeeze(-1)


def plain_reverse_step(
    prediction: Prediction, ids: Tensor, t: float, s: float, uniforms: Tensor, process: NoiseProcess
) -> Tensor:
    """Draw every token from the whole of its distribution, as the definition has it."""
    at_t, at_s = (torch.full(ids.shape, level, dtype=torch.float64) for level in (t, s))
    keep, fresh = reverse_kernel(ids, at_t, at_s, process)
    alpha, beta = torch.sigmoid(at_s), torch.sigmoid(-at_s)
    marginal = alpha * of_ids(prediction.probs, ids).double() + beta * noise_probability(process, at_s, ids)
    is_fresh = uniforms[1] * (keep * marginal + fresh) < fresh
    is_mask = (uniforms[2] - alpha) < beta * process.mask_prob(at_s)
    real = (uniforms[0] * process.num_real).long().clamp(max=process.num_real - 1)
    drawn = torch.where(is_mask, process.mask_id, real + (real >= process.mask_id).long())
    from_model = is_fresh & (uniforms[2] < alpha)
    cumulative = prediction.probs[from_model].double().cumsum(dim=-1)
    target = uniforms[0][from_model].unsqueeze(-1) * cumulative[..., -1:]
    drawn[from_model] = torch.searchsorted(cumulative, target, right=True).squeeze(-1).clamp(max=process.num_real)
    return torch.where(is_fresh, drawn, ids)


def case(vocab: int, mask: int, seed: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """Return sharp logits with padding columns, ids of which some are masks and some likely, and uniform numbers."""
    draw = torch.Generator().manual_seed(seed)
    logits = 3 * torch.randn(3, 40, vocab + 2, generator=draw, dtype=torch.float64)
    ids = torch.randint(0, vocab, (3, 40), generator=draw)
    ids[0] = logits[0, :, :vocab].argmax(dim=-1)
    ids[1, ::3] = mask
    return logits.to(dtype), ids, torch.rand(3, 3, 40, generator=draw, dtype=torch.float64)


@pytest.mark.parametrize("shift", SHIFTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_a_reverse_step_is_that_of_the_whole_vocabulary(shift, dtype, monkeypatch):
    for vocab, mask, numbers in ((7, 2, 1), (7, 6, 50), (300, 0, 3000)):
        monkeypatch.setattr(standalone, "_CPU_BLOCK", numbers)
        process = HybridMixing(vocab, mask, shift)
        for seed, options in enumerate(OPTIONS):
            logits, ids, uniforms = case(vocab, mask, seed, dtype)
            whole = predict(logits, process, **options)
            for t, s in ((-9.0, -4.0), (-1.0, 0.5), (2.0, 9.0)):
                want = plain_reverse_step(whole, ids, t, s, uniforms, process)
                for prediction in (whole, LazyPrediction(logits, process, **options)):
                    assert torch.equal(reverse_step(prediction, ids, t, s, uniforms, process=process), want)


@pytest.mark.parametrize("options", OPTIONS)
def test_probabilities_and_draws_are_those_of_the_whole_vocabulary(options, monkeypatch):
    for vocab, numbers in ((9, 1), (9, 100), (40000, 40000)):
        monkeypatch.setattr(standalone, "_CPU_BLOCK", numbers)
        process = HybridMixing(vocab, 3, 0.0)
        logits, ids, uniforms = case(vocab, 3, 5, torch.float32)
        whole, lazy = predict(logits, process, **options), LazyPrediction(logits, process, **options)
        assert torch.equal(lazy.at(ids), of_ids(whole.probs, ids))
        where = uniforms[1] < 0.4
        assert torch.equal(lazy.rows(where.nonzero(as_tuple=True)), whole.probs[where])
        cumulative = whole.probs[where].double().cumsum(dim=-1)
        target = uniforms[0][where].unsqueeze(-1) * cumulative[..., -1:]
        want = torch.searchsorted(cumulative, target, right=True).squeeze(-1).clamp(max=vocab - 1)
        assert torch.equal(draw_tokens(lazy, where, uniforms[0]), want)
        assert draw_tokens(lazy, torch.zeros_like(where), uniforms[0]).shape == (0,)


def test_threads_do_not_share_the_sum_of_a_single_position():
    process, before = HybridMixing(40000, 3, 0.0), torch.get_num_threads()
    logits = torch.randn(1, 6, 40000, generator=torch.Generator().manual_seed(0))
    torch.set_num_threads(2)
    try:
        whole, lazy = predict(logits, process, top_p=0.9), LazyPrediction(logits, process, top_p=0.9)
        for place in range(6):
            one = torch.tensor([0]), torch.tensor([place])
            assert torch.equal(lazy.rows(one), whole.rows(one))
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("shift", SHIFTS)
def test_adaptive_candidates_are_those_of_the_whole_vocabulary(shift):
    process = HybridMixing(50, 3, shift)
    logits, ids, uniforms = case(50, 3, 1, torch.float32)
    probs, fixed = predict(logits, process).probs, uniforms[0] < 0.3
    for level in (-9.0, 0.0, 5.0):
        gain = (probs.max(dim=-1).values - of_ids(probs, ids)).double()
        at = torch.tensor(level, dtype=torch.float64)
        score = (gain * noise_probability(process, at, ids)).masked_fill(fixed, 0.0)
        ranked, order = score.sort(dim=-1, descending=True, stable=True)
        chosen = ranked > 0
        chosen[:, 7:] = False
        want = torch.zeros_like(chosen).scatter_(-1, order, chosen)
        lazy = LazyPrediction(logits, process)
        assert torch.equal(adaptive_candidates(lazy, ids, level, noise=process, count=7, fixed=fixed), want)


@pytest.mark.parametrize("sampler", ["ancestral", "adaptive"])
def test_texts_do_not_depend_on_the_size_of_blocks(sampler, monkeypatch):
    table = torch.randn(30, 30, generator=torch.Generator().manual_seed(0))
    texts = []
    for numbers in (1, 100, 2**20):
        monkeypatch.setattr(standalone, "_CPU_BLOCK", numbers)
        for shift in SHIFTS:
            settings = Settings(max_new_tokens=12, max_denoising_steps=6, sampler=sampler, top_p=0.9)
            prompt = torch.tensor([[5], [7]])
            process = HybridMixing(30, 4, shift)
            texts.append(generate(lambda ids, _: table[ids], prompt, settings, process, seed=3).sequences)
    for first, *others in zip(*(texts[i : i + len(SHIFTS)] for i in range(0, len(texts), len(SHIFTS))), strict=True):
        assert all(torch.equal(first, other) for other in others)


def test_no_distribution_is_made_where_nothing_is_drawn(monkeypatch):
    """Under masked noise a revealed token stays and a mask has probability 0: only new tokens need a softmax."""
    made, rows = [], LazyPrediction.rows
    monkeypatch.setattr(LazyPrediction, "rows", lambda self, where: made.append(len(where[0])) or rows(self, where))
    process = HybridMixing(9, 4, -1000.0)
    settings = Settings(max_new_tokens=50, max_denoising_steps=10)
    prompt = torch.tensor([[5], [7]])
    generate(lambda ids, _: torch.zeros(*ids.shape, 9), prompt, settings, process)
    assert sum(made) == 100
