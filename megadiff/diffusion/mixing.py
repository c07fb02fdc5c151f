"""Hybrid noise: what a token is replaced with, between a mask and a random token.

At level lambda a noised token is a uniform one with probability u = sigmoid(a lambda + b) and the mask otherwise, so

    q(z | x) = alpha 1[z = x] + beta pi_z,    pi_v = u / N for the N = V - 1 real tokens,  pi_m = 1 - u

(arXiv:2512.10858, sections 2.2 to 2.4; a = `scale`, b = `shift`, V counts the mask m, wherever its id stands).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from megadiff.diffusion import exact, snr
from megadiff.diffusion.config import SCALE_REASON, NoiseConfig
from megadiff.errors import ConfigError

LIMIT_SHIFT = 128.0
"""Beyond this |shift|, u is 0 or 1 to the last bit of float64 for every |log_snr| <= 50."""


@dataclass(frozen=True)
class HybridMixing:
    """The mixing distribution pi_lambda over V tokens, one of which is the mask.

    Args:
        vocab_size: V, the mask included; rows that only pad the vocabulary are not counted.
        mask_id: id of the mask, in [0, V).
        shift: b; -1000 is pure masking, 1000 purely uniform noise.
        scale: a in (0, 1].

    Raises:
        ConfigError: a scale above 1 (negative rates) or a mask outside the vocabulary.
    """

    vocab_size: int
    mask_id: int
    shift: float
    scale: float = 1.0

    def __post_init__(self) -> None:
        if not 0 < self.scale <= 1:
            raise ConfigError(f"noise.scale must lie in (0, 1], got {self.scale}: {SCALE_REASON}")
        if self.vocab_size < 2 or not 0 <= self.mask_id < self.vocab_size:
            raise ConfigError(
                f"the mask must be one of 2 or more vocabulary entries, got mask id {self.mask_id} of {self.vocab_size}"
            )
        if not math.isfinite(self.shift):
            raise ConfigError(f"noise.shift must be a finite number, got {self.shift}")

    @property
    def num_real(self) -> int:
        """N = V - 1, the number of tokens that are not the mask."""
        return self.vocab_size - 1

    @property
    def is_masked_limit(self) -> bool:
        """Whether noise is masks alone (u = 0 at every level)."""
        return self.shift <= -LIMIT_SHIFT

    @property
    def is_uniform_limit(self) -> bool:
        """Whether noise is random tokens alone (u = 1 at every level)."""
        return self.shift >= LIMIT_SHIFT

    def log_u(self, log_snr: Tensor) -> Tensor:
        """Log of the uniform share, by logsigmoid: finite where u itself underflows."""
        return logsigmoid(self.scale * log_snr + self.shift)

    def u(self, log_snr: Tensor) -> Tensor:
        """Uniform share of the noise, in [0, 1]."""
        return torch.sigmoid(self.scale * log_snr + self.shift)

    def mask_share(self, log_snr: Tensor) -> Tensor:
        """Mask share of the noise, 1 - u, without the subtraction."""
        return torch.sigmoid(-(self.scale * log_snr + self.shift))

    def uniform_share(self, log_snr: npt.ArrayLike) -> npt.NDArray[np.float64]:
        """`u` in float64 with the same bits on every machine, for drawing noise."""
        return exact.sigmoid(self.scale * np.asarray(log_snr, dtype=np.float64) + self.shift)

    def log_rho(self, log_snr: Tensor) -> Tensor:
        """log(alpha / c) = lambda + log N - log u: a token's signal over c = beta u / N, its share of the noise."""
        return log_snr + math.log(self.num_real) - self.log_u(log_snr)

    def pi(self, log_snr: Tensor) -> Tensor:
        """pi_lambda over the vocabulary, [..., V] for a log_snr of shape [...]; sums to 1."""
        return self._spread(self.u(log_snr) / self.num_real, self.mask_share(log_snr))

    def pi_prime(self, log_snr: Tensor) -> Tensor:
        """d pi / d lambda, [..., V]; sums to 0: a u (1 - u) / N on real tokens, -a u (1 - u) on the mask."""
        slope = self.scale * self.u(log_snr) * self.mask_share(log_snr)
        return self._spread(slope / self.num_real, -slope)

    def pi_at(self, log_snr: Tensor, tokens: Tensor) -> Tensor:
        """pi_lambda at the given ids, in their shape (log_snr broadcasts to it)."""
        real = self.u(log_snr) / self.num_real
        return torch.where(tokens == self.mask_id, self.mask_share(log_snr), real)

    def weight(self, log_snr: Tensor, clean: Tensor, noised: Tensor) -> Tensor:
        """Weight w = (pi_z - pi'_z) / (pi_z + e^lambda 1[z = x]) of a token's divergence in the bound.

            z = m               1 + a u
            z real, z != x      1 - a (1 - u)
            z = x               u (1 - a (1 - u)) / (u + N e^lambda)

        In the closed forms nothing cancels and nothing needs a floor (the released code clips the denominator at
        1e-8, which spoils hybrid noise at V = 131072). In the masked limit only masks weigh, w = 1; under uniform
        noise w = 1 except at z = x, 1 / (1 + N e^lambda). Always 0 <= w <= 1 + a, and E_z[w] = beta.

        Args:
            log_snr: lambda, any float dtype; broadcasts against the ids.
            clean, noised: ids x and z of one shape.

        Source: arXiv:2512.10858, proposition 1.
        """
        u = self.u(log_snr)
        uniform = (1.0 - self.scale) + self.scale * u
        if self.is_masked_limit:  # (1 - a) stays here for a < 1, but no token can be uniform noise
            uniform = torch.zeros_like(u)
        kept = u * uniform / (u + self.num_real * torch.exp(log_snr))
        real = torch.where(noised == clean, kept, uniform)
        return torch.where(noised == self.mask_id, 1.0 + self.scale * u, real)

    def marginal(self, probs: Tensor, log_snr: Tensor) -> Tensor:
        """q_lambda = alpha probs + beta pi, [..., V], for clean-token probabilities [..., V] and log_snr [...]."""
        keep, noise = snr.alpha(log_snr).unsqueeze(-1), snr.beta(log_snr).unsqueeze(-1)
        return keep * probs + noise * self.pi(log_snr)

    def _spread(self, real: Tensor, mask: Tensor) -> Tensor:
        is_mask = torch.arange(self.vocab_size, device=real.device) == self.mask_id
        return torch.where(is_mask, mask.unsqueeze(-1), real.unsqueeze(-1))


def mixing_from(config: NoiseConfig, *, vocab_size: int, mask_id: int) -> HybridMixing:
    """The mixing distribution a run description asks for, over a tokenizer's vocabulary."""
    return HybridMixing(vocab_size, mask_id, config.shift_value, config.scale)
