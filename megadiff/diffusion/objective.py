"""The GIDD objective per token, on full-vocabulary logits: the reference every fast path must equal.

Axes: B sequences, L positions, V vocabulary entries (the mask is one of them). With x the clean and z the noised
token, q = alpha e_x + beta pi and qhat = alpha p + beta pi, where p is the softmax over the real tokens,

    loss = w ( KL(q || qhat) + is_weight IS(q_z, qhat_z) )      IS(s, r) = s / r - log(s / r) - 1
    elbo = w / p(lambda) ( KL(q || qhat) + IS(q_z, qhat_z) )    (arXiv:2512.10858, proposition 1)

With `weighting: dynamic` the predecessor's training weights stand in the place of w in `loss`.

q and qhat are never formed: at V = 131072 their divergence is the difference of two sums of order 1 that agree to
three digits and more. With rho = alpha / c, c = beta u / N and y_v = rho p_v, everything follows from three numbers a
token (`VocabularySums`), made of two sums over the vocabulary that leave out x and the mask. Leaving x out is what
keeps the digits of tokens predicted well: 1 - p_x and log p_x both follow from the odds without a subtraction.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from megadiff.diffusion import snr
from megadiff.diffusion.config import Weighting
from megadiff.diffusion.mixing_base import Mixing
from megadiff.diffusion.snr import LINEAR, Rate

LOG_RHO_LIMIT = 69.0
"""log 1e30: beyond it noise on real tokens is too small to matter and the masked limit's formulas are used."""

_NEVER = -1e30  # a logit whose probability is 0, yet finite, so that no gradient is inf * 0
_SERIES_LIMIT = 0.02  # below it, e - log1p(e) is taken from its series


class Terms(NamedTuple):
    """Per-token values, all of one shape and not reduced; nats but for `weight`."""

    loss: Tensor
    """w (kl + is_weight is_div): the surrogate that is optimised, or the same with dynamic weights."""
    elbo: Tensor
    """w / p(lambda) (kl + is_div): the bound's integrand, what is reported."""
    kl: Tensor
    """KL(q || qhat), without the weight."""
    is_div: Tensor
    """IS(q_z, qhat_z), without the weight; 0 where z is the mask."""
    weight: Tensor
    """w; its mean over z is beta."""


OPTIMISED: dict[str, str] = {"surrogate": "loss", "elbo": "elbo", "dynamic": "loss"}
"""The term that each weighting optimises."""


class VocabularySums(NamedTuple):
    """All the objective needs to know of a token's logits; p is the softmax over real tokens."""

    log_odds: Tensor
    """log((1 - p_x) / p_x): log of the sum of e^logit over the other real tokens, less the logit at x."""
    log_p_noised: Tensor
    """log p_z; any finite number where z is the mask."""
    log1p_sum: Tensor | None
    """T = sum over real v != x of log(1 + rho p_v), with log rho held to LOG_RHO_LIMIT; None in the masked limit."""


def gidd_objective(
    logits: Tensor,
    clean: Tensor,
    noised: Tensor,
    log_snr: Tensor,
    *,
    mixing: Mixing,
    is_weight: float = 1.0,
    rate: Rate = LINEAR,
    weighting: Weighting = "surrogate",
) -> Terms:
    """The objective's terms for every token, differentiable in the logits.

    Args:
        logits: [B, L, V] (or [..., V]), any float dtype; computed in float32, or in float64 if given so. The mask's
            logit is ignored, as are columns from V on (padding of the vocabulary).
        clean, noised: [B, L] int64 ids x and z; `clean` holds no mask.
        log_snr: [B, L] lambda.
        mixing: the noise.
        is_weight: factor of the Itakura-Saito term in `loss`, 1 in the paper.
        rate: whose density p(lambda) divides `elbo`; the default is the paper's linear rate on [-9, 9], as there not
            renormalised (see `Rate.density`).
        weighting: dynamic puts `mixing.dynamic_weight` in the place of w in `loss`; nothing else changes.

    Returns:
        Terms of [B, L], float32 (float64 for float64 logits), not reduced: the caller divides by a global count.

    Raises:
        ValueError: shapes that do not follow `clean`, fewer logits than the vocabulary, or no such weighting.
        ConfigError: dynamic weights where the noise has none.
    """
    check_token_shapes(clean, noised, log_snr)
    if logits.shape[:-1] != clean.shape or logits.shape[-1] < mixing.vocab_size:
        raise ValueError(
            f"logits must have shape {(*clean.shape, mixing.vocab_size)} (more columns are ignored), "
            f"got {tuple(logits.shape)}"
        )
    dtype = torch.float64 if logits.dtype == torch.float64 else torch.float32
    log_snr = log_snr.to(dtype)
    sums = _vocabulary_sums(logits.to(dtype), clean, noised, log_snr, mixing)
    return terms_from_sums(
        sums, clean, noised, log_snr, mixing=mixing, is_weight=is_weight, rate=rate, weighting=weighting
    )


def terms_from_sums(
    sums: VocabularySums,
    clean: Tensor,
    noised: Tensor,
    log_snr: Tensor,
    *,
    mixing: Mixing,
    is_weight: float = 1.0,
    rate: Rate = LINEAR,
    weighting: Weighting = "surrogate",
) -> Terms:
    """The objective from its sums over the vocabulary, all in the shape of `clean`; differentiable in the sums.

        E = rho q / (1 + rho p_x)  (q = 1 - p_x)      delta = log1p(E) = log(q_x / qhat_x)
        KL = (alpha + c) delta - c T                  IS = E - delta                     z = x
                                                           log1p(y_z) - y_z / (1 + y_z)  z real, z != x
                                                           0                             z = m

    Where log rho passes LOG_RHO_LIMIT: KL = -alpha log p_x, and only masks weigh.
    """
    if weighting not in OPTIMISED:
        raise ValueError(f"weighting must be one of {', '.join(OPTIMISED)}, got {weighting!r}")
    alpha, log_rho = snr.alpha(log_snr), mixing.log_rho(log_snr)
    is_mask, is_kept = noised == mixing.mask_id, noised == clean
    zero = torch.zeros_like(alpha)
    weight = mixing.weight(log_snr, clean, noised)
    nll = log1p_exp(sums.log_odds)
    masked_kl = alpha * nll
    masked_is = torch.where(is_kept, torch.expm1(nll.clamp(max=80.0)) - nll, zero)
    if sums.log1p_sum is None:
        kl, is_div = masked_kl, masked_is
    else:
        log_rho_held = log_rho.clamp(max=LOG_RHO_LIMIT)
        c = alpha * torch.exp(-log_rho_held)
        log_e = log_rho_held - log1p_exp(-sums.log_odds) - log1p_exp(log_rho_held - nll)
        delta = log1p_exp(log_e)
        log_y = torch.where(is_mask, zero, log_rho_held + sums.log_p_noised)
        is_kept_div = _minus_log1p(torch.exp(log_e), delta)
        is_other_div = _minus_log1p(-torch.sigmoid(log_y), -log1p_exp(log_y))
        is_limit = log_rho > LOG_RHO_LIMIT
        kl = torch.where(is_limit, masked_kl, (alpha + c) * delta - c * sums.log1p_sum)
        is_div = torch.where(is_limit, masked_is, torch.where(is_kept, is_kept_div, is_other_div))
    is_div = torch.where(is_mask, zero, is_div)
    density = rate.density(log_snr)
    training_weight = mixing.dynamic_weight(log_snr, clean, noised) if weighting == "dynamic" else weight
    return Terms(
        loss=training_weight * (kl + is_weight * is_div),
        elbo=weight / density * (kl + is_div),
        kl=kl,
        is_div=is_div,
        weight=weight,
    )


def check_token_shapes(clean: Tensor, noised: Tensor, log_snr: Tensor) -> None:
    """Refuse ids and levels that do not agree in shape.

    Raises:
        ValueError: the shape of `noised` or `log_snr` is not that of `clean`.
    """
    if noised.shape != clean.shape or log_snr.shape != clean.shape:
        raise ValueError(
            f"noised and log_snr must have the shape of clean, {tuple(clean.shape)}, "
            f"got {tuple(noised.shape)} and {tuple(log_snr.shape)}"
        )


def log1p_exp(x: Tensor) -> Tensor:
    """log(1 + e^x) to full precision at both ends (torch's own threshold of 20 costs float64 its last digits)."""
    return functional.softplus(x, threshold=40.0)


def _vocabulary_sums(logits: Tensor, clean: Tensor, noised: Tensor, log_snr: Tensor, mixing: Mixing) -> VocabularySums:
    ids = torch.arange(logits.shape[-1], device=logits.device)
    unreal = (ids == mixing.mask_id) | (ids >= mixing.vocab_size)
    real = logits.masked_fill(unreal, _NEVER)
    others = real.masked_fill(ids == clean.unsqueeze(-1), _NEVER)
    log_total = torch.logsumexp(real, dim=-1)
    log1p_sum = None
    if not mixing.is_masked_limit:
        log_rho = mixing.log_rho(log_snr).clamp(max=LOG_RHO_LIMIT)
        log1p_sum = log1p_exp(others + (log_rho - log_total).unsqueeze(-1)).sum(dim=-1)
    log_odds = torch.logsumexp(others, dim=-1) - _at(real, clean)
    return VocabularySums(log_odds, log_p_noised=_at(real, noised) - log_total, log1p_sum=log1p_sum)


def _at(values: Tensor, ids: Tensor) -> Tensor:
    return values.gather(-1, ids.unsqueeze(-1)).squeeze(-1)


def _minus_log1p(e: Tensor, log1p_e: Tensor) -> Tensor:
    """e - log1p(e) >= 0, given both; small e by the series e^2 (1/2 - e/3 + e^2/4 - ...), where they would cancel."""
    is_small = e.abs() < _SERIES_LIMIT
    small = torch.where(is_small, e, torch.zeros_like(e))
    series = torch.zeros_like(e)
    for power in range(10, 1, -1):
        series = 1.0 / power - small * series
    return torch.where(is_small, small * small * series, e - log1p_e)
