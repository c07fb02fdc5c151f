"""The objective as the papers write it, every distribution a whole [T, V] tensor: what a fused head replaces."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional


def transcribed_loss(
    hidden: Tensor, weight: Tensor, clean: Tensor, noised: Tensor, log_snr: Tensor, *, mask_id: int, shift: float
) -> Tensor:
    """Sum of w (KL(q || qhat) + IS(q_z, qhat_z)) over tokens [T], scale a = 1 (arXiv:2512.10858, proposition 1).

    Digits are lost where KL is small beside the sums it is the difference of; this is about time and memory.
    """
    logits = functional.linear(hidden, weight)
    vocab_size = logits.shape[-1]
    is_mask = torch.arange(vocab_size) == mask_id
    p = logits.masked_fill(is_mask, -torch.inf).log_softmax(dim=-1).exp()
    alpha, uniform = torch.sigmoid(log_snr)[:, None], torch.sigmoid(log_snr + shift)[:, None]
    noise = torch.where(is_mask, 1 - uniform, uniform / (vocab_size - 1))
    q = functional.one_hot(clean, vocab_size) * alpha + (1 - alpha) * noise
    q_hat = alpha * p + (1 - alpha) * noise
    kl = (torch.xlogy(q, q) - torch.xlogy(q, q_hat)).sum(dim=-1)
    at = noised[:, None]
    ratio = q.gather(-1, at) / q_hat.gather(-1, at)
    is_div = (ratio - ratio.log() - 1).squeeze(-1)
    slope = torch.where(at == mask_id, (1 - uniform) * (1 + uniform), uniform.square() / (vocab_size - 1))
    odds = torch.where(noised == clean, torch.exp(log_snr), torch.zeros_like(log_snr))
    w = slope.squeeze(-1) / (noise.gather(-1, at).squeeze(-1) + odds)
    return (w * (kl + is_div)).sum()
