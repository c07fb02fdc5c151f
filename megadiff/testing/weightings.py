"""The contract of a loss weighting."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from megadiff.diffusion.config import check_noise_and_objective, noise_config, objective_config
from megadiff.diffusion.noise_process import NoiseProcess, build_process
from megadiff.diffusion.objective import SURROGATE, Weighting, build_weighting, gidd_objective
from megadiff.diffusion.weightings import TokenTerms
from megadiff.errors import ConfigError
from megadiff.loss.fused_lm_head import fused_objective
from megadiff.loss.lm_head import LossInputs, LossSpec, VocabShard

VOCAB_SIZE, MASK_ID, TOKENS, HIDDEN = 13, 5, 48, 6


def check_weighting(name: str, *, noise: Mapping[str, Any] | None = None, **settings: Any) -> Weighting:
    """Check that a loss weighting keeps its contract, on 48 tokens in float64.

    Checked are that every term but the loss, the reported ELBO among them, is that of the paper's weighting to the bit;
    that the loss and its gradient are those of its definition, with q and qhat formed over the whole vocabulary; that
    the fused output head gives the same; and that the loss is finite in float32.

    Args:
        name: a member of `megadiff.diffusion.weightings`, or the dotted path of a module of your own.
        noise: keys of the section `noise`; None for the default, balanced hybrid noise.
        settings: keys of the section `objective`.

    Returns:
        The weighting that was checked.

    Raises:
        AssertionError: a rule does not hold; the message names it.
        ConfigError: the weighting refuses this noise.
        ValidationError: the settings are wrong.
    """
    section = noise_config(**(noise or {}))
    objective = objective_config(weighting=name, **settings)
    check_noise_and_objective(section, objective)
    process = build_process(section, vocab_size=VOCAB_SIZE, mask_id=MASK_ID)
    weighting = build_weighting(objective)
    hidden, weight, tokens = _tokens(process)
    _check_terms(process, weighting, hidden, weight, tokens)
    _check_definition(process, weighting, hidden, weight, tokens)
    _check_fused(process, weighting, hidden, weight, tokens)
    return weighting


def _tokens(process: NoiseProcess) -> tuple[Tensor, Tensor, LossInputs]:
    """Return hidden states, head and tokens: kept, masked and changed ones, as far as the noise makes them."""
    draw = torch.Generator().manual_seed(0)
    hidden = torch.randn(TOKENS, HIDDEN, generator=draw, dtype=torch.float64)
    weight = torch.randn(VOCAB_SIZE, HIDDEN, generator=draw, dtype=torch.float64)
    real = torch.tensor([token for token in range(VOCAB_SIZE) if token != MASK_ID])
    clean = real[torch.randint(len(real), (TOKENS,), generator=draw)]
    other = real[torch.randint(len(real), (TOKENS,), generator=draw)]
    kind = torch.arange(TOKENS) % 3
    masked = other if process.is_uniform_limit else torch.full_like(clean, MASK_ID)
    changed = masked if process.is_masked_limit else other
    noised = torch.where(kind == 0, clean, torch.where(kind == 1, masked, changed))
    low, high = process.schedule.min_log_snr, process.schedule.max_log_snr
    log_snr = low + (high - low) * torch.rand(TOKENS, generator=draw, dtype=torch.float64)
    return hidden, weight, LossInputs(clean, noised, log_snr)


def _check_terms(
    process: NoiseProcess, weighting: Weighting, hidden: Tensor, weight: Tensor, tokens: LossInputs
) -> None:
    for dtype in (torch.float32, torch.float64):
        arguments = (hidden @ weight.t()).to(dtype), tokens.clean, tokens.noised, tokens.log_snr
        plain = gidd_objective(*arguments, mixing=process, weighting=SURROGATE)
        try:
            found = gidd_objective(*arguments, mixing=process, weighting=weighting)
        except ConfigError as error:
            raise AssertionError(str(error)) from error
        for term in ("elbo", "kl", "itakura_saito", "weight"):
            is_same = torch.equal(getattr(found, term), getattr(plain, term))
            assert is_same, f"`{term}` depends on the weighting; do not write into the terms"
        for term in ("loss", "minimised"):
            value = getattr(found, term)
            assert value.shape == tokens.clean.shape, f"the loss must have the shape of the tokens, got {value.shape}"
            assert value.dtype == dtype, f"the loss must keep the dtype {dtype}, got {value.dtype}"
            assert bool(torch.isfinite(value).all()), f"the loss is not finite in {dtype}"


def _check_definition(
    process: NoiseProcess, weighting: Weighting, hidden: Tensor, weight: Tensor, tokens: LossInputs
) -> None:
    results = []
    for by_definition in (True, False):
        logits = (hidden @ weight.t()).requires_grad_()
        if by_definition:
            loss = weighting.loss(_dense_terms(logits, tokens, process), weighting.settings)
        else:
            arguments = logits, tokens.clean, tokens.noised, tokens.log_snr
            loss = gidd_objective(*arguments, mixing=process, weighting=weighting).minimised
        (gradient,) = torch.autograd.grad(loss.sum(), logits)
        results.append((loss.detach(), gradient))
    (wanted, wanted_gradient), (found, gradient) = results
    scale = float(wanted.abs().max())
    assert torch.allclose(found, wanted, rtol=1e-7, atol=1e-9 * scale), "the loss is not that of its definition"
    scale = float(wanted_gradient.abs().max())
    assert torch.allclose(gradient, wanted_gradient, rtol=1e-6, atol=1e-8 * scale), (
        "the gradient of the loss is not that of its definition"
    )


def _dense_terms(logits: Tensor, tokens: LossInputs, process: NoiseProcess) -> TokenTerms:
    """Return the terms from their definitions, forming q and qhat over the vocabulary."""
    clean, noised, log_snr = tokens.clean, tokens.noised, tokens.log_snr
    log_p = logits.masked_fill(torch.arange(VOCAB_SIZE) == MASK_ID, -torch.inf).log_softmax(-1)
    q = process.marginal(torch.nn.functional.one_hot(clean, VOCAB_SIZE).double(), log_snr)
    q_hat = process.marginal(log_p.exp(), log_snr)
    some = (q > 0) & (q_hat > 0)
    ratio = torch.where(some, q, 1.0) / torch.where(some, q_hat, 1.0)
    kl = (torch.where(some, q, 0.0) * torch.log(ratio)).sum(-1)
    at_noised = ratio.gather(-1, noised.unsqueeze(-1)).squeeze(-1)
    return TokenTerms(
        process=process,
        clean=clean,
        noised=noised,
        log_snr=log_snr,
        weight=process.weight(log_snr, clean, noised),
        density=process.schedule.density(log_snr),
        kl=kl,
        itakura_saito=at_noised - torch.log(at_noised) - 1.0,
        cross_entropy=-log_p.gather(-1, clean.unsqueeze(-1)).squeeze(-1),
    )


def _check_fused(
    process: NoiseProcess, weighting: Weighting, hidden: Tensor, weight: Tensor, tokens: LossInputs
) -> None:
    states, columns = hidden.clone().requires_grad_(), weight.clone().requires_grad_()
    logits = states @ columns.t()
    loss = gidd_objective(
        logits, tokens.clean, tokens.noised, tokens.log_snr, mixing=process, weighting=weighting
    ).minimised.sum()
    wanted = [loss.detach(), *torch.autograd.grad(loss, (states, columns))]
    spec = LossSpec(process, weighting)
    answer = fused_objective(states, columns, tokens, spec, shard=VocabShard.of(columns, process), chunk_tokens=7)
    found = [answer.loss.detach(), *torch.autograd.grad(answer.loss, (states, columns))]
    for value, other, what in zip(found, wanted, ("loss", "gradient in hidden", "gradient in weight"), strict=True):
        close = torch.allclose(value, other, rtol=1e-7, atol=1e-9 * float(other.abs().max()) + 1e-12)
        assert close, f"the fused head's {what} is not that of the reference objective"
