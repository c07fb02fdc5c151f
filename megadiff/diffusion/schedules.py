"""Distributions of noise levels, in log-SNR.

alpha = sigmoid(lambda) is the probability that a token is kept and beta = sigmoid(-lambda) that it is noised (never
computed as 1 - alpha, which loses beta's digits when alpha is near 1).

`noise.schedule` names one for the processes that leave the choice open. At lambda, alpha = sigmoid(lambda) of the
tokens are kept and beta = sigmoid(-lambda) are noised.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import numpy.typing as npt

from megadiff.diffusion import exact
from megadiff.diffusion.shapes import Float, Tensor
from megadiff.errors import ConfigError


def alpha(log_snr: Float[Tensor, "*axes"]) -> Float[Tensor, "*axes"]:
    """Return the probability that a token is kept: sigmoid(lambda)."""
    return log_snr.sigmoid()


def beta(log_snr: Float[Tensor, "*axes"]) -> Float[Tensor, "*axes"]:
    """Return the probability that a token is noised: sigmoid(-lambda)."""
    return (-log_snr).sigmoid()


@dataclass(frozen=True)
class NoiseSchedule(ABC):
    """A distribution of lambda on [min_log_snr, max_log_snr], in nats."""

    min_log_snr: float = -9.0
    max_log_snr: float = 9.0

    def __post_init__(self) -> None:
        if not -50 <= self.min_log_snr < self.max_log_snr <= 50:
            raise ConfigError(
                "min_log_snr and max_log_snr must satisfy -50 <= min_log_snr < max_log_snr <= 50, "
                f"got {self.min_log_snr} and {self.max_log_snr}"
            )

    @abstractmethod
    def log_snr(self, u: npt.ArrayLike) -> npt.NDArray[np.float64]:
        """Return lambda at the share u in [0, 1] of the schedule, falling from max_log_snr (0) to min_log_snr (1).

        Float64, the same bits on every machine (see `exact`); u uniform on [0, 1] gives lambda this distribution.
        """

    @abstractmethod
    def density(self, log_snr: Float[Tensor, "*axes"]) -> Float[Tensor, "*axes"]:
        """Return p(lambda) as the reference code takes it: of the schedule on all of R, not renormalised.

        The exact bound on [min_log_snr, max_log_snr] is the mean of `elbo` times `mass` (0.999753 for the linear
        schedule on [-9, 9]: reference numbers are 1.000247 times the integral).
        """

    @property
    @abstractmethod
    def mass(self) -> float:
        """Integral of `density` over [min_log_snr, max_log_snr]."""

    def normalised_density(self, log_snr: Float[Tensor, "*axes"]) -> Float[Tensor, "*axes"]:
        """Return p(lambda) that integrates to 1 over [min_log_snr, max_log_snr], from which `log_snr` draws."""
        return self.density(log_snr) / self.mass

    def reporting_density(self, log_snr: Float[Tensor, "*axes"]) -> Float[Tensor, "*axes"]:
        """Return what the bound's integrand is divided by so that its mean is the ELBO as it is reported.

        It is the normalised density times the mass of the linear schedule on the same interval. The mean is then one
        number for every schedule, the paper's: the integral over [min_log_snr, max_log_snr] divided by that mass
        (0.999753 on [-9, 9]). For the linear schedule it is `density` itself.
        """
        linear = LinearSchedule(self.min_log_snr, self.max_log_snr)
        return self.normalised_density(log_snr) * linear.mass


@dataclass(frozen=True)
class LinearSchedule(NoiseSchedule):
    """alpha = 1 - t with t uniform; density alpha beta (arXiv:2512.10858, section 4.1)."""

    def log_snr(self, u: npt.ArrayLike) -> npt.NDArray[np.float64]:
        """Return lambda = log(alpha / beta), both linear in u and neither made from the other."""
        u = np.asarray(u, dtype=np.float64)
        (alpha_high, alpha_low), (beta_high, beta_low) = self._ends
        rest = 1.0 - u
        alpha_u = alpha_high * rest + alpha_low * u
        beta_u = beta_high * rest + beta_low * u
        return np.asarray(np.clip(exact.log(alpha_u / beta_u), self.min_log_snr, self.max_log_snr))

    @cached_property
    def _ends(self) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]]:
        """Alpha, then beta, at the highest and at the lowest log-SNR."""
        ends = np.array([self.max_log_snr, self.min_log_snr])
        return exact.sigmoid(ends), exact.sigmoid(-ends)

    def density(self, log_snr: Float[Tensor, "*axes"]) -> Float[Tensor, "*axes"]:
        """Return alpha beta = sigmoid(lambda) sigmoid(-lambda)."""
        return log_snr.sigmoid() * (-log_snr).sigmoid()

    @property
    def mass(self) -> float:
        """sigmoid(max) - sigmoid(min)."""
        return _sigmoid(self.max_log_snr) - _sigmoid(self.min_log_snr)


@dataclass(frozen=True)
class CosineSchedule(NoiseSchedule):
    """alpha = cos^2(pi t / 2) with t uniform; density sqrt(alpha beta) / pi."""

    def log_snr(self, u: npt.ArrayLike) -> npt.NDArray[np.float64]:
        """Return lambda = -2 log tan(pi t / 2), t linear in u between the two ends."""
        u = np.asarray(u, dtype=np.float64)
        ends = exact.atan(exact.exp([-0.5 * self.max_log_snr, -0.5 * self.min_log_snr])) / (0.5 * math.pi)
        t = ends[0] * (1.0 - u) + ends[1] * u
        return np.asarray(np.clip(-2.0 * exact.log_tan_half_pi(t), self.min_log_snr, self.max_log_snr))

    def density(self, log_snr: Float[Tensor, "*axes"]) -> Float[Tensor, "*axes"]:
        """Return sqrt(alpha beta) / pi."""
        return (log_snr.sigmoid() * (-log_snr).sigmoid()).sqrt() / math.pi

    @property
    def mass(self) -> float:
        """(2 / pi) (atan e^(max/2) - atan e^(min/2))."""
        return (math.atan(math.exp(0.5 * self.max_log_snr)) - math.atan(math.exp(0.5 * self.min_log_snr))) * 2 / math.pi


@dataclass(frozen=True)
class UniformSchedule(NoiseSchedule):
    """Lambda uniform on [min_log_snr, max_log_snr]."""

    def log_snr(self, u: npt.ArrayLike) -> npt.NDArray[np.float64]:
        """Return lambda, linear in u."""
        u = np.asarray(u, dtype=np.float64)
        return np.asarray(self.max_log_snr * (1.0 - u) + self.min_log_snr * u)

    def density(self, log_snr: Float[Tensor, "*axes"]) -> Float[Tensor, "*axes"]:
        """Return 1 / (max - min): this distribution lives on the interval, so it is normalised already."""
        return log_snr.new_full(log_snr.shape, 1.0 / (self.max_log_snr - self.min_log_snr))

    @property
    def mass(self) -> float:
        """1."""
        return 1.0


LINEAR = LinearSchedule()
"""The paper's schedule on [-9, 9]."""

SCHEDULES: dict[str, type[NoiseSchedule]] = {
    "linear": LinearSchedule,
    "cosine": CosineSchedule,
    "uniform": UniformSchedule,
}
"""Schedules by their names under `noise.schedule`."""


def _sigmoid(x: float) -> float:
    return 1.0 / (1.0 + math.exp(-x))
