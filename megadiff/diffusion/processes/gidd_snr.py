"""Hybrid noise in log-SNR: u = sigmoid(a lambda + b), from masks (b = -1000) to uniform tokens (b = 1000).

Source: arXiv:2512.10858, section 2.4; a is `scale`, b is `shift`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal, get_args

from pydantic import Field, field_validator

from megadiff.diffusion.config import ScheduledNoise
from megadiff.diffusion.processes import NoiseLaw
from megadiff.errors import ConfigError

ShiftName = Literal["masked", "low_uniform", "balanced", "high_uniform", "uniform"]

SHIFTS: dict[str, float] = {
    "masked": -1000.0,
    "low_uniform": -2.0,
    "balanced": 0.0,
    "high_uniform": 2.0,
    "uniform": 1000.0,
}
"""The paper's five noise types, by the shift b of u(lambda) = sigmoid(a lambda + b)."""

LIMIT_SHIFT = 128.0
"""Beyond this |shift|, u is 0 or 1 to the last bit of float64 for every |log_snr| <= 50."""

_SCALE_REASON = (
    "above 1 the rate at which uniform noise turns into masks, beta (pi - pi'), is negative at low signal-to-noise "
    "ratios, so the process does not exist; use a scale in (0, 1], 1 being the paper's"
)


class Settings(ScheduledNoise):
    """`noise: {process: gidd_snr, shift: balanced}`."""

    shift: ShiftName | float = "balanced"
    """Shift b of the uniform share u = sigmoid(scale * log_snr + shift): a number, or masked (-1000), low_uniform (-2),
    balanced (0), high_uniform (2), uniform (1000)."""

    scale: float = Field(default=1.0, gt=0)
    """Scale a of the uniform share, in (0, 1]; the paper uses 1."""

    @field_validator("scale")
    @classmethod
    def _scale_keeps_rates_positive(cls, scale: float) -> float:
        if scale > 1:
            raise ValueError(f"scale must be at most 1, got {scale}: {_SCALE_REASON}")
        return scale

    @property
    def shift_value(self) -> float:
        """Shift as a number, whichever way it was given."""
        return SHIFTS[self.shift] if isinstance(self.shift, str) else self.shift

    @property
    def shift_name(self) -> str:
        """The paper's name of this shift, or `shift=<number>` if it has none."""
        names = [name for name, value in SHIFTS.items() if value == self.shift_value]
        return names[0] if names else f"shift={self.shift_value:g}"

    @property
    def description(self) -> str:
        """The paper's name of the noise, for people."""
        return self.shift_name


@dataclass(frozen=True)
class GiddSnr(NoiseLaw):
    """u = sigmoid(a lambda + b).

    Args:
        shift: b; -1000 is pure masking, 1000 purely uniform noise.
        scale: a in (0, 1].

    Raises:
        ConfigError: a scale outside its range, which gives negative rates, or a shift that is not finite.
    """

    shift: float
    scale: float = 1.0

    def __post_init__(self) -> None:
        if not 0 < self.scale <= 1:
            raise ConfigError(f"noise.scale must lie in (0, 1], got {self.scale}: {_SCALE_REASON}")
        if not math.isfinite(self.shift):
            raise ConfigError(f"noise.shift must be a finite number, got {self.shift}")

    @property
    def is_masked_limit(self) -> bool:
        """Whether the shift is so low that u = 0 at every log-SNR."""
        return self.shift <= -LIMIT_SHIFT

    @property
    def is_uniform_limit(self) -> bool:
        """Whether the shift is so high that u = 1 at every log-SNR."""
        return self.shift >= LIMIT_SHIFT

    def logit_u(self, log_snr: Any, functions: Any) -> Any:
        """Return a lambda + b."""
        del functions
        return self.scale * log_snr + self.shift

    def dlogit_u(self, log_snr: Any, functions: Any) -> float:
        """Return the scale a."""
        del log_snr, functions
        return self.scale


def build(settings: Settings) -> GiddSnr:
    """Return the law with the shift and scale of the configuration."""
    return GiddSnr(settings.shift_value, settings.scale)


assert set(SHIFTS) == set(get_args(ShiftName))
