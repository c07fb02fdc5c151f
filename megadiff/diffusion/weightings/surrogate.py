"""The bound's integrand without 1/p(lambda), which the paper minimises (arXiv:2512.10858, section 4.1)."""

from __future__ import annotations

from megadiff.diffusion.config import ObjectiveConfig
from megadiff.diffusion.shapes import Float, Tensor
from megadiff.diffusion.weightings import TokenTerms


def loss(terms: TokenTerms, settings: ObjectiveConfig) -> Float[Tensor, " ..."]:
    """Return w (KL + itakura_saito_weight IS)."""
    return terms.weight * (terms.kl + settings.itakura_saito_weight * terms.itakura_saito)
