"""Plain cross-entropy of corrupted tokens: weight 1 at every noise level.

Under masked noise this is the loss that arXiv:2602.15014 finds about 12 % more efficient in FLOPs than the bound:
-log p_x at masked tokens, nothing elsewhere. Under uniform and hybrid noise a token that the noise has drawn cannot
always be distinguished from a kept one: a uniform token may happen to be x. The weight is therefore the probability
that the noise has drawn the token, given z, x and lambda,

    w_flat = beta pi_z / q_z = pi_z / (pi_z + e^lambda 1[z = x])

    z = m               1
    z real, z != x      1
    z = x               u / (u + N e^lambda)        (0 under masked noise)

which is the bound's weight (`NoiseProcess.weight`) without pi'_z, so that E_z[w_flat] = beta as there. The last line
may not be left out: given the other tokens, E[w_flat (-log p_x) | z_i = v] = beta pi_v sum_x P(x | z_-i) (-log p_x),
whose minimum is p = P(x_i | z_-i), the same as the bound's. With weight 0 at z = x the minimum would have p_v = 0 at
the token in place, so the model would hold every real token to be wrong, and its bound would be infinite.

There is no Itakura-Saito term: it completes KL(q || qhat) to the bound, while cross-entropy has this minimum by itself.
(arXiv:2602.15014 keeps the bound for uniform noise; the extension to z = x is derived here.)
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from megadiff.diffusion.config import ObjectiveConfig
from megadiff.diffusion.shapes import Float, Int, Tensor
from megadiff.diffusion.weightings import TokenTerms

if TYPE_CHECKING:
    from megadiff.diffusion.noise_process import NoiseProcess


def loss(terms: TokenTerms, settings: ObjectiveConfig) -> Float[Tensor, " ..."]:
    """Return w_flat (-log p_x)."""
    del settings
    return flat_weight(terms.process, terms.log_snr, terms.clean, terms.noised) * terms.cross_entropy


def flat_weight(
    process: NoiseProcess, log_snr: Float[Tensor, "*axes"], clean: Int[Tensor, "*axes"], noised: Int[Tensor, "*axes"]
) -> Float[Tensor, "*axes"]:
    """Return the probability that the noise has drawn each token, in the dtype of `log_snr`."""
    import torch

    if process.is_masked_limit:
        return (noised == process.mask_id).to(log_snr.dtype)
    kept = torch.sigmoid(-process.log_rho(log_snr))  # 1 / (1 + rho) = u / (u + N e^lambda)
    return torch.where(noised == clean, kept, torch.ones_like(kept))
