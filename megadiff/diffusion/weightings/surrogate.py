"""The bound's integrand without 1/p(lambda), which the paper minimises (arXiv:2512.10858, section 4.1)."""

from __future__ import annotations

from typing import TYPE_CHECKING

from megadiff.diffusion.config import ObjectiveConfig
from megadiff.diffusion.weightings import TokenTerms

if TYPE_CHECKING:
    from torch import Tensor


def loss(terms: TokenTerms, settings: ObjectiveConfig) -> Tensor:
    """Return w (KL + itakura_saito_weight IS)."""
    return terms.weight * (terms.kl + settings.itakura_saito_weight * terms.itakura_saito)
