"""The objective as computed by the paper's code, with whole [T, V] distributions, which a fused head replaces."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional


def transcribed_loss(
    hidden: Tensor, weight: Tensor, clean: Tensor, noised: Tensor, log_snr: Tensor, *, mask_id: int, shift: float
) -> Tensor:
    """Sum of w (KL(q || qhat) + IS(q_z, qhat_z)) over tokens [T], scale a = 1 (arXiv:2512.10858, proposition 1).

    The order of operations is that of the paper's code: softmax, marginals, their logarithms clamped at -1e6, and the
    divergence of the two, in float32. It is not valid for purely uniform noise, for which the mask's logarithm has no
    slope. Digits are lost where KL is small compared with the sums it is a difference of; only time and memory matter
    here.
    """
    logits = functional.linear(hidden, weight)
    vocab_size = logits.shape[-1]
    is_mask = torch.arange(vocab_size) == mask_id
    p = logits.masked_fill(is_mask, -1e6).softmax(dim=-1)
    alpha, uniform = torch.sigmoid(log_snr)[:, None], torch.sigmoid(log_snr + shift)[:, None]
    noise = torch.where(is_mask, 1 - uniform, uniform / (vocab_size - 1))
    at = noised[:, None]
    log_q_hat = (alpha * p + (1 - alpha) * noise).log().clamp_min(-1e6)
    log_q = ((1 - alpha) * noise).scatter_add_(-1, clean[:, None], alpha).log().clamp_min(-1e6)
    kl = (log_q.exp() * (log_q - log_q_hat)).sum(dim=-1)
    log_ratio = (log_q.gather(-1, at) - log_q_hat.gather(-1, at)).squeeze(-1)
    itakura_saito = log_ratio.exp() - log_ratio - 1
    slope = torch.where(at == mask_id, (1 - uniform) * (1 + uniform), uniform.square() / (vocab_size - 1))
    odds = torch.where(noised == clean, torch.exp(log_snr), torch.zeros_like(log_snr))
    w = slope.squeeze(-1) / (noise.gather(-1, at).squeeze(-1) + odds)
    return (w * (kl + itakura_saito)).sum()
