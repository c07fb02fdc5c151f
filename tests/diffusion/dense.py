"""The objective as defined, dense and in float64: what the closed forms are held to."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from megadiff.diffusion.noise_process import NoiseProcess
from megadiff.diffusion.objective import Terms, gidd_objective

GOLDEN = Path(__file__).parents[1] / "golden"
LOGITS = torch.tensor([1.2, -0.4, 0.3, 2.5, -1.1], dtype=torch.float64)
Z_LINEAR = 0.9997532108480275  # sigmoid(9) - sigmoid(-9)


def bounds() -> dict[str, Any]:
    return json.loads((GOLDEN / "bounds.json").read_text())


def read_csv(name: str) -> list[dict[str, str]]:
    with (GOLDEN / name).open() as file:
        return list(csv.DictReader(file))


def f64(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def dense_objective(
    logits: Tensor, clean: Tensor, noised: Tensor, log_snr: Tensor, *, vocab: int, mask: int, b: float, a: float
) -> tuple[Tensor, Tensor]:
    """(w (KL + IS), w) straight from proposition 1, forming q, qhat, pi and pi' over the vocabulary."""
    ids = torch.arange(vocab)
    lam = log_snr.unsqueeze(-1)
    u = torch.sigmoid(a * lam + b)
    one_minus_u = torch.sigmoid(-(a * lam + b))
    pi = torch.where(ids == mask, one_minus_u, u / (vocab - 1))
    pi_prime = torch.where(ids == mask, -a * u * one_minus_u, a * u * one_minus_u / (vocab - 1))
    alpha, beta = torch.sigmoid(lam), torch.sigmoid(-lam)
    x = (ids == clean.unsqueeze(-1)).double()
    p = logits.masked_fill(ids == mask, -torch.inf).softmax(-1)
    q, q_hat = alpha * x + beta * pi, alpha * p + beta * pi
    seen = q > 0
    kl = torch.where(seen, q * (torch.log(torch.where(seen, q, 1.0)) - torch.log(torch.where(seen, q_hat, 1.0))), 0.0)
    z = noised.unsqueeze(-1)
    ratio = (q.gather(-1, z) / q_hat.gather(-1, z)).squeeze(-1)
    weight = (beta * (pi - pi_prime)).gather(-1, z).squeeze(-1) / q.gather(-1, z).squeeze(-1)
    return weight * (kl.sum(-1) + ratio - torch.log(ratio) - 1), weight


def gauss(low: float, high: float, panels: int = 60, order: int = 16) -> tuple[Tensor, Tensor]:
    """Nodes and weights of composite Gauss-Legendre quadrature."""
    x, w = np.polynomial.legendre.leggauss(order)
    edges = np.linspace(low, high, panels + 1)
    half = np.diff(edges)[:, None] / 2
    nodes = (edges[:-1, None] + half * (x + 1)).ravel()
    return torch.from_numpy(nodes), torch.from_numpy((half * w).ravel())


def over_z(logits: Tensor, x: int, log_snr: Tensor, process: NoiseProcess) -> tuple[Terms, Tensor]:
    """Terms for every z at each level, [n, V], and q(z | x) [n, V]; logits [V], [V_z, V] or [n, V_z, V]."""
    count, vocab = len(log_snr), process.vocab_size
    z = torch.arange(vocab).expand(count, vocab)
    lam = log_snr.unsqueeze(-1).expand(count, vocab)
    logits = logits.expand(count, vocab, logits.shape[-1])
    terms = gidd_objective(logits, torch.full_like(z, x), z, lam, mixing=process)
    q = process.marginal(torch.eye(vocab, dtype=torch.float64)[x].expand(count, vocab), log_snr)
    return terms, q


def integral(
    logits: Tensor, x: int, process: NoiseProcess, low: float = -9.0, high: float = 9.0, panels: int = 60
) -> float:
    """Integral over lambda of E_z[w (KL + IS)] for a prediction that depends on neither."""
    nodes, weights = gauss(low, high, panels)
    terms, q = over_z(logits, x, nodes, process)
    return float((weights * (q * terms.loss).sum(-1)).sum())
