"""Hybrid noise: what a token is replaced with, between a mask and a random token.

At level lambda a noised token is a uniform one with probability u = sigmoid(a lambda + b) and the mask otherwise
(arXiv:2512.10858, section 2.4; a = `scale`, b = `shift`); all that follows from u is in `mixing_base`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from torch import Tensor

from megadiff.diffusion.config import SCALE_REASON, NoiseConfig
from megadiff.diffusion.mixing_base import FloatArray, Mixing
from megadiff.diffusion.time_mixing import TimeMixing
from megadiff.diffusion.time_process import TimeProcess
from megadiff.errors import ConfigError

LIMIT_SHIFT = 128.0
"""Beyond this |shift|, u is 0 or 1 to the last bit of float64 for every |log_snr| <= 50."""


@dataclass(frozen=True)
class HybridMixing(Mixing):
    """Mixing with u = sigmoid(a lambda + b).

    Args:
        vocab_size, mask_id: see `Mixing`.
        shift: b; -1000 is pure masking, 1000 purely uniform noise.
        scale: a in (0, 1].

    Raises:
        ConfigError: a scale above 1 (negative rates) or a mask outside the vocabulary.
    """

    shift: float
    scale: float = 1.0

    def __post_init__(self) -> None:
        if not 0 < self.scale <= 1:
            raise ConfigError(f"noise.scale must lie in (0, 1], got {self.scale}: {SCALE_REASON}")
        super().__post_init__()
        if not math.isfinite(self.shift):
            raise ConfigError(f"noise.shift must be a finite number, got {self.shift}")

    @property
    def is_masked_limit(self) -> bool:
        """Whether the shift is so low that u = 0 at every level."""
        return self.shift <= -LIMIT_SHIFT

    @property
    def is_uniform_limit(self) -> bool:
        """Whether the shift is so high that u = 1 at every level."""
        return self.shift >= LIMIT_SHIFT

    def logit_u(self, log_snr: Tensor) -> Tensor:
        """a lambda + b."""
        return self.scale * log_snr + self.shift

    def exact_logit_u(self, log_snr: FloatArray) -> FloatArray:
        """a lambda + b."""
        return self.scale * log_snr + self.shift

    def slope(self, log_snr: Tensor) -> float:
        """The scale a."""
        del log_snr
        return self.scale


def mixing_from(config: NoiseConfig, *, vocab_size: int, mask_id: int) -> Mixing:
    """The mixing distribution a run description asks for, over a tokenizer's vocabulary."""
    if config.form == "time":
        return TimeMixing(vocab_size, mask_id, TimeProcess(config.p_uniform, config.gamma))
    return HybridMixing(vocab_size, mask_id, config.shift_value, config.scale)
