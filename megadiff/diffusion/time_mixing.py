"""The predecessor's noise as a mixing distribution in log-SNR, so that the objective and the samplers need no time.

In the terms of `mixing_base` it is hybrid noise whose scale a varies with the level: with t, u, w of `time_process`,
a = (1 - w) / (1 - u (1 - w)), for g = 1 simply 1 / (2 - u). Its weights w_z times p(lambda)^-1 = |d lambda / dt| are
the predecessor's weights in time (arXiv:2503.04482),

    z = m               1 / (t (1 - t))
    z real, z != x      (c + (1 - t) c') / ((1 - t) c)
    z = x               (c + (1 - t) c') / (N (1 - t) (1 - t + c / N))
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from megadiff.diffusion import exact
from megadiff.diffusion.mixing_base import FloatArray, Mixing
from megadiff.diffusion.time_process import TimeProcess

MAX_DYNAMIC_WEIGHT = 2.0
"""The predecessor's `max_loss_weight`."""


@dataclass(frozen=True)
class TimeMixing(Mixing):
    """The mixing distribution of `noise.form: time`; computed in float64, returned in the dtype of the levels."""

    process: TimeProcess

    @property
    def is_masked_limit(self) -> bool:
        """Whether p_u = 0."""
        return self.process.p_uniform == 0

    @property
    def is_uniform_limit(self) -> bool:
        """Never: noise ends in masks."""
        return False

    def logit_u(self, log_snr: Tensor) -> Tensor:
        """log(c / t) at the time of this level."""
        s = self.process.logit_t(log_snr.double(), torch)
        return self.process.logit_u(s, torch).to(log_snr.dtype)

    def exact_logit_u(self, log_snr: FloatArray) -> FloatArray:
        """log(c / t) at the time of this level."""
        return self.process.logit_u(self.process.logit_t(log_snr, exact), exact)

    def slope(self, log_snr: Tensor) -> Tensor:
        """a = (1 - w) / (1 - u (1 - w))."""
        s = self.process.logit_t(log_snr.double(), torch)
        rest = 1.0 - self.process.w(s, torch)
        return (rest / (1.0 - torch.sigmoid(self.process.logit_u(s, torch)) * rest)).to(log_snr.dtype)

    def weight(self, log_snr: Tensor, clean: Tensor, noised: Tensor) -> Tensor:
        """As `Mixing.weight`, in float64: for g != 1 the scale may pass 1, and 1 - a (1 - u) then cancels."""
        return super().weight(log_snr.double(), clean, noised).to(log_snr.dtype)

    def dynamic_weight(self, log_snr: Tensor, clean: Tensor, noised: Tensor) -> Tensor:
        """The predecessor's training weights: 2 at masks, 1 at uniform tokens, (B / V) e^(g lambda / 2) at clean ones.

        All held to MAX_DYNAMIC_WEIGHT. (The released code puts sigmoid(-t) where the log-SNR is meant, which makes the
        last of them nearly constant; not copied.)
        """
        process = self.process
        log_kept = process.log_b - math.log(self.vocab_size) + 0.5 * process.gamma * log_snr
        kept = torch.exp(log_kept).clamp(max=MAX_DYNAMIC_WEIGHT)
        real = torch.where(noised == clean, kept, torch.ones_like(kept))
        return torch.where(noised == self.mask_id, torch.full_like(kept, MAX_DYNAMIC_WEIGHT), real)
