"""The bound itself: its integrand over the density of the noise levels (arXiv:2512.10858, proposition 1)."""

from __future__ import annotations

from megadiff.diffusion.config import ObjectiveConfig
from megadiff.diffusion.shapes import Float, Tensor
from megadiff.diffusion.weightings import TokenTerms, surrogate


def loss(terms: TokenTerms, settings: ObjectiveConfig) -> Float[Tensor, " ..."]:
    """Return w / p(lambda) (KL + IS), whatever the Itakura-Saito term's factor."""
    del settings
    return terms.weight / terms.density * (terms.kl + terms.itakura_saito)


def reported_loss(terms: TokenTerms, settings: ObjectiveConfig) -> Float[Tensor, " ..."]:
    """Return the surrogate: metrics have the bound under `elbo`, and runs of both weightings compare by `loss`."""
    return surrogate.loss(terms, settings)
