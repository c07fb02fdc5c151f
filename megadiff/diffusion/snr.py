"""Rates: how log signal-to-noise ratios are drawn, and with what density.

A noise level is lambda = log_snr; alpha = sigmoid(lambda) is the probability that a token is kept and
beta = sigmoid(-lambda) that it is noised (never computed as 1 - alpha, which loses beta's digits when alpha is near 1).
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from megadiff.diffusion import exact
from megadiff.diffusion.config import NoiseConfig
from megadiff.diffusion.time_process import TimeProcess
from megadiff.errors import ConfigError


def alpha(log_snr: Tensor) -> Tensor:
    """Probability that a token is kept at this level: sigmoid(lambda)."""
    return torch.sigmoid(log_snr)


def beta(log_snr: Tensor) -> Tensor:
    """Probability that a token is noised at this level: sigmoid(-lambda)."""
    return torch.sigmoid(-log_snr)


@dataclass(frozen=True)
class Rate(ABC):
    """A law for lambda on [min_log_snr, max_log_snr]."""

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
        """Quantile: lambda at the share u in [0, 1] of the schedule, falling from max_log_snr (0) to min_log_snr (1).

        Float64, the same bits on every machine (see `exact`); u uniform on [0, 1] gives lambda this rate's law.
        """

    @abstractmethod
    def density(self, log_snr: Tensor) -> Tensor:
        """p(lambda) as the reference code takes it: of the schedule on all of R, not renormalised for the truncation.

        The exact bound on [min_log_snr, max_log_snr] is the mean of `elbo` times `mass` (0.999753 for the linear rate
        on [-9, 9]: reference numbers are 1.000247 times the integral).
        """

    @property
    @abstractmethod
    def mass(self) -> float:
        """The integral of `density` over [min_log_snr, max_log_snr]."""

    def normalised_density(self, log_snr: Tensor) -> Tensor:
        """p(lambda) that integrates to 1 over [min_log_snr, max_log_snr]: the law that `log_snr` draws from."""
        return self.density(log_snr) / self.mass

    def reporting_density(self, log_snr: Tensor) -> Tensor:
        """Return what the bound's integrand is divided by so that its mean is the ELBO as it is reported.

        It is the normalised density times the mass of the linear schedule on the same interval. The mean is then one
        number for every schedule, the paper's: the integral over [min_log_snr, max_log_snr] divided by that mass
        (0.999753 on [-9, 9]). For the linear schedule it is `density` itself.
        """
        linear = LinearRate(self.min_log_snr, self.max_log_snr)
        return self.normalised_density(log_snr) * linear.mass


@dataclass(frozen=True)
class LinearRate(Rate):
    """alpha = 1 - t with t uniform; density alpha beta (arXiv:2512.10858, section 4.1)."""

    def log_snr(self, u: npt.ArrayLike) -> npt.NDArray[np.float64]:
        """Lambda = log(alpha / beta), both linear in u and neither made from the other."""
        u = np.asarray(u, dtype=np.float64)
        (alpha_high, alpha_low), (beta_high, beta_low) = self._ends
        rest = 1.0 - u
        alpha_u = alpha_high * rest + alpha_low * u
        beta_u = beta_high * rest + beta_low * u
        return np.clip(exact.log(alpha_u / beta_u), self.min_log_snr, self.max_log_snr)

    @cached_property
    def _ends(self) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]]:
        """Alpha, then beta, at the highest and at the lowest level."""
        ends = np.array([self.max_log_snr, self.min_log_snr])
        return exact.sigmoid(ends), exact.sigmoid(-ends)

    def density(self, log_snr: Tensor) -> Tensor:
        """Alpha beta = sigmoid(lambda) sigmoid(-lambda)."""
        return alpha(log_snr) * beta(log_snr)

    @property
    def mass(self) -> float:
        """sigmoid(max) - sigmoid(min)."""
        return _sigmoid(self.max_log_snr) - _sigmoid(self.min_log_snr)


@dataclass(frozen=True)
class CosineRate(Rate):
    """alpha = cos^2(pi t / 2) with t uniform; density sqrt(alpha beta) / pi."""

    def log_snr(self, u: npt.ArrayLike) -> npt.NDArray[np.float64]:
        """Lambda = -2 log tan(pi t / 2), t linear in u between the two ends."""
        u = np.asarray(u, dtype=np.float64)
        ends = exact.atan(exact.exp([-0.5 * self.max_log_snr, -0.5 * self.min_log_snr])) / (0.5 * math.pi)
        t = ends[0] * (1.0 - u) + ends[1] * u
        return np.clip(-2.0 * exact.log_tan_half_pi(t), self.min_log_snr, self.max_log_snr)

    def density(self, log_snr: Tensor) -> Tensor:
        """sqrt(alpha beta) / pi."""
        return torch.sqrt(alpha(log_snr) * beta(log_snr)) / math.pi

    @property
    def mass(self) -> float:
        """(2 / pi) (atan e^(max/2) - atan e^(min/2))."""
        return (math.atan(math.exp(0.5 * self.max_log_snr)) - math.atan(math.exp(0.5 * self.min_log_snr))) * 2 / math.pi


@dataclass(frozen=True)
class UniformRate(Rate):
    """Lambda uniform on [min_log_snr, max_log_snr]."""

    def log_snr(self, u: npt.ArrayLike) -> npt.NDArray[np.float64]:
        """Linear in u."""
        u = np.asarray(u, dtype=np.float64)
        return self.max_log_snr * (1.0 - u) + self.min_log_snr * u

    def density(self, log_snr: Tensor) -> Tensor:
        """1 / (max - min): this law lives on the interval, so it is normalised already."""
        return torch.full_like(log_snr, 1.0 / (self.max_log_snr - self.min_log_snr))

    @property
    def mass(self) -> float:
        """1."""
        return 1.0


@dataclass(frozen=True)
class TimeRate(Rate):
    """t uniform on [time_eps, 1 - time_eps] in the predecessor's process; its interval of lambda follows."""

    min_log_snr: float = field(init=False)
    max_log_snr: float = field(init=False)
    process: TimeProcess
    time_eps: float = 1e-4

    def __post_init__(self) -> None:
        if not 0 < self.time_eps < 0.5:
            raise ConfigError(f"noise.time_eps must lie between 0 and 0.5, got {self.time_eps}")
        rest = 1.0 - self.time_eps
        object.__setattr__(self, "min_log_snr", float(self.process.log_snr(rest, self.time_eps)))
        object.__setattr__(self, "max_log_snr", float(self.process.log_snr(self.time_eps, rest)))
        super().__post_init__()

    def log_snr(self, u: npt.ArrayLike) -> npt.NDArray[np.float64]:
        """Lambda at t and 1 - t, both linear in u and neither made from the other."""
        u = np.asarray(u, dtype=np.float64)
        low, high = self.time_eps, 1.0 - self.time_eps
        log_snr = self.process.log_snr(low * (1.0 - u) + high * u, high * (1.0 - u) + low * u)
        return np.clip(log_snr, self.min_log_snr, self.max_log_snr)

    def density(self, log_snr: Tensor) -> Tensor:
        """|dt / d lambda| = t (1 - t) / (1 - u (1 - w)) (see `time_process`): t uniform on all of (0, 1)."""
        s = self.process.logit_t(log_snr.double(), torch)
        rest = 1.0 - self.process.w(s, torch)
        u = torch.sigmoid(self.process.logit_u(s, torch))
        return (torch.sigmoid(s) * torch.sigmoid(-s) / (1.0 - u * rest)).to(log_snr.dtype)

    @property
    def mass(self) -> float:
        """1 - 2 time_eps."""
        return 1.0 - 2.0 * self.time_eps


LINEAR = LinearRate()
"""The paper's rate on [-9, 9]."""

RATES: dict[str, type[Rate]] = {"linear": LinearRate, "cosine": CosineRate, "uniform": UniformRate}


def rate_from(config: NoiseConfig) -> Rate:
    """The rate a run description asks for."""
    if config.form == "time":
        return TimeRate(TimeProcess(config.p_uniform, config.gamma), config.time_eps)
    return RATES[config.rate](config.min_log_snr, config.max_log_snr)


def _sigmoid(x: float) -> float:
    return 1.0 / (1.0 + math.exp(-x))
