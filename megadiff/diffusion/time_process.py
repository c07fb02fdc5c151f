"""The predecessor's process, written in time, and its translation to log signal-to-noise ratio and back.

    c_t = B (t (1 - t))^(g/2)    B = 2^g p_u / (1 - p_u)    alpha_t = (1 - t) / (1 + c_t)
    beta_t pi_t = (t e_m + c_t uniform) / (1 + c_t)         (GIDD, arXiv:2503.04482; g = `gamma`, p_u = `p_uniform`)

so that beta_t = (t + c_t) / (1 + c_t), lambda = log((1 - t) / (t + c_t)) and u = c_t / (t + c_t): at t = 1/2 a share
p_u of all tokens is uniform noise. Uniform is over the N real tokens.

Time is handled as s = logit(t), which keeps the digits of both ends, and k = c / t, which is u / (1 - u). With
w = t (1 - g) + g / 2,

    lambda(s) = -s - log(1 + k)      d lambda / ds = -(1 - u (1 - w))      d log k / ds = -(1 - w)

Each function takes the elementary functions it is to use: the module `exact` for arrays whose bits must be the same on
every machine, or `torch` for tensors.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any

from megadiff.diffusion import exact
from megadiff.diffusion.config import GAMMA_REASON
from megadiff.errors import ConfigError

NO_UNIFORM = -1000.0
"""log B without uniform noise: u is then 0 to the last bit, as with the masked shift of hybrid noise."""

_NEWTON_STEPS = 12


@dataclass(frozen=True)
class TimeProcess:
    """How much of the noise is uniform at each time.

    Args:
        p_uniform: p_u in [0, 1), the share of uniform tokens at t = 1/2; 0 is pure masking.
        gamma: g in (0, 2]; 1 is the predecessor's.

    Raises:
        ConfigError: a value outside its range.
    """

    p_uniform: float = 0.0
    gamma: float = 1.0

    def __post_init__(self) -> None:
        if not 0 <= self.p_uniform < 1:
            raise ConfigError(f"noise.p_uniform must lie in [0, 1), got {self.p_uniform}")
        if not 0 < self.gamma <= 2:
            raise ConfigError(f"noise.gamma must lie in (0, 2], got {self.gamma}: {GAMMA_REASON}")

    @cached_property
    def log_b(self) -> float:
        """log B = g log 2 + log(p_u / (1 - p_u)), or NO_UNIFORM."""
        if self.p_uniform == 0:
            return NO_UNIFORM
        return float(self.gamma * exact.log(2.0) + exact.log(self.p_uniform / (1.0 - self.p_uniform)))

    def log_snr(self, t: Any, rest: Any) -> Any:
        """lambda = log((1 - t) / (t + c)) from t and `rest` = 1 - t, each with its own digits; float64 arrays."""
        noise = exact.exp(self.log_b + 0.5 * self.gamma * (exact.log(t) + exact.log(rest)))
        return exact.log(rest / (t + noise))

    def logit_t(self, log_snr: Any, functions: Any) -> Any:
        """s = logit(t) at which lambda is reached, float64.

        For g = 1 it solves y^2 + B y = e^-lambda for y = sqrt(t / (1 - t)). Otherwise Newton's method from s = -lambda,
        a fixed number of steps: lambda(s) is monotone with a slope in [-1, 0), for g < 1 concave, and the steps settle
        to the last digits over |lambda| <= 50, 0 <= p_u <= 0.999 and all g (tested).
        """
        if self.gamma == 1.0:
            b, square = float(exact.exp(self.log_b)), functions.exp(-log_snr)
            return 2.0 * functions.log(2.0 * square / (b + functions.sqrt(b * b + 4.0 * square)))
        s = -log_snr
        for _ in range(_NEWTON_STEPS):
            odds = functions.exp(self.logit_u(s, functions))
            excess = s + functions.log(1.0 + odds) + log_snr
            s = s - excess * (1.0 + odds) / (1.0 + odds * self.w(s, functions))
        return s

    def logit_u(self, s: Any, functions: Any) -> Any:
        """log k = log B + (g/2 - 1) log t + (g/2) log(1 - t)."""
        if self.p_uniform == 0:
            return 0.0 * s + NO_UNIFORM
        half = 0.5 * self.gamma
        log_t, log_rest = -functions.log(1.0 + functions.exp(-s)), -functions.log(1.0 + functions.exp(s))
        return self.log_b + (half - 1.0) * log_t + half * log_rest

    def w(self, s: Any, functions: Any) -> Any:
        """w = t (1 - g) + g / 2."""
        return (1.0 - self.gamma) / (1.0 + functions.exp(-s)) + 0.5 * self.gamma
