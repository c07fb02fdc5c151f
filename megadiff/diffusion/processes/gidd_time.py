"""The predecessor's noise, written in time, as a function of log-SNR (GIDD, arXiv:2503.04482).

    c_t = B (t (1 - t))^(g/2)    B = 2^g p_u / (1 - p_u)    alpha_t = (1 - t) / (1 + c_t)
    beta_t pi_t = (t e_m + c_t uniform) / (1 + c_t)         (g = `gamma`, p_u = `p_uniform`)

so that beta_t = (t + c_t) / (1 + c_t), lambda = log((1 - t) / (t + c_t)) and u = c_t / (t + c_t): at t = 1/2 a share
p_u of all tokens is uniform noise. Uniform is over the N real tokens.

Time is handled as s = logit(t), which keeps the digits of both ends, and k = c / t, which is u / (1 - u). With
w = t (1 - g) + g / 2,

    lambda(s) = -s - log(1 + k)      d lambda / ds = -(1 - u (1 - w))      d log k / ds = -(1 - w)

In the terms of `NoiseProcess` it is hybrid noise whose scale a varies with the level, a = (1 - w) / (1 - u (1 - w)),
for g = 1 simply 1 / (2 - u). Its weights w_z times p(lambda)^-1 = |d lambda / dt| are the predecessor's in time,

    z = m               1 / (t (1 - t))
    z real, z != x      (c + (1 - t) c') / ((1 - t) c)
    z = x               (c + (1 - t) c') / (N (1 - t) (1 - t + c / N))
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt
from pydantic import Field, field_validator

from megadiff.diffusion import exact
from megadiff.diffusion.config import NoiseConfig
from megadiff.diffusion.processes import NoiseLaw
from megadiff.diffusion.schedules import NoiseSchedule
from megadiff.diffusion.shapes import Float, Tensor
from megadiff.errors import ConfigError

NO_UNIFORM = -1000.0
"""log B without uniform noise: u is then 0 to the last bit, as with the masked shift of hybrid noise."""

_NEWTON_STEPS = 12

_GAMMA_REASON = (
    "at 0 the process does not start from clean text, and above 2 uniform tokens would have to be taken back near pure "
    "noise, at a negative rate; 1 is the predecessor's"
)


class Settings(NoiseConfig):
    """`noise: {process: gidd_time, p_uniform: 0.2}`; its own time is drawn uniformly, so it has no `schedule`."""

    p_uniform: float = Field(default=0.0, ge=0, lt=1)
    """Share of uniform tokens at t = 1/2, where it is largest; 0 is pure masking."""

    gamma: float = Field(default=1.0, gt=0)
    """Exponent of the uniform noise c_t = B (t (1 - t))^(gamma / 2), in (0, 2]."""

    time_eps: float = Field(default=1e-4, gt=0, lt=0.5)
    """Distance of the drawn time from both ends: t is uniform on [time_eps, 1 - time_eps]."""

    @field_validator("gamma")
    @classmethod
    def _gamma_keeps_rates_positive(cls, gamma: float) -> float:
        if gamma > 2:
            raise ValueError(f"gamma must be at most 2, got {gamma}: {_GAMMA_REASON}")
        return gamma

    @property
    def description(self) -> str:
        """Kind of noise, for people."""
        return f"time-parametrised, p_uniform={self.p_uniform:g}"


@dataclass(frozen=True)
class GiddTime(NoiseLaw):
    """u = c / (t + c) at the time t of a log-SNR.

    Args:
        p_uniform: p_u in [0, 1), the share of uniform tokens at t = 1/2; 0 is pure masking.
        gamma: g in (0, 2]; 1 is the predecessor's.

    Raises:
        ConfigError: a value outside its range.
    """

    p_uniform: float = 0.0
    gamma: float = 1.0
    in_float64: ClassVar[bool] = True
    """True: for g != 1 the scale may pass 1, and 1 - a (1 - u) then cancels."""

    def __post_init__(self) -> None:
        if not 0 <= self.p_uniform < 1:
            raise ConfigError(f"noise.p_uniform must lie in [0, 1), got {self.p_uniform}")
        if not 0 < self.gamma <= 2:
            raise ConfigError(f"noise.gamma must lie in (0, 2], got {self.gamma}: {_GAMMA_REASON}")

    @property
    def is_masked_limit(self) -> bool:
        """Whether p_u = 0."""
        return self.p_uniform == 0

    def logit_u(self, log_snr: Any, functions: Any) -> Any:
        """Return log(c / t) at the time of this log-SNR."""
        return self.logit_u_at(self.logit_t(log_snr, functions), functions)

    def dlogit_u(self, log_snr: Any, functions: Any) -> Any:
        """Return a = (1 - w) / (1 - u (1 - w))."""
        s = self.logit_t(log_snr, functions)
        rest = 1.0 - self.w(s, functions)
        return rest / (1.0 - functions.sigmoid(self.logit_u_at(s, functions)) * rest)

    @cached_property
    def log_b(self) -> float:
        """log B = g log 2 + log(p_u / (1 - p_u)), or NO_UNIFORM."""
        if self.p_uniform == 0:
            return NO_UNIFORM
        return float(self.gamma * exact.log(2.0) + exact.log(self.p_uniform / (1.0 - self.p_uniform)))

    def log_snr(self, t: Any, rest: Any) -> Any:
        """Return lambda = log((1 - t) / (t + c)) from t and `rest` = 1 - t, float64, each with its own digits."""
        noise = exact.exp(self.log_b + 0.5 * self.gamma * (exact.log(t) + exact.log(rest)))
        return exact.log(rest / (t + noise))

    def logit_t(self, log_snr: Any, functions: Any) -> Any:
        """Return s = logit(t) at which lambda is reached, float64.

        For g = 1 it solves y^2 + B y = e^-lambda for y = sqrt(t / (1 - t)). Otherwise Newton's method from s = -lambda,
        a fixed number of steps: lambda(s) is monotone with a slope in [-1, 0), for g < 1 concave, and the steps settle
        to the last digits over |lambda| <= 50, 0 <= p_u <= 0.999 and all g (tested).
        """
        if self.gamma == 1.0:
            b, square = float(exact.exp(self.log_b)), functions.exp(-log_snr)
            return 2.0 * functions.log(2.0 * square / (b + functions.sqrt(b * b + 4.0 * square)))
        s = -log_snr
        for _ in range(_NEWTON_STEPS):
            odds = functions.exp(self.logit_u_at(s, functions))
            excess = s + functions.log(1.0 + odds) + log_snr
            s = s - excess * (1.0 + odds) / (1.0 + odds * self.w(s, functions))
        return s

    def logit_u_at(self, s: Any, functions: Any) -> Any:
        """Return log k = log B + (g/2 - 1) log t + (g/2) log(1 - t)."""
        if self.p_uniform == 0:
            return 0.0 * s + NO_UNIFORM
        half = 0.5 * self.gamma
        log_t, log_rest = -functions.log(1.0 + functions.exp(-s)), -functions.log(1.0 + functions.exp(s))
        return self.log_b + (half - 1.0) * log_t + half * log_rest

    def w(self, s: Any, functions: Any) -> Any:
        """Return w = t (1 - g) + g / 2."""
        return (1.0 - self.gamma) / (1.0 + functions.exp(-s)) + 0.5 * self.gamma


@dataclass(frozen=True)
class TimeSchedule(NoiseSchedule):
    """Schedule of t uniform on [time_eps, 1 - time_eps]; its interval of log-SNR follows."""

    min_log_snr: float = field(init=False)
    max_log_snr: float = field(init=False)
    law: GiddTime
    time_eps: float = 1e-4

    def __post_init__(self) -> None:
        if not 0 < self.time_eps < 0.5:
            raise ConfigError(f"noise.time_eps must lie between 0 and 0.5, got {self.time_eps}")
        rest = 1.0 - self.time_eps
        object.__setattr__(self, "min_log_snr", float(self.law.log_snr(rest, self.time_eps)))
        object.__setattr__(self, "max_log_snr", float(self.law.log_snr(self.time_eps, rest)))
        super().__post_init__()

    def log_snr(self, u: npt.ArrayLike) -> npt.NDArray[np.float64]:
        """Return lambda at t and 1 - t, both linear in u and neither made from the other."""
        u = np.asarray(u, dtype=np.float64)
        low, high = self.time_eps, 1.0 - self.time_eps
        log_snr = self.law.log_snr(low * (1.0 - u) + high * u, high * (1.0 - u) + low * u)
        return np.asarray(np.clip(log_snr, self.min_log_snr, self.max_log_snr))

    def density(self, log_snr: Float[Tensor, "*axes"]) -> Float[Tensor, "*axes"]:
        """Return |dt / d lambda| = t (1 - t) / (1 - u (1 - w)): t uniform on all of (0, 1)."""
        import torch

        s = self.law.logit_t(log_snr.double(), torch)
        rest = 1.0 - self.law.w(s, torch)
        u = torch.sigmoid(self.law.logit_u_at(s, torch))
        return (torch.sigmoid(s) * torch.sigmoid(-s) / (1.0 - u * rest)).to(log_snr.dtype)

    @property
    def mass(self) -> float:
        """1 - 2 time_eps."""
        return 1.0 - 2.0 * self.time_eps


def build(settings: Settings) -> GiddTime:
    """Return the law with the numbers of the configuration."""
    return GiddTime(settings.p_uniform, settings.gamma)


def build_schedule(settings: Settings) -> TimeSchedule:
    """Return the schedule that draws time uniformly."""
    return TimeSchedule(build(settings), settings.time_eps)
