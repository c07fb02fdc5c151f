"""The integral over all noise levels against brute force in float64, written out from the definitions."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from megadiff.diffusion.mixing import HybridMixing
from megadiff.diffusion.noise_process import NoiseProcess
from megadiff.diffusion.processes.gidd_time import GiddTime
from megadiff.eval.effective_count import integrated_bound
from tests.diffusion.dense import gauss

NODES, WEIGHTS = (part.numpy() for part in gauss(-45.0, 110.0, panels=20_000, order=8))
SHIFTS = {"uniform": (1000.0, 1.0), "balanced": (0.0, 1.0), "low": (-2.0, 1.0), "half scale": (1.0, 0.5)}


def brute_force(counts: tuple[int, int, int], vocab: int, shift: float, scale: float, log_p: float | None) -> float:
    """The integral for copies with so many masks, kept and changed tokens, whose clean tokens all have one log p.

    The other real tokens share what is left of the probability evenly; log_p None gives every token the same.
    """
    real, level = vocab - 1, NODES
    p = 1.0 / real if log_p is None else np.exp(log_p)
    rest = (1.0 - p) / max(1, real - 1)
    alpha, beta = 1.0 / (1.0 + np.exp(-level)), 1.0 / (1.0 + np.exp(level))
    u, mask_share = (1.0 / (1.0 + np.exp(sign * np.clip(scale * level + shift, -700, 700))) for sign in (-1, 1))
    c, slope = beta * u / real, scale * u * mask_share
    log_x, log_v = np.log((alpha + c) / (alpha * p + c)), -np.log1p(alpha * rest / c)
    kl = (alpha + c) * log_x + (real - 1) * c * log_v
    weight = {
        "mask": np.divide(mask_share + slope, mask_share, out=np.ones_like(level), where=mask_share > 0),
        "kept": (u / real - slope / real) / (u / real + np.exp(level)),
        "changed": (u - slope) / u,
    }
    divergence = {"mask": 0.0, "kept": np.expm1(log_x) - log_x, "changed": np.expm1(log_v) - log_v}
    with np.errstate(divide="ignore"):
        log_parts = np.log(beta) + np.log(mask_share), np.log(alpha + c), np.log(c)
    log_q = sum(count * part for count, part in zip(counts, log_parts, strict=True) if count)
    q = WEIGHTS * np.exp(log_q - log_q.max())
    total = sum(
        count * (q * weight[kind] * (kl + divergence[kind])).sum()
        for count, kind in zip(counts, ("mask", "kept", "changed"), strict=True)
    )
    return float(total / (q * alpha * beta).sum())


def copy_of(counts: tuple[int, int, int], vocab: int, log_p: float | None) -> tuple[torch.Tensor, ...]:
    """Logits [n, V], clean and noised ids of such a copy; the mask is id 0."""
    clean = torch.full((sum(counts),), 1)
    noised = torch.cat([torch.full((count,), token) for count, token in zip(counts, (0, 1, 2), strict=True)])
    logits = torch.zeros(len(clean), vocab, dtype=torch.float64)
    if log_p is not None:
        logits[:, 1] = log_p + np.log(vocab - 2) - np.log1p(-np.exp(log_p))
    return logits, clean, noised


@pytest.mark.parametrize(
    ("counts", "vocab"),
    [
        *(((0, 1, 0), vocab) for vocab in (2, 3, 260, 131_072, 262_144)),
        *(((0, 0, 1), vocab) for vocab in (3, 260, 131_072, 262_144)),
        *(((1, 0, 0), vocab) for vocab in (2, 131_072)),
        ((0, 2, 1), 50_258),
        ((7, 20, 10), 1000),
        ((0, 300, 1), 50),
        ((0, 4096, 0), 50),
        ((200, 3800, 96), 50),
        ((0, 1000, 3096), 50),
        ((4000, 0, 96), 50),
    ],
)
@pytest.mark.parametrize("noise", SHIFTS)
def test_every_vocabulary_and_length_is_integrated_to_nine_digits(noise, counts, vocab):
    if noise == "uniform" and counts[0]:
        counts = (0, counts[1], counts[0] + counts[2])
    if vocab == 2 and counts[2]:
        counts = (0, 1, 0)  # a vocabulary of one real token has none to change to
    wanted = brute_force(counts, vocab, *SHIFTS[noise], log_p=None)
    found = integrated_bound(*copy_of(counts, vocab, None), process=HybridMixing(vocab, 0, *SHIFTS[noise]))
    assert found == pytest.approx(wanted, rel=1e-9, abs=1e-9)


@pytest.mark.parametrize("log_p", [-1e-6, -3.0, -30.0, -60.0])
@pytest.mark.parametrize("counts", [(0, 1, 0), (0, 0, 1), (0, 5, 2)])
@pytest.mark.parametrize("noise", SHIFTS)
def test_tokens_predicted_surely_or_hardly_at_all(noise, counts, log_p):
    """A hardly expected token's integrand is flat up to log-SNR = -log(N p): where an integral may end too early."""
    vocab = 260
    wanted = brute_force(counts, vocab, *SHIFTS[noise], log_p=log_p)
    found = integrated_bound(*copy_of(counts, vocab, log_p), process=HybridMixing(vocab, 0, *SHIFTS[noise]))
    assert found == pytest.approx(wanted, rel=2e-9, abs=1e-9)


@pytest.mark.parametrize("process", [GiddTime(0.2, 0.8), GiddTime(0.3)])
@pytest.mark.parametrize("noise", [None, *SHIFTS])
@pytest.mark.parametrize("unlikely", [None, -300.0, -torch.inf], ids=["all likely", "unlikely", "impossible"])
def test_one_token_is_worth_minus_log_p_whatever_the_noise(noise, process, unlikely):
    """For a prediction that depends on nothing, the mean over z and all levels telescopes: no quadrature at all.

    A copy of one token has noise count 0 or 1 with probability 1/2 each; its z follows from the level's law given that.
    """
    vocab, mask = 9, 4
    if noise is None:
        process: NoiseProcess = NoiseProcess(vocab, mask, process)
    else:
        process = HybridMixing(vocab, mask, *SHIFTS[noise])
    logits = torch.randn(vocab, generator=torch.Generator().manual_seed(2)).double()
    if unlikely is not None:
        logits[:3] = unlikely
    log_p = logits.masked_fill(torch.arange(vocab) == mask, -torch.inf).log_softmax(-1)
    x = torch.tensor([6])
    nodes, weights = gauss(-40, 100, panels=300)
    law = weights * torch.sigmoid(nodes) * torch.sigmoid(-nodes)
    q = law @ process.marginal(torch.eye(vocab).double()[x].expand(len(nodes), -1), nodes)  # [V]: law of z
    value = sum(
        float(q[z]) * integrated_bound(logits[None], x, torch.tensor([z]), process=process)
        for z in range(vocab)
        if q[z] > 0
    )
    assert value == pytest.approx(-float(log_p[6]), abs=1e-9)
