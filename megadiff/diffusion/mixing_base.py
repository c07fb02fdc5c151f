"""What every mixing distribution shares: noise that is a uniform real token with probability u, else the mask.

At level lambda a token is kept with probability alpha and noised with probability beta,

    q(z | x) = alpha 1[z = x] + beta pi_z,    pi_v = u / N for the N = V - 1 real tokens,  pi_m = 1 - u

A process is its u as a function of lambda. With l = logit(u) and a = dl / dlambda, u' = a u (1 - u), and everything
below follows from l and a. V counts the mask m, wherever its id stands. Source: arXiv:2512.10858, sections 2.2 and 2.3.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from megadiff.diffusion import exact, snr
from megadiff.errors import ConfigError

FloatArray = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Mixing(ABC):
    """The mixing distribution pi_lambda over V tokens, one of which is the mask.

    Args:
        vocab_size: V, the mask included; rows that only pad the vocabulary are not counted.
        mask_id: id of the mask, in [0, V).

    Raises:
        ConfigError: a mask outside the vocabulary.
    """

    vocab_size: int
    mask_id: int

    def __post_init__(self) -> None:
        if self.vocab_size < 2 or not 0 <= self.mask_id < self.vocab_size:
            raise ConfigError(
                f"the mask must be one of 2 or more vocabulary entries, got mask id {self.mask_id} of {self.vocab_size}"
            )

    @property
    @abstractmethod
    def is_masked_limit(self) -> bool:
        """Whether noise is masks alone (u = 0 at every level)."""

    @property
    @abstractmethod
    def is_uniform_limit(self) -> bool:
        """Whether noise is random tokens alone (u = 1 at every level)."""

    @abstractmethod
    def logit_u(self, log_snr: Tensor) -> Tensor:
        """Log odds of uniform noise, log(u / (1 - u)), in the dtype of `log_snr`; finite."""

    @abstractmethod
    def exact_logit_u(self, log_snr: FloatArray) -> FloatArray:
        """`logit_u` in float64 with the same bits on every machine."""

    @abstractmethod
    def slope(self, log_snr: Tensor) -> Tensor | float:
        """a = d logit_u / d lambda, > 0; the process exists where a (1 - u) <= 1."""

    @property
    def num_real(self) -> int:
        """N = V - 1, the number of tokens that are not the mask."""
        return self.vocab_size - 1

    def log_u(self, log_snr: Tensor) -> Tensor:
        """Log of the uniform share, by logsigmoid: finite where u itself underflows."""
        return logsigmoid(self.logit_u(log_snr))

    def u(self, log_snr: Tensor) -> Tensor:
        """Uniform share of the noise, in [0, 1]."""
        return torch.sigmoid(self.logit_u(log_snr))

    def mask_share(self, log_snr: Tensor) -> Tensor:
        """Mask share of the noise, 1 - u, without the subtraction."""
        return torch.sigmoid(-self.logit_u(log_snr))

    def uniform_share(self, log_snr: npt.ArrayLike) -> FloatArray:
        """`u` in float64 with the same bits on every machine, for drawing noise."""
        return exact.sigmoid(self.exact_logit_u(np.asarray(log_snr, dtype=np.float64)))

    def log_rho(self, log_snr: Tensor) -> Tensor:
        """log(alpha / c) = lambda + log N - log u: a token's signal over c = beta u / N, its share of the noise."""
        return log_snr + math.log(self.num_real) - self.log_u(log_snr)

    def pi(self, log_snr: Tensor) -> Tensor:
        """pi_lambda over the vocabulary, [..., V] for a log_snr of shape [...]; sums to 1."""
        return self._spread(self.u(log_snr) / self.num_real, self.mask_share(log_snr))

    def pi_prime(self, log_snr: Tensor) -> Tensor:
        """d pi / d lambda, [..., V]; sums to 0: a u (1 - u) / N on real tokens, -a u (1 - u) on the mask."""
        change = self.slope(log_snr) * self.u(log_snr) * self.mask_share(log_snr)
        return self._spread(change / self.num_real, -change)

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
        u, slope = self.u(log_snr), self.slope(log_snr)
        uniform = (1.0 - slope) + slope * u
        if self.is_masked_limit:  # (1 - a) stays here for a < 1, but no token can be uniform noise
            uniform = torch.zeros_like(u)
        kept = u * uniform / (u + self.num_real * torch.exp(log_snr))
        real = torch.where(noised == clean, kept, uniform)
        return torch.where(noised == self.mask_id, 1.0 + slope * u, real)

    def dynamic_weight(self, log_snr: Tensor, clean: Tensor, noised: Tensor) -> Tensor:
        """What `objective.weighting: dynamic` puts in the place of w; defined by the time form alone.

        Raises:
            ConfigError: this process has no such weights.
        """
        raise ConfigError("objective.weighting dynamic is defined by the time form alone: set noise.form to time")

    def marginal(self, probs: Tensor, log_snr: Tensor) -> Tensor:
        """q_lambda = alpha probs + beta pi, [..., V], for clean-token probabilities [..., V] and log_snr [...]."""
        keep, noise = snr.alpha(log_snr).unsqueeze(-1), snr.beta(log_snr).unsqueeze(-1)
        return keep * probs + noise * self.pi(log_snr)

    def _spread(self, real: Tensor, mask: Tensor) -> Tensor:
        is_mask = torch.arange(self.vocab_size, device=real.device) == self.mask_id
        return torch.where(is_mask, mask.unsqueeze(-1), real.unsqueeze(-1))
