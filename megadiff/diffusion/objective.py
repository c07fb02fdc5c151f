"""The GIDD objective per token, on full-vocabulary logits: the reference that every fast path must equal.

Axes: B sequences, L positions, V vocabulary entries (the mask is one of them). With x the clean and z the noised
token, q = alpha e_x + beta pi and qhat = alpha p + beta pi, where p is the softmax over the real tokens,

    loss = w ( KL(q || qhat) + itakura_saito_weight IS(q_z, qhat_z) )    IS(s, r) = s / r - log(s / r) - 1
    elbo = w / p(lambda) ( KL(q || qhat) + IS(q_z, qhat_z) )             (arXiv:2512.10858, proposition 1)

That is the weighting `surrogate`; the other members of `weightings` make another `loss` of the same terms.

q and qhat are never formed: at V = 131072 their divergence is the difference of two sums of order 1 that agree to
three digits and more. With rho = alpha / c, c = beta u / N and y_v = rho p_v, everything follows from three numbers a
token (`VocabularySums`), made of two sums over the vocabulary that leave out x and the mask. Leaving x out is what
keeps the digits of tokens predicted well: 1 - p_x and log p_x both follow from the odds without a subtraction.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from types import ModuleType
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from megadiff.config.registry import is_own, naming
from megadiff.diffusion import schedules
from megadiff.diffusion.config import WEIGHTINGS, ObjectiveConfig, check_weighting_module, objective_config
from megadiff.diffusion.noise_process import NoiseProcess
from megadiff.diffusion.shapes import Bool, Float, Int
from megadiff.diffusion.weightings import TokenTerms
from megadiff.errors import ConfigError

LOG_RHO_LIMIT = 69.0
"""log 1e30: beyond it noise on real tokens is too small to matter and the masked limit's formulas are used."""

_NEVER = -1e30  # a logit whose probability is 0, yet finite, so that no gradient is inf * 0
_SERIES_LIMIT = 0.02  # below it, e - log1p(e) is taken from its series


class Terms(NamedTuple):
    """Per-token values, not reduced; nats but for `weight`."""

    loss: Float[Tensor, "*axes"]
    """Figure `loss` of metrics: what is minimised, but for the weighting `elbo`, where it is the surrogate."""
    elbo: Float[Tensor, "*axes"]
    """w / p(lambda) (kl + itakura_saito): the bound's integrand, what is reported; no weighting changes it."""
    kl: Float[Tensor, "*axes"]
    """KL(q || qhat), without the weight."""
    itakura_saito: Float[Tensor, "*axes"]
    """IS(q_z, qhat_z), without the weight; 0 where z is the mask."""
    weight: Float[Tensor, "*axes"]
    """w; its mean over z is beta."""
    minimised: Float[Tensor, "*axes"]
    """Loss of the weighting, whose sum is minimised."""


@dataclass(frozen=True)
class Weighting:
    """A member of the family of loss weightings with its settings."""

    loss: Callable[[TokenTerms, ObjectiveConfig], Tensor]
    """Loss of every token, which is minimised."""
    reported_loss: Callable[[TokenTerms, ObjectiveConfig], Tensor]
    """Figure `loss` of metrics."""
    settings: ObjectiveConfig


def build_weighting(settings: ObjectiveConfig) -> Weighting:
    """Return the weighting that a configuration names.

    Raises:
        ConfigError: the member of the family lacks a part of the contract.
    """
    check_weighting_module(settings)
    member = WEIGHTINGS.member(settings.weighting)
    loss = _loss_function(member, "loss")
    has_another = hasattr(member, "reported_loss")
    return Weighting(loss, _loss_function(member, "reported_loss") if has_another else loss, settings)


def _loss_function(member: ModuleType, name: str) -> Callable[[TokenTerms, ObjectiveConfig], Tensor]:
    """Return a function of a weighting; one of the user's own is held to returning a loss for every token.

    Raises:
        ConfigError: when it is called, if it raises anything or returns something else.
    """
    function = getattr(member, name)
    if is_own(member):
        return function

    def checked(terms: TokenTerms, settings: ObjectiveConfig) -> Tensor:
        with naming(member, name):
            found = function(terms, settings)
        shape = tuple(terms.kl.shape)
        if not isinstance(found, Tensor) or found.shape != terms.kl.shape:
            kind = f"shape {tuple(found.shape)}" if isinstance(found, Tensor) else type(found).__name__
            raise ConfigError(
                f"what `{name}` of the module {member.__name__} returns must have the shape of the tokens: wanted a "
                f"tensor of shape {shape}, found {kind}; correct it"
            )
        if name == "loss" and terms.kl.requires_grad and not found.requires_grad:
            raise ConfigError(
                f"`loss` of the module {member.__name__} must be a differentiable function of kl, itakura_saito or "
                "cross_entropy, found one that carries no gradient; correct it"
            )
        return found

    return checked


SURROGATE = build_weighting(objective_config())
"""The paper's weighting."""


class VocabularySums(NamedTuple):
    """All the objective needs to know of a token's logits; p is the softmax over real tokens."""

    log_odds: Float[Tensor, "*axes"]
    """log((1 - p_x) / p_x): log of the sum of e^logit over the other real tokens, less the logit at x."""
    log_p_noised: Float[Tensor, "*axes"]
    """log p_z; any finite number where z is the mask."""
    log1p_sum: Float[Tensor, "*axes"] | None
    """T = sum over real v != x of log(1 + rho p_v), with log rho held to LOG_RHO_LIMIT; None in the masked limit."""


def gidd_objective(
    logits: Float[Tensor, "*axes V"],
    clean: Int[Tensor, "*axes"],
    noised: Int[Tensor, "*axes"],
    log_snr: Float[Tensor, "*axes"],
    *,
    mixing: NoiseProcess,
    is_weight: float | None = None,
    weighting: Weighting = SURROGATE,
) -> Terms:
    """Return the objective's terms for every token, differentiable in the logits.

    Args:
        logits: computed in float32 whatever their dtype, or in float64 if given so. The mask's logit is ignored, as are
            columns beyond the vocabulary's entries (its padding).
        clean, noised: ids x and z; `clean` holds no mask.
        log_snr: lambda.
        mixing: the noise process. The density of its schedule divides `elbo`; that of the paper's linear schedule is
            not renormalised (see `NoiseSchedule.density`).
        is_weight: factor of the Itakura-Saito term in `loss`; None for the weighting's own, which is 1 in the paper.
        weighting: what `loss` is; nothing else depends on it.

    Returns:
        Terms in float32 (float64 for float64 logits), not reduced: the caller divides by a global count.

    Raises:
        ValueError: shapes that do not follow `clean`, or fewer logits than the vocabulary.
        ConfigError: a weighting that the noise does not have.
    """
    check_token_shapes(clean, noised, log_snr)
    if logits.shape[:-1] != clean.shape or logits.shape[-1] < mixing.vocab_size:
        raise ValueError(
            f"logits must have shape {(*clean.shape, mixing.vocab_size)} (more columns are ignored), "
            f"got {tuple(logits.shape)}"
        )
    if is_weight is not None:
        settings = weighting.settings.model_copy(update={"itakura_saito_weight": is_weight})
        weighting = replace(weighting, settings=settings)
    dtype = torch.float64 if logits.dtype == torch.float64 else torch.float32
    log_snr = log_snr.to(dtype)
    sums = _vocabulary_sums(logits.to(dtype), clean, noised, log_snr, mixing)
    return terms_from_sums(sums, clean, noised, log_snr, process=mixing, weighting=weighting)


def terms_from_sums(
    sums: VocabularySums,
    clean: Int[Tensor, "*axes"],
    noised: Int[Tensor, "*axes"],
    log_snr: Float[Tensor, "*axes"],
    *,
    process: NoiseProcess,
    weighting: Weighting = SURROGATE,
) -> Terms:
    """Return the objective from its sums over the vocabulary; differentiable in the sums.

        E = rho q / (1 + rho p_x)  (q = 1 - p_x)      delta = log1p(E) = log(q_x / qhat_x)
        KL = (alpha + c) delta - c T                  IS = E - delta                     z = x
                                                           log1p(y_z) - y_z / (1 + y_z)  z real, z != x
                                                           0                             z = m

    Where log rho passes LOG_RHO_LIMIT: KL = -alpha log p_x, and only masks weigh.
    """
    alpha = schedules.alpha(log_snr)
    is_kept = noised == clean
    weight = process.weight(log_snr, clean, noised)
    nll = log1p_exp(sums.log_odds)
    masked_kl = alpha * nll
    masked_is = _masked_divergence(nll, is_kept)
    if sums.log1p_sum is None:
        kl, itakura_saito = masked_kl, masked_is
    else:
        is_mask, zero = noised == process.mask_id, torch.zeros_like(alpha)
        log_rho = process.log_rho(log_snr)
        log_rho_held = log_rho.clamp(max=LOG_RHO_LIMIT)
        c = alpha * torch.exp(-log_rho_held)
        log_e = log_rho_held - log1p_exp(-sums.log_odds) - log1p_exp(log_rho_held - nll)
        delta = log1p_exp(log_e)
        log_y = torch.where(is_mask, zero, log_rho_held + sums.log_p_noised)
        at_kept = _minus_log1p(torch.exp(log_e), delta)
        at_other = _minus_log1p(-torch.sigmoid(log_y), -log1p_exp(log_y))
        is_limit = log_rho > LOG_RHO_LIMIT
        kl = torch.where(is_limit, masked_kl, (alpha + c) * delta - c * sums.log1p_sum)
        itakura_saito = torch.where(is_limit, masked_is, torch.where(is_kept, at_kept, at_other))
        itakura_saito = torch.where(is_mask, zero, itakura_saito)
    density = process.schedule.density(log_snr)
    terms = TokenTerms(process, clean, noised, log_snr, weight, density, kl, itakura_saito, cross_entropy=nll)
    minimised = weighting.loss(terms, weighting.settings)
    is_reported = weighting.reported_loss is weighting.loss
    return Terms(
        loss=minimised if is_reported else weighting.reported_loss(terms, weighting.settings),
        elbo=weight / density * (kl + itakura_saito),
        kl=kl,
        itakura_saito=itakura_saito,
        weight=weight,
        minimised=minimised,
    )


def loss_weights(
    clean: Int[Tensor, "*axes"],
    noised: Int[Tensor, "*axes"],
    log_snr: Float[Tensor, "*axes"],
    *,
    process: NoiseProcess,
    weighting: Weighting,
) -> Float[Tensor, "*axes"]:
    """Return what is minimised of tokens whose KL and cross-entropy are one nat, and whose Itakura-Saito term is 0.

    Args:
        clean, noised: ids x and z; `clean` holds no mask.
        log_snr: lambda.
        process: the noise.
        weighting: the weighting that a run minimises.
    """
    weight, density = process.weight(log_snr, clean, noised), process.schedule.density(log_snr)
    one, zero = torch.ones_like(log_snr), torch.zeros_like(log_snr)
    terms = TokenTerms(process, clean, noised, log_snr, weight, density, one, zero, cross_entropy=one)
    return weighting.loss(terms, weighting.settings)


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


def log1p_exp(x: Float[Tensor, "*axes"]) -> Float[Tensor, "*axes"]:
    """log(1 + e^x) to full precision at both ends (torch's own threshold of 20 costs float64 its last digits)."""
    return functional.softplus(x, threshold=40.0)


def _vocabulary_sums(
    logits: Float[Tensor, "*axes V"],
    clean: Int[Tensor, "*axes"],
    noised: Int[Tensor, "*axes"],
    log_snr: Float[Tensor, "*axes"],
    process: NoiseProcess,
) -> VocabularySums:
    ids = torch.arange(logits.shape[-1], device=logits.device)
    unreal = (ids == process.mask_id) | (ids >= process.vocab_size)
    real = logits.masked_fill(unreal, _NEVER)
    others = real.masked_fill(ids == clean.unsqueeze(-1), _NEVER)
    log_total = torch.logsumexp(real, dim=-1)
    log1p_sum = None
    if not process.is_masked_limit:
        log_rho = process.log_rho(log_snr).clamp(max=LOG_RHO_LIMIT)
        log1p_sum = log1p_exp(others + (log_rho - log_total).unsqueeze(-1)).sum(dim=-1)
    log_odds = torch.logsumexp(others, dim=-1) - _at(real, clean)
    return VocabularySums(log_odds, log_p_noised=_at(real, noised) - log_total, log1p_sum=log1p_sum)


def _at(values: Float[Tensor, "*axes V"], ids: Int[Tensor, "*axes"]) -> Float[Tensor, "*axes"]:
    return values.gather(-1, ids.unsqueeze(-1)).squeeze(-1)


def _masked_divergence(nll: Float[Tensor, "*axes"], is_kept: Bool[Tensor, "*axes"]) -> Float[Tensor, "*axes"]:
    """Return the Itakura-Saito term of the masked limit, which only kept tokens have."""
    return torch.where(is_kept, torch.expm1(nll.clamp(max=80.0)) - nll, torch.zeros_like(nll))


def _minus_log1p(e: Float[Tensor, "*axes"], log1p_e: Float[Tensor, "*axes"]) -> Float[Tensor, "*axes"]:
    """e - log1p(e) >= 0, given both; small e by the series e^2 (1/2 - e/3 + e^2/4 - ...), where they would cancel."""
    is_small = e.abs() < _SERIES_LIMIT
    small = torch.where(is_small, e, torch.zeros_like(e))
    series = torch.zeros_like(e)
    for power in range(10, 1, -1):
        series = 1.0 / power - small * series
    return torch.where(is_small, small * small * series, e - log1p_e)
