"""The predecessor's training weights (GIDD, arXiv:2503.04482): 2 at masks, 1 at uniform tokens, little at kept ones."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from megadiff.diffusion.config import NoiseConfig, ObjectiveConfig
from megadiff.diffusion.processes.gidd_time import GiddTime
from megadiff.diffusion.processes.gidd_time import Settings as TimeSettings
from megadiff.diffusion.shapes import Float, Int, Tensor
from megadiff.diffusion.weightings import TokenTerms
from megadiff.errors import ConfigError

if TYPE_CHECKING:
    from megadiff.diffusion.noise_process import NoiseProcess

MAX_WEIGHT = 2.0
"""The predecessor's `max_loss_weight`."""

_REFUSAL = (
    "objective.weighting is dynamic, which is defined by the process gidd_time alone (it needs its B), but "
    "noise.process is {process}: set noise.process to gidd_time, or objective.weighting to surrogate, elbo or flat"
)


def loss(terms: TokenTerms, settings: ObjectiveConfig) -> Float[Tensor, " ..."]:
    """Return the dynamic weight in the place of w: weight (KL + itakura_saito_weight IS).

    Raises:
        ConfigError: the noise is not the predecessor's.
    """
    weight = dynamic_weight(terms.process, terms.log_snr, terms.clean, terms.noised)
    return weight * (terms.kl + settings.itakura_saito_weight * terms.itakura_saito)


def dynamic_weight(
    process: NoiseProcess, log_snr: Float[Tensor, "*axes"], clean: Int[Tensor, "*axes"], noised: Int[Tensor, "*axes"]
) -> Float[Tensor, "*axes"]:
    """Return 2 at masks, 1 at uniform tokens and (B / V) e^(g lambda / 2) at clean ones, all at most MAX_WEIGHT.

    The released code puts sigmoid(-t) where the log-SNR is meant, which makes the last of them nearly constant; that is
    not copied.

    Raises:
        ConfigError: the noise is not the predecessor's.
    """
    import torch

    law = process.law
    if not isinstance(law, GiddTime):
        raise ConfigError(_REFUSAL.format(process=type(law).__name__))
    log_kept = law.log_b - math.log(process.vocab_size) + 0.5 * law.gamma * log_snr
    kept = torch.exp(log_kept).clamp(max=MAX_WEIGHT)
    real = torch.where(noised == clean, kept, torch.ones_like(kept))
    return torch.where(noised == process.mask_id, torch.full_like(kept, MAX_WEIGHT), real)


def check(noise: NoiseConfig) -> None:
    """Refuse noise other than the predecessor's, which alone has the B of these weights.

    Raises:
        ConfigError: with what to set.
    """
    if not isinstance(noise, TimeSettings):
        raise ConfigError(_REFUSAL.format(process=noise.process))
