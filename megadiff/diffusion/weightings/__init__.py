"""Loss weightings (a family): what is minimised, token by token, once the bound's terms are known.

A file's name is its name under `objective.weighting`; a dotted path (`my_package.my_weighting`) names a file of your
own. A member has `loss(terms, settings)`, which returns what is minimised of every token from its `TokenTerms`, and may
have `Settings` (a section with keys of its own beside those of `objective`), `check(noise)`, which refuses noise that
it is not defined for, and `reported_loss(terms, settings)`, the figure `loss` of metrics where that is another one.
The reported ELBO knows nothing of the weighting. `megadiff.testing.check_weighting` is the contract.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

from megadiff.diffusion.shapes import Float, Int, Tensor

if TYPE_CHECKING:  # a configuration names a weighting, and must not wait for torch
    from megadiff.diffusion.noise_process import NoiseProcess


class TokenTerms(NamedTuple):
    """Terms of every token from which a weighting makes its loss; nats but for `weight` and `density`.

    `kl`, `itakura_saito` and `cross_entropy` carry the gradient, and a loss is any differentiable function of them.
    """

    process: NoiseProcess
    """The noise."""
    clean: Int[Tensor, "*axes"]
    """Ids x, none of them the mask."""
    noised: Int[Tensor, "*axes"]
    """Ids z."""
    log_snr: Float[Tensor, "*axes"]
    """Noise level lambda of every token."""
    weight: Float[Tensor, "*axes"]
    """Weight w of the bound's integrand (`NoiseProcess.weight`)."""
    density: Float[Tensor, "*axes"]
    """Density p(lambda) of the schedule, which the bound's integrand is divided by."""
    kl: Float[Tensor, "*axes"]
    """KL(q || qhat)."""
    itakura_saito: Float[Tensor, "*axes"]
    """IS(q_z, qhat_z); 0 where z is the mask."""
    cross_entropy: Float[Tensor, "*axes"]
    """-log p_x, the cross-entropy of the predicted clean token."""
