"""The bound itself: its integrand over the density of the noise levels (arXiv:2512.10858, proposition 1)."""

from __future__ import annotations

from typing import TYPE_CHECKING

from megadiff.diffusion.config import ObjectiveConfig
from megadiff.diffusion.weightings import TokenTerms, surrogate

if TYPE_CHECKING:
    from torch import Tensor


def loss(terms: TokenTerms, settings: ObjectiveConfig) -> Tensor:
    """Return w / p(lambda) (KL + IS), whatever the Itakura-Saito term's factor."""
    del settings
    return terms.weight / terms.density * (terms.kl + terms.itakura_saito)


def reported_loss(terms: TokenTerms, settings: ObjectiveConfig) -> Tensor:
    """Return the surrogate: metrics have the bound under `elbo`, and runs of both weightings compare by `loss`."""
    return surrogate.loss(terms, settings)
